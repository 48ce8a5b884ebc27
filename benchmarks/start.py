"""How long Python takes to import the packages, and the command to start.

    python -m benchmarks.start [--rounds 15] [--python sae_lens=PYTHON] [--python sparsify=PYTHON] \
        [--python dictionary_learning=PYTHON]

Every import and every command is a new process. All of them run in turns, round by round, after one
round that does not count: it fills the cache of files, writes the bytecode and counts the modules
and the memory. One thread each; seconds are of the clock, from the start of the process to its end,
beside those of the processor. What is compared with `import torch` is compared with the one of its
own round and its own interpreter; median and range are over the rounds.

`import sae_core` loads a name when it is first used, torch not before. "All public names" is
therefore what a program pays that uses them all. The command is the one that is installed,
`sae-apps`. PYTHON is an interpreter that can import another library, which is then measured beside
the torch of its own environment.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.common import ROOT, Goal, write_result
from benchmarks.interop import PACKAGES, VERSION, call
from benchmarks.longrun import installed
from sae_core.errors import UserError

ROUNDS, MIN_ROUNDS = 15, 9
OURS = "sae_core"
ALL_NAMES = "import sae_core, all public names"
APPLICATIONS = ("alignment", "experts", "geospatial", "report", "selection", "suppression")
COMMANDS = ("--help", "train --help", "inspect --help", "doctor")
PEERS = ("sae_lens", "sparsify", "dictionary_learning")
TIMES_TORCH, HELP_SECONDS = 1.5, 1.0
# printed by the process itself as it ends; VmHWM is its peak, which getrusage does not tell
COUNTED = """
import atexit, sys
def count():
    status = dict(x.split(":", 1) for x in open("/proc/self/status").read().splitlines())
    print("counted", len(sys.modules), int(status["VmHWM"].split()[0]) / 1024, file=sys.stderr)
atexit.register(count)
"""


@dataclass(frozen=True)
class Case:
    """One thing to start."""

    name: str
    """As the table has it."""
    library: str
    """Whose environment it runs in; `sae_core` for this one."""
    argv: tuple[str, ...]
    """What is timed."""
    code: str
    """The same as a program, to be counted."""
    python: str
    """The interpreter."""


def cases(pythons: dict[str, str]) -> list[Case]:
    """All cases, those of one interpreter together and its torch first."""
    found = [imported("import torch", OURS, sys.executable)]
    found.append(imported("import sae_core", OURS, sys.executable))
    code = "import sae_core\nfor name in sae_core.__all__:\n    getattr(sae_core, name)"
    found.append(imported(ALL_NAMES, OURS, sys.executable, code))
    found += [imported(f"import sae_apps.{name}", OURS, sys.executable) for name in APPLICATIONS]
    for words in COMMANDS:
        code = f"sys.argv[1:] = {words.split()}\nfrom sae_apps.tasks.main import main\nmain()"
        argv = (installed(), *words.split())
        found.append(Case(f"sae-apps {words}", OURS, argv, code, sys.executable))
    for library, python in pythons.items():
        found.append(imported("import torch", library, python))
        found.append(imported(f"import {library}", library, python))
    return found


def imported(name: str, library: str, python: str, code: str | None = None) -> Case:
    """A case that is a program of imports."""
    return Case(name, library, (python, "-c", code or name), code or name, python)


def environment(library: str) -> dict[str, str]:
    """One thread, no network; another library does not see this repository."""
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if library == OURS:
        return os.environ | fixed | {"PYTHONPATH": str(ROOT)}
    return fixed | {"PATH": "/usr/bin:/bin", "HOME": tempfile.gettempdir()}


def run(case: Case, argv: Sequence[str]) -> tuple[float, float, str]:
    """Seconds of the clock and of the processor from start to end, and what it wrote as errors.

    Raises:
        UserError: it ended with an error; with the last line of it.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        cwd=tempfile.gettempdir(), env=environment(case.library),
    )  # fmt: skip
    took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"Expected {case.name!r} of {case.library} to start, got: {last}")
    return took, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stderr


