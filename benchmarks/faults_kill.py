"""Kill a long command at a random moment, run it again, compare with a run that nothing stopped."""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults_process import beside, contents, finish, is_clear, kill, left_over, start
from benchmarks.faults_setup import Command, clean

LOG = logging.getLogger(__name__)
AGAIN = 3  # every third trial is killed a second time, while it resumes


@dataclass
class Tally:
    """What became of the kills of one command."""

    seconds: float
    """Of an unbroken run."""
    kills: int = 0
    """SIGKILLs sent."""
    before: int = 0
    """Of these, before anything was written."""
    during: int = 0
    """Between the first and the last file."""
    after: int = 0
    """When everything was in place."""
    same: int = 0
    """Trials whose result equals the unbroken one."""
    wrong: int = 0
    """Trials that ended with exit code 0 and another result."""
    refused: int = 0
    """Trials that ended with a message instead of a result."""
    unclear: int = 0
    """Of the messages, those that are not one sentence."""
    kept: int = 0
    """Finished pieces (shards, places, checkpoints' steps) that the resumed run did not redo."""
    lost: int = 0
    """Finished pieces that it made anew or that were gone."""
    left: int = 0
    """Trials after which unfinished work of a dead process lay about."""
    notes: list[str] = field(default_factory=list)
    """What went wrong, to look into."""


def kill_trials(root: Path, one: Command, kills: int, rng: np.random.Generator) -> Tally:
    """Kill ``one`` at random moments; every trial ends in a resume.

    Every other kill is uniform over the time of an unbroken run, the others over the time from its
    first file to its end, which is short where all is written at once.

    Args:
        kills: at least so many SIGKILLs.
    """
    reference, seconds, writing = unbroken(root, one)
    tally = Tally(seconds)
    trial = 0
    while tally.kills < kills:
        clean(root, one.states)
        trial += 1
        pieces: dict[str, int] = {}
        for _ in range(2 if trial % AGAIN == 0 else 1):
            aimed = tally.kills % 2 == 1
            delay = float(rng.uniform(0, writing if aimed else seconds))
            _kill_once(root, one, delay, aimed, tally)
            pieces |= finished_pieces(root, one)
        _resume(root, one, reference, pieces, tally, f"{one.name} trial {trial}")
    clean(root, one.states)
    return tally


def unbroken(root: Path, one: Command) -> tuple[dict[str, str], float, float]:
    """Digests of a run that nothing stops, its seconds, and those from its first file on.

    It runs twice, since both must agree.
    """
    found, seconds, writing = [], 0.0, 0.0
    for _ in range(2):
        clean(root, one.states)
        began = time.monotonic()
        child = start(one.action, root / "log")
        wait_for_file(root, one, 60.0)
        first = time.monotonic()
        code = finish(child)
        seconds, writing = time.monotonic() - began, time.monotonic() - first
        if code:
            raise RuntimeError(f"{one.name} ended with {code}: {(root / 'log').read_text()}")
        found.append(contents(root, one.states))
    differ = sorted(name for name in found[0] if found[0][name] != found[1].get(name))
    if differ or set(found[0]) != set(found[1]):
        raise RuntimeError(f"{one.name} is not repeatable in {differ}")
    return found[0], seconds, writing


def wait_for_file(root: Path, one: Command, limit: float) -> None:
    """Until the command has made something, or the time is over."""
    deadline = time.monotonic() + limit
    tops = [root / state for state in one.states]
    while time.monotonic() < deadline:
        if any(top.exists() or beside(top) for top in tops):
            return
        time.sleep(0.0005)


def _kill_once(root: Path, one: Command, delay: float, aimed: bool, tally: Tally) -> None:
    child = start(one.action, root / "log")
    if aimed:
        wait_for_file(root, one, 5 * tally.seconds)
    time.sleep(delay)
    code = kill(child)
    tally.kills += 1
    if (root / one.final).exists():
        tally.after += 1
    elif contents(root, one.states) or left_over(root, one.states):
        tally.during += 1
    else:
        tally.before += 1
    if code > 0:
        tally.notes.append(f"{one.name} ended with {code} before it was killed")


def _resume(
    root: Path, one: Command, reference: dict[str, str], pieces: dict[str, int], tally: Tally,
    name: str,
) -> None:  # fmt: skip
    code = finish(start(one.action, root / "log"))
    if code:
        tally.refused += 1
        tally.unclear += not is_clear((root / "log").read_text())
        tally.notes.append(f"{name}: exit {code}: {(root / 'log').read_text()[-500:]}")
        return
    found = contents(root, one.states)
    if found == reference:
        tally.same += 1
    else:
        tally.wrong += 1
        differ = {k for k in found.keys() | reference.keys() if found.get(k) != reference.get(k)}
        tally.notes.append(f"{name}: differs in {sorted(differ)[:5]}")
    now = finished_pieces(root, one)
    for piece, stamp in pieces.items():
        is_kept = now.get(piece) == stamp
        tally.kept += is_kept
        tally.lost += not is_kept
        if not is_kept:
            tally.notes.append(f"{name}: {piece} was made anew")
    tally.left += bool(left_over(root, one.states))


def finished_pieces(root: Path, one: Command) -> dict[str, int]:
    """Pieces that the disk says are finished, with the time at which each was written."""
    files: list[Path] = []
    for journal in (root / "out" / "activations").glob("*/progress.jsonl"):
        for line in journal.read_text().splitlines()[1:]:
            try:
                files.append(journal.parent / json.loads(line)["file"])
            except (ValueError, KeyError):
                continue  # the line that the kill cut
    files += (root / "out" / "pool").glob("shard-*/manifest.json")
    files += (root / "run" / "places").glob("[!.]*/manifest.json") if one.name == "geo" else []
    return {p.relative_to(root).as_posix(): p.stat().st_mtime_ns for p in files if p.exists()}


def kill_row(name: str, tally: Tally) -> dict[str, Any]:
    """One flat record."""
    trials = tally.same + tally.wrong + tally.refused
    return {
        "name": f"kill {name}", "seconds": round(tally.seconds, 2), "kills": tally.kills,
        "before": tally.before, "during": tally.during, "after": tally.after, "trials": trials,
        "same result": tally.same, "silently wrong": tally.wrong, "refused": tally.refused,
        "unclear": tally.unclear, "pieces kept": tally.kept, "pieces lost": tally.lost,
        "left over": tally.left,
    }  # fmt: skip
