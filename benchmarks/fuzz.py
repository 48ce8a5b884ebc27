"""Fuzz: hostile files for every reader, hostile values for every option of every command.

    python -m benchmarks.fuzz [--inputs 10000 | --each 10000] [--only NAME ...] [--seed 0]

Each input is a changed copy of a good example (bits, tokens, JSON nodes, headers that claim 2^60
elements, paths that climb, values no computation gives). Checksums and seals are made to fit, as a
hostile writer would, so that the change reaches the reader behind them. An input may be accepted or
refused in one sentence. It may not end in a traceback, ask for more than 3 GiB, take 5 seconds of
processor time, write outside its folder, start a program, or unpickle: an audit hook of the
interpreter watches all but the memory and the time.
"""

import argparse
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Goal, write_result
from benchmarks.faults_process import add, finish, preload, start
from benchmarks.faults_setup import prepare
from benchmarks.fuzz_corpus import reseal
from benchmarks.fuzz_guard import Watch, judged, limit_memory
from benchmarks.fuzz_mutate import mutator
from benchmarks.fuzz_options import option_inputs, option_names
from benchmarks.fuzz_pickle import mutate_state
from benchmarks.fuzz_readers import Reader, make_readers

LOG = logging.getLogger(__name__)
OPTIONS_SHARE = 0.2
BAD = ("unclear", "traceback", "memory", "hung", "outside", "crashed")
EXAMPLE = "the example itself"
Input = tuple[str, Callable[[], Any]]


def main() -> None:
    """Run everything, write results/fuzz.json."""
    parser = argparse.ArgumentParser(description="Hostile files and options.")
    parser.add_argument("--inputs", type=int, default=10_000, help="in all")
    parser.add_argument("--each", type=int, help="for every reader and command (default: a share)")
    parser.add_argument("--only", nargs="*", help="readers or commands (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.time()
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.environ["SAE_APPS_CACHE"] = str(root / "work" / "cache")
    os.environ["HOME"] = str(root / "work" / "home")
    preload()
    try:
        prepare(root)
        rows = fuzz_rows(root, options.inputs, options.seed, options.only, options.each)
        write_result("fuzz", rows, goals, started, merge=bool(options.only))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def fuzz_rows(
    root: Path, n: int, seed: int, only: list[str] | None, each: int | None = None
) -> list[dict[str, Any]]:
    """A row for each reader, and one for the options of each command.

    Args:
        n: inputs in all, by the readers' weights; each: of every one instead.
    """
    readers, commands = make_readers(root), option_names()
    total = sum(one.weight for one in readers)
    jobs: dict[str, tuple[int, Callable[[int, Path], Iterator[Input]]]] = {
        one.name: (round(n * (1 - OPTIONS_SHARE) * one.weight / total), partial(file_inputs, one))
        for one in readers
    }
    share = round(n * OPTIONS_SHARE / len(commands))
    for name in commands:
        jobs[f"sae-apps {name}"] = (share, partial(option_inputs, root, name))
    rows = []
    for number, (name, (n_inputs, make)) in enumerate(jobs.items()):
        if only and name not in only and name.removeprefix("sae-apps ") not in only:
            continue
        began = time.perf_counter()
        n_inputs = each or n_inputs
        counts = run_inputs(root, name, n_inputs, partial(make, seed * 1000 + number))
        inputs = sum(counts.values())
        rows.append(
            {"name": f"fuzz {name}", "inputs": inputs, "accepted": counts.get("accepted", 0),
             "refused": counts.get("refused", 0)} | {what: counts.get(what, 0) for what in BAD}
            | {"seconds": round(time.perf_counter() - began, 1)}
        )  # fmt: skip
        LOG.info("%s", rows[-1])
    return rows


def file_inputs(reader: Reader, seed: int, work: Path) -> Iterator[Input]:
    """Changed copies of a reader's example, without end."""
    rng = np.random.default_rng(seed)
    names = sorted(
        p.relative_to(reader.good).as_posix() for p in reader.good.rglob("*")
        if p.is_file() and reader.takes(p.name)
    )  # fmt: skip
    for number in count():
        name = names[int(rng.integers(len(names)) if number else 0)]
        content = (reader.good / name).read_bytes()
        if number:  # the first input is the example itself
            change = mutate_state if name.endswith(".pt") else mutator(name)
            content = change(content, rng)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(reader.good, work)
        (work / name).write_bytes(content)
        (work / ".changed").write_text(name)
        reseal(work)
        yield name if number else EXAMPLE, partial(reader.read, work)


def run_inputs(
    root: Path, name: str, total: int, make: Callable[[Path], Iterator[Input]]
) -> dict[str, int]:
    """Children work through the inputs; one that dies is replaced, its input counts as crashed."""
    results = root / "fuzz.jsonl"
    results.unlink(missing_ok=True)
    counts: dict[str, int] = {}
    done = 0
    while done < total:
        code = finish(start(partial(_work, root, make, done, total, results), root / "log"), 3600)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        for what, label, told in lines[done:]:
            add(counts, what)
            if what in BAD:
                LOG.warning("%s %s: %s: %s", name, what, label, told)
        if lines and lines[0][0] != "accepted" and lines[0][1] in ("nothing", EXAMPLE):
            raise RuntimeError(f"The example of {name} itself is not read: {lines[0]}")
        done = len(lines)
        if done < total and code:
            add(counts, "crashed")
            LOG.warning("%s crashed: input %d: exit %d", name, done, code)
            with open(results, "a", encoding="utf-8") as out:
                out.write(json.dumps(["crashed", "", ""]) + "\n")
            done += 1
    return counts


def _work(
    root: Path, make: Callable[[Path], Iterator[Input]], first: int, total: int, results: Path
) -> None:
    work = root / "work" / "in"
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(root / "work")
    watch = Watch(str((root / "work").resolve()))
    watch.install()
    limit_memory()
    with open(results, "a", encoding="utf-8") as out:
        for number, (label, read) in enumerate(make(work)):
            if number >= total:
                return
            if number < first:
                continue
            what, told = judged(read, watch)
            out.write(json.dumps([what, label, told]) + "\n")
            out.flush()


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Nothing but acceptance or one sentence."""
    inputs = sum(row["inputs"] for row in rows)
    names = {
        "traceback": "tracebacks", "crashed": "crashes", "memory": "allocations beyond 3 GiB",
        "hung": "inputs that took 5 s", "outside": "writes outside, programs, pickles",
        "unclear": "messages of more than one sentence",
    }  # fmt: skip
    return [
        Goal(text, float(found := sum(row[what] for row in rows)), "<= 0", found == 0,
             f"{inputs} inputs")
        for what, text in names.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