def counted(case: Case) -> dict[str, Any]:
    """Modules in memory at the end of the process, and its peak."""
    errors = run(case, (case.python, "-c", COUNTED + case.code))[2]
    last = next(x for x in errors.splitlines()[::-1] if x.startswith("counted"))
    _, modules, peak = last.split()
    return {"modules": int(modules), "peak_MiB": round(float(peak), 1)}


def measured(every: Sequence[Case], rounds: int) -> list[dict[str, Any]]:
    """A row for each case, after all rounds."""
    facts = []
    for case in every:  # the warm-up: as it is timed, then counted
        run(case, case.argv)
        facts.append(counted(case))
    times = []
    for _ in range(rounds):
        times.append([run(case, case.argv)[:2] for case in every])
    rows = []
    for number, case in enumerate(every):
        torch = next(i for i, one in enumerate(every) if one.library == case.library)
        wall = [one[number][0] for one in times]
        over = [one[number][0] / one[torch][0] for one in times]
        rows.append({
            "name": case.name if case.library == OURS else f"{case.library}: {case.name}",
            "library": case.library, **spread("seconds", wall),
            "cpu_seconds": round(median(one[number][1] for one in times), 3),
            **spread("times_torch", over), **facts[number], "rounds": rounds,
            "load": round(os.getloadavg()[0], 1),
        })  # fmt: skip
    return rows


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    found = {name: median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
    return {key: round(value, 3) for key, value in found.items()}


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """What the issue of the toolkit's speed states, and no peer that imports sooner."""
    by = {row["name"]: row for row in rows}
    found = []
    for name in ("import sae_core", ALL_NAMES):
        row = by[name]
        note = f"{row['times_torch_low']}–{row['times_torch_high']}; {row['seconds']} s"
        met = row["times_torch"] < TIMES_TORCH
        found.append(
            Goal(f"{name}, over import torch", row["times_torch"], f"< {TIMES_TORCH}", met, note)
        )
    row = by["sae-apps --help"]
    note = f"{row['seconds_low']}–{row['seconds_high']}"
    met = row["seconds"] < HELP_SECONDS
    found.append(Goal("seconds, sae-apps --help", row["seconds"], f"< {HELP_SECONDS}", met, note))
    for library in PEERS:
        if peer := by.get(f"{library}: import {library}"):
            share = by[ALL_NAMES]["seconds"] / peer["seconds"]
            note = f"{by[ALL_NAMES]['seconds']} s and {peer['seconds']} s"
            found.append(Goal(f"{ALL_NAMES}, over import {library}", share, "< 1", share < 1, note))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write results/start.json."""
    parser = argparse.ArgumentParser(description="Time of imports and of the command's start.")
    parser.add_argument("--python", action="append", default=[], metavar="LIBRARY=PYTHON")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dry", action="store_true", help="print, write no result")
    args = parser.parse_args(argv)
    pythons = dict(item.split("=", 1) for item in args.python if "=" in item)
    if len(pythons) < len(args.python) or set(pythons) - set(PEERS):
        parser.error(f"expected --python LIBRARY=PYTHON with one of {', '.join(PEERS)}")
    if args.rounds < MIN_ROUNDS and not args.dry:
        parser.error(f"expected at least {MIN_ROUNDS} rounds, got {args.rounds}")
    started = time.time()
    versions = {name: call(p, "-c", VERSION.format(PACKAGES[name])) for name, p in pythons.items()}
    rows = [row | {"version": versions.get(row["library"])}
            for row in measured(cases(pythons), args.rounds)]  # fmt: skip
    if args.dry:
        print(*rows, *goals(rows), sep="\n")
        return
    # the result names its command, and where an interpreter lies says nothing to a reader
    sys.argv[1:] = [part for name in pythons for part in ("--python", f"{name}=PYTHON")]
    sys.argv += ["--rounds", str(args.rounds)] if args.rounds != ROUNDS else []
    write_result("start", rows, goals, started)


if __name__ == "__main__":
    main()
