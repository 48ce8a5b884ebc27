"""Training speed on the processor beside sparsify, SAELens and dictionary_learning.

    python -m benchmarks.peers --python sae_lens=PYTHON --python sparsify=PYTHON \
        --python dictionary_learning=PYTHON [--size full] [--part speed] [--only 4608x1] \
        [--activations FOLDER]

Each PYTHON is an interpreter that can import the library. All train on the same file: SmolLM2-135M
at layers.15.out on the demo text, tokens shuffled and divided by their norms, because a few
attention sinks a hundred times as long as the rest would otherwise be the whole FVU, and the peers
do not normalise. Harvested into the cache folder on first use, or taken from the activations of a
run. Every trainer is a process of its own (peers_drivers.py) that waits while another works.

1. Settings: each library in each of its settings, processor seconds a step; the quickest goes on.
2. Speed: once GBA's L0 has come to 95% of k, rounds of steps in turns, with the bfloat16 encoder
   product alone as the floor; median and range over the rounds, the first left out. Processor
   seconds on one thread; wall seconds on two, where only a quiet machine tells anything, so the
   load average stands beside them. Peak memory of the process, its libraries included; start_MiB is
   what it held before its first step.
3. Quality: FVU of held-out tokens after equal tokens at k active latents; every trainer, ours
   included, at 1, 2, 4 and 8 times its own learning rate, the best one counting.

torch.compile is not among the settings.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, write_result
from benchmarks.interop import PACKAGES, VERSION, call
from benchmarks.peers_table import TIMES, goals, measure
from sae_core.download import cache_dir
from sae_core.errors import UserError
from sae_core.shards import ShardedActivations

HOOK, K, BATCH = "layers.15.out", 32, 2048
N_TRAIN, N_HELD_OUT = 262_144, 16_384
SCHEDULE = 10_000  # steps of the learning rate's schedule where only speed is measured
SETTINGS = {
    "sparsify": ("default", "bfloat16", "bfloat16 chunks", "adam bfloat16"),
    "sae_lens": ("default", "sparse unscaled", "bfloat16 unscaled"),
    "dictionary_learning": ("default", "bfloat16"),
    "ours gba": ("float32", "bfloat16", "int8"),
    "ours topk": ("float32", "bfloat16"),
}
# either is about as quick, and they train differently: both are measured for quality
OPTIMISERS = (("sparsify", "bfloat16"), ("sparsify", "adam bfloat16"))
LR_TIMES = (1, 2, 4, 8)
SIZES = {  # d_sae and threads of each comparison, rounds, steps a round, steps for quality
    "reduced": (((4608, 1),), 3, 10, 64),
    "full": (((4608, 1), (4608, 2), (18432, 1), (18432, 2)), 5, 10, 128),
}


class Driver:
    """A trainer in its own process."""

    def __init__(self, python: str, spec: dict[str, Any]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on exit
        environment = {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
        environment |= {"PATH": "/usr/bin:/bin", "HOME": tempfile.gettempdir()}
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.peers_drivers", json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            cwd=ROOT, env=environment,
        )  # fmt: skip
        self.spec = spec

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()  # closes both ends
        self.errors.close()

    def ask(self, what: str) -> dict[str, float]:
        """The answer to round, quality or memory.

        Raises:
            UserError: the process ended; with the last line of its errors.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["nothing"])[-1]
            raise UserError(
                f"Expected {self.spec['trainer']} ({self.spec['setting']}) to answer {what!r}, "
                f"got: {last}"
            ) from None


def write_arrays(stored: ShardedActivations, places: np.ndarray, path: Path) -> None:
    """Tokens at `places`, each at the norm sqrt(d_in), as float32 .npy."""
    x = np.empty((len(places), stored.d_in), dtype=np.float32)
    for first in range(0, len(places), 16_384):
        part = torch.from_numpy(places[first : first + 16_384])
        rows = stored.gather(part).x.float()
        x[first : first + len(rows)] = stored.d_in**0.5 * torch.nn.functional.normalize(rows)
    np.save(path, x)


