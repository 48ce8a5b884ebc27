"""Faults: kills, damaged files, full and forbidden disks, two writers, clocks that jump.

    python -m benchmarks.faults [--part kill|flip|disk] [--kills N] [--flips N] [--only NAME ...]

Everything runs on the real model stories260k and small real texts. A result counts as equal where
every file is equal byte for byte (of results.json of a training run: all but times and memory).

1. kill: SIGKILL at a random moment of every long command, every third trial twice; the command is
   then run to its end and compared with a run that nothing stopped.
2. flip: bits flipped, ends cut, bytes added, blocks zeroed, in every region of every kind of file;
   reading must refuse in one sentence, or give the very same result.
3. disk: full disks of growing size and read-only ones (a tmpfs, which needs root), a limit on the
   size of files, two processes in one folder, clocks and time stamps that jump.
"""

import argparse
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Goal, write_result
from benchmarks.faults_process import preload
from benchmarks.faults_setup import commands, prepare

LOG = logging.getLogger(__name__)
PARTS = ("kill", "flip", "disk")


def main() -> None:
    """Run one part or all, merge into results/faults.json."""
    parser = argparse.ArgumentParser(description="Kills, damaged files and bad disks.")
    parser.add_argument("--part", choices=PARTS, action="append", help="which (default: all)")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs a command")
    parser.add_argument("--flips", type=int, default=200, help="damages of each kind of file")
    parser.add_argument("--only", nargs="*", help="commands or kinds of file (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.time()
    preload()
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        prepare(root)
        for part in options.part or PARTS:
            write_result("faults", RUN[part](root, options), goals, started, merge=True)
            started = time.time()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run_kill(root: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each command."""
    from benchmarks.faults_kill import kill_row, kill_trials

    rows = []
    for number, (name, one) in enumerate(commands(root).items()):
        if options.only and name not in options.only:
            continue
        tally = kill_trials(root, one, options.kills, np.random.default_rng([options.seed, number]))
        rows.append(kill_row(name, tally))
        LOG.info("%s", rows[-1])
        for note in tally.notes:
            LOG.warning("%s", note)
    return rows


def run_flip(root: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind of file."""
    from benchmarks.faults_flip import flip_rows

    return flip_rows(root, options.flips, options.seed, options.only)


def run_disk(root: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each command and kind of trouble."""
    from benchmarks.faults_disk import disk_rows

    return disk_rows(root, options.seed, options.only)


RUN: dict[str, Callable[[Path, argparse.Namespace], list[dict[str, Any]]]] = {
    "kill": run_kill,
    "flip": run_flip,
    "disk": run_disk,
}


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """What every row promises."""

    def total(part: str, key: str) -> float:
        return float(sum(row.get(key) or 0 for row in rows if row["name"].startswith(part)))

    def none(what: str, part: str, key: str, note: str = "") -> Goal:
        return Goal(what, total(part, key), "<= 0", total(part, key) == 0, note)

    kills, flips = total("kill", "kills"), total("flip", "damages")
    all_goals = [
        none("silent wrong results after kills", "kill", "silently wrong", f"{kills:.0f} kills"),
        none("resumes that were refused", "kill", "refused"),
        none("finished pieces lost to a kill", "kill", "pieces lost"),
        none("silent wrong results from damaged files", "flip", "silently wrong",
             f"{flips:.0f} damages"),
        none("tracebacks and crashes from damaged files", "flip", "crashed"),
        none("silent wrong results on bad disks", "disk", "silently wrong"),
        none("unclear messages", "", "unclear"),
    ]  # fmt: skip
    parts = ("kill", "kill", "kill", "flip", "flip", "disk", "")
    names = [row["name"] for row in rows]
    return [  # of the parts that have run
        goal for goal, part in zip(all_goals, parts, strict=True)
        if any(name.startswith(part) for name in names)
    ]  # fmt: skip


if __name__ == "__main__":
    main()
