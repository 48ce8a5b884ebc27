"""An hour of training: does memory grow?

    python -m benchmarks.longrun --minutes 60 [--model smollm2-135m] [--route streamed]

The route ``command`` is the real ``sae-apps train`` in a process of its own: it harvests for about
a quarter of the time (the tokens that ``--dry-run`` says it reads by then) and trains over these
tokens, epoch after epoch, for the rest. The route ``streamed`` is the library with nothing on disk:
``stream_activations``, ``shuffle_stream`` and ``train`` over the text, again and again in another
order; every stage works for the whole time. Either way SIGTERM ends it, which saves a checkpoint.

Memory is sampled over the process tree. What counts is anonymous memory (RssAnon): what the process
itself holds. Resident memory (RSS, and PSS where it may be read) stands beside it; it also counts
pages of the mapped activations, which the kernel takes back when it needs them.

The first twelfth of the time (5 minutes of 60) and the same after the change to training are
warm-up; ``longrun_table`` says what growth is.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import write_result
from benchmarks.longrun_memory import memory_of
from benchmarks.longrun_table import STOPPED, Sample, curve_rows, goals, phase_rows

EVERY = 10.0  # seconds between samples, less in a run of a few minutes
MIN_SAMPLES = 60
WARM_UP = 1 / 12  # of the time
HARVEST = 0.25  # of the time by the estimate; a machine that others load takes up to twice as long
PATIENCE = 300.0  # seconds that the process has to save and leave
SMALL = ("--hook", "layers.15.out", "--d-sae", "4608")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one route for the time and write results/longrun.json and longrun_curve.json."""
    parser = argparse.ArgumentParser(description="Memory over a long run of training.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--route", choices=("command", "streamed"), default="command")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--dry", action="store_true", help="Print, write nothing.")
    args = parser.parse_args(argv)
    started = time.time()
    more = SMALL if args.model == parser.get_default("model") else ()
    with tempfile.TemporaryDirectory(prefix="longrun-") as scratch:
        rows, curve = long_run(
            args.route, args.model, args.text, 60 * args.minutes, Path(scratch), more
        )
    if args.dry:
        print(json.dumps(rows, indent=1))
        return
    write_result("longrun", rows, goals, started, merge=True)
    write_result("longrun_curve", curve, lambda _: [], started, merge=True)


def long_run(
    route: str, model: str, text: str, seconds: float, scratch: Path, more: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Start a route, watch it, end it: a row for each phase, and the curve by the minute.

    Args:
        seconds: from the start of the process to SIGTERM.
        scratch: empty folder for the run, which needs some 3 GiB an hour.
        more: further flags of ``sae-apps train``.
    """
    out = scratch / "run"
    flags = ["--model", model, "--text", text, *more, "--out", str(out), "--quiet"]
    if route == "command":
        tokens = harvest_tokens(flags, HARVEST * seconds)
        command = [installed(), "train", *flags, "--tokens", str(tokens), "--epochs", "1000000"]
    else:
        command = [sys.executable, "-m", "benchmarks.longrun_stream", *flags[:4], str(out)]
    with open(scratch / "log", "w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            samples = list(watch(child, out, route, seconds))
            begun = time.monotonic()
            child.terminate()
            code = child.wait(PATIENCE)
        finally:
            child.kill()
    if code in (STOPPED, -signal.SIGTERM) and not (out / "metrics.jsonl").exists():
        raise TimeoutError(f"{seconds:.0f} s were too short: expected training, got none.")
    if code != STOPPED:
        raise RuntimeError(f"{command} ended with {code}: {(scratch / 'log').read_text()[-2000:]}")
    end = {"exit_code": code, "seconds_to_stop": round(time.monotonic() - begun, 1)}
    rows = phase_rows(route, model, samples, WARM_UP * seconds)
    if not rows:
        raise TimeoutError(f"{seconds:.0f} s were too short: expected a phase after its warm-up.")
    rows[-1] |= end | saved(out)
    return rows, curve_rows(route, samples)


def installed() -> str:
    """The command ``sae-apps`` of this environment."""
    beside = Path(sys.executable).with_name("sae-apps")
    found = str(beside) if beside.exists() else shutil.which("sae-apps")
    if found is None:
        raise RuntimeError(f"Expected the command sae-apps beside {sys.executable}, got none.")
    return found


def harvest_tokens(flags: list[str], seconds: float) -> int:
    """Tokens that the command's own estimate reads in the time; at most those of the text."""
    argv = [installed(), "train", *flags, "--tokens", "all", "--dry-run", "--json"]
    run = subprocess.run(argv, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{argv} ended with {run.returncode}: {run.stderr}")
    found = json.loads(run.stdout)
    return max(1, min(int(found["forward_tokens_per_second"] * seconds), found["stored_tokens"]))


def watch(child: subprocess.Popen, out: Path, route: str, seconds: float) -> Iterator[Sample]:
    """Samples of a running process until the time is over or it has ended."""
    begun, n = time.monotonic(), 0
    every = min(EVERY, seconds / MIN_SAMPLES)
    while time.monotonic() - begun < seconds and child.poll() is None:
        memory = memory_of(child.pid)
        if memory is not None:
            phase, tokens = progress(out, route)
            yield Sample(time.monotonic() - begun, phase, tokens, memory)
        n += 1
        time.sleep(max(0.0, min(begun + n * every, begun + seconds) - time.monotonic()))


def progress(out: Path, route: str) -> tuple[str, int]:
    """The phase that a run is in, and its tokens."""
    metrics = out / "metrics.jsonl"
    phase = "streamed" if route == "streamed" else "train"
    if metrics.exists() and (lines := whole_lines(metrics)):
        return phase, json.loads(lines[-1])["tokens"]
    if route == "streamed":
        return phase, 0
    journal = out / "activations" / "train" / "progress.jsonl"
    lines = whole_lines(journal)[1:] if journal.exists() else []
    return "harvest", sum(json.loads(line)["tokens"] for line in lines)


def whole_lines(file: Path) -> list[str]:
    """The lines of a file that is being written, without one that is not finished."""
    return [x for x in file.read_text().splitlines(keepends=True) if x.endswith("\n")]


def saved(out: Path) -> dict[str, int]:
    """The step of the newest checkpoint, and of the last record."""
    steps = [int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")]
    last = whole_lines(out / "metrics.jsonl")[-1]
    return {"checkpoint_step": max(steps, default=0), "last_step": json.loads(last)["step"]}


if __name__ == "__main__":
    main()