def harvested(folder: Path, n_tokens: int) -> ShardedActivations:
    """Activations of the demo text, made where they are not there."""
    from sae_apps.tasks.text import open_text
    from sae_core.activations import HarvestConfig
    from sae_core.harvest import harvest_shards
    from sae_core.models import load_model

    config = HarvestConfig(max_tokens=n_tokens)
    lm = load_model("smollm2-135m", dtype=torch.bfloat16)
    return harvest_shards(lm, open_text("demo"), [HOOK], folder, config, dtype="bfloat16")[HOOK]


def data(activations: Path | None, folder: Path) -> dict[str, str]:
    """Files of training and held-out tokens, from a run's activations or the demo text."""
    generator = np.random.default_rng(0)
    if activations is None:
        kept = cache_dir() / "peers"
        stored = harvested(kept, N_TRAIN + N_HELD_OUT)
        # the end of the text is held out, so that only the text at the seam stands on both sides
        n = len(stored)
        parts = {"train": (stored, 0, n - N_HELD_OUT), "held_out": (stored, n - N_HELD_OUT, n)}
    else:
        found = {name: ShardedActivations.open(activations / name, HOOK) for name in
                 ("train", "held_out")}  # fmt: skip
        parts = {name: (stored, 0, len(stored)) for name, stored in found.items()}
    sizes = {"train": N_TRAIN, "held_out": N_HELD_OUT}
    for name, (stored, first, end) in parts.items():
        places = first + generator.permutation(end - first)[: sizes[name]]
        write_arrays(stored, places, folder / f"{name}.npy")
    return {name: str(folder / f"{name}.npy") for name in parts}


def spec_of(trainer: str, setting: str, files: dict[str, str], **more: Any) -> dict[str, Any]:
    """What a driver is told; `more` names d_sae, threads and round."""
    fixed = {"trainer": trainer, "setting": setting, "k": K, "batch": BATCH, "lr_times": 1}
    return fixed | {"steps": SCHEDULE} | files | more


