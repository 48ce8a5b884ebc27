"""Memory of a process and its descendants, from /proc (Linux)."""

from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
PROC = Path("/proc")


@dataclass(frozen=True)
class Memory:
    """Bytes, summed over a process tree."""

    resident: int
    """RSS: pages in memory, those of mapped files and those shared with others included."""
    anonymous: int
    """RssAnon: pages that belong to no file."""
    proportional: int | None
    """PSS: RSS with a shared page counted in parts; None where smaps_rollup may not be read."""


def tree(pid: int, proc: Path = PROC) -> list[int]:
    """A process and all its living descendants."""
    parents = {}
    for path in proc.glob("[0-9]*"):
        try:
            # the name, in parentheses, may hold anything; after it come the state and the parent
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it ended meanwhile
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kib_fields(path: Path) -> dict[str, int]:
    """Lines such as ``RssAnon:  12 kB`` in bytes."""
    lines = (text.split() for text in path.read_text().splitlines())
    return {x[0][:-1]: 1024 * int(x[1]) for x in lines if len(x) == 3 and x[2] == "kB"}


def memory_of(pid: int, proc: Path = PROC) -> Memory | None:
    """What a process tree holds; None where the process has ended."""
    resident = anonymous = 0
    shares: list[int | None] = []
    for one in tree(pid, proc):
        try:
            status = kib_fields(proc / str(one) / "status")
        except OSError:
            continue
        resident += status.get("VmRSS", 0)
        anonymous += status.get("RssAnon", 0)
        try:
            shares.append(kib_fields(proc / str(one) / "smaps_rollup")["Pss"])
        except (OSError, KeyError):
            shares.append(None)
    if not resident:
        return None
    known = [share for share in shares if share is not None]
    return Memory(resident, anonymous, sum(known) if len(known) == len(shares) else None)


def peak_mib() -> float:
    """Peak of resident memory of this process so far.

    ``getrusage`` will not do: its ``ru_maxrss`` begins with what the parent held at the fork.
    """
    return kib_fields(PROC / "self" / "status")["VmHWM"] / MIB