def row(part: str, spec: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A flat record; every part has the same columns."""
    same = {name: spec[name] for name in ("trainer", "setting", "d_sae", "threads", "lr_times")}
    # one row a trainer where speed is compared, so that a new run replaces the old choice
    setting = "" if part == "speed" else f" {spec['setting']}"
    name = f"{part}: {spec['trainer']}{setting}, {spec['d_sae']}, {spec['threads']}"
    name += f", lr x{spec['lr_times']}" if part == "quality" else ""
    empty = dict.fromkeys((
        "cpu_ms", "cpu_ms_low", "cpu_ms_high", "wall_ms", "wall_ms_low", "wall_ms_high",
        "times_floor", "peak_MiB", "start_MiB", "load", "tokens", "fvu", "l0", "note",
    ))  # fmt: skip
    return {"name": name, "part": part, **same, **empty, **more}


def chosen(
    pythons: dict[str, str], files: dict[str, str], d_sae: int, threads: int, steps: int
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The quickest setting of each trainer and the records of all."""
    best: dict[str, str] = {}
    rows = []
    for trainer, python in pythons.items():
        found = {}
        for setting in SETTINGS[trainer]:
            spec = spec_of(trainer, setting, files, d_sae=d_sae, threads=threads, round=steps)
            try:
                with Driver(python, spec) as driver:
                    driver.ask("round")
                    took = driver.ask("round")
            except UserError as error:
                rows.append(row("settings", spec, note=str(error)))
                continue
            found[setting] = took[measure(threads)]
            rows.append(row("settings", spec, **took))
        if found:
            best[trainer] = min(found, key=found.__getitem__)
    return best, rows


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {name: median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def speed(pythons: dict[str, str], specs: Iterable[dict[str, Any]], rounds: int) -> list[Any]:
    """Rounds in turns: every trainer once, then every trainer again."""
    times: list[list[dict[str, float]]] = []
    with ExitStack() as stack:
        drivers = [stack.enter_context(Driver(pythons[s["trainer"]], s)) for s in specs]
        for driver in drivers:
            if driver.spec["trainer"] == "ours gba":  # its controller starts below the L0 asked for
                driver.ask("settle")
        for _ in range(rounds + 1):  # the first warms up
            times.append([driver.ask("round") for driver in drivers])
        memory = [driver.ask("memory") for driver in drivers]
    rows = []
    for number, driver in enumerate(drivers):
        columns = {
            key: value
            for name in ("cpu_ms", "wall_ms")
            for key, value in spread(name, [one[number][name] for one in times[1:]]).items()
        }
        load = os.getloadavg()[0]
        l0 = times[-1][number].get("l0")
        rows.append(row("speed", driver.spec, **columns, **memory[number], load=load, l0=l0))
    by = measure(rows[0]["threads"])
    least = next(one[by] for one in rows if one["trainer"] == "floor")
    return [one | {"times_floor": one[by] / least} for one in rows]


def quality(python: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Held-out FVU and L0 after spec's steps."""
    with Driver(python, spec) as driver:
        took = driver.ask("round")
        found = driver.ask("quality")
    return row("quality", spec, **took | found, tokens=spec["steps"] * spec["batch"])


def measured(
    args: argparse.Namespace, pythons: dict[str, str], files: dict[str, str]
) -> list[dict[str, Any]]:
    """The parts asked for."""
    rows = []
    comparisons, rounds, steps, n_quality = SIZES[args.size]
    if args.only:
        comparisons = [one for one in comparisons if f"{one[0]}x{one[1]}" in args.only]
    for number, (d_sae, threads) in enumerate(comparisons):
        if number and args.part == "quality":
            break
        best, found = chosen(pythons, files, d_sae, threads, steps=3)
        rows += found
        common = {"d_sae": d_sae, "threads": threads}
        if args.part != "quality":
            pairs = [("floor", "bfloat16"), *best.items()]
            specs = [spec_of(*pair, files, **common, round=steps) for pair in pairs]
            rows += speed(pythons | {"floor": sys.executable}, specs, rounds)
        if number or args.part == "speed":
            continue
        pairs = [*best.items(), *(p for p in OPTIMISERS if p[0] in best and p not in best.items())]
        for trainer, setting in pairs:
            length = {"steps": n_quality, "round": n_quality}
            for lr_times in LR_TIMES:
                spec = spec_of(trainer, setting, files, **common, **length, lr_times=lr_times)
                rows.append(quality(pythons[trainer], spec))
    return rows


def main() -> None:
    """Run what there is an interpreter for."""
    parser = argparse.ArgumentParser(description="Training speed beside other SAE libraries.")
    parser.add_argument("--python", action="append", default=[], metavar="LIBRARY=PYTHON")
    parser.add_argument("--size", choices=SIZES, default="reduced")
    parser.add_argument("--part", choices=("speed", "quality"), help="this, into the last result")
    parser.add_argument("--only", nargs="+", metavar="LATENTSxTHREADS", help="into the last result")
    parser.add_argument("--activations", type=Path, help="activations folder of a run")
    args = parser.parse_args()
    given = dict(item.split("=", 1) for item in args.python)
    if not given or set(given) - set(TIMES):
        parser.error(f"expected --python LIBRARY=PYTHON with one of {', '.join(TIMES)}")
    versions = {n: call(p, "-c", VERSION.format(PACKAGES[n])) for n, p in given.items()}
    pythons = given | {name: sys.executable for name in SETTINGS if name.startswith("ours")}
    # the result names its command, and where an interpreter lies says nothing to a reader
    sys.argv[1:] = [part for name in given for part in ("--python", f"{name}=PYTHON")]
    sys.argv += ["--size", args.size, *(("--part", args.part) if args.part else ())]
    sys.argv += ["--only", *args.only] if args.only else []
    started = time.time()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temp:
        rows = measured(args, pythons, data(args.activations, Path(temp)))
    rows = [one | {"version": versions.get(one["trainer"])} for one in rows]
    write_result("peers", rows, goals, started, merge=bool(args.part or args.only))


if __name__ == "__main__":
    main()
