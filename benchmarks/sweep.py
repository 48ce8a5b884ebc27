"""What several SAEs on one harvest cost, beside one and beside separate trainings.

    python -m benchmarks.sweep [--tokens 20000] [--rounds 3]

1. Harvest: seconds, of the wall and of the processor, of storing `layers.15.out` alone and of
   storing three hook points in one pass that ends there, in turns.
2. Sweep: seconds of one `sae-apps sweep` of four SAEs on two hook points and of four `sae-apps
   train`, in turns, on a quarter of the tokens.
3. Reading: seconds to gather one batch of stored activations, which every SAE of a sweep does for
   itself, beside one step of training.

Goals: storing three hook points takes at most 1.1 times as long as the deepest alone; the sweep
takes less time than the four trainings.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import Goal, write_result
from sae_apps.tasks.main import main as sae_apps
from sae_core.buffer import batches
from sae_core.harvest import harvest_each
from sae_core.models import load_model
from sae_core.sae import SAE, SAEConfig
from sae_core.shards import ShardedActivations
from sae_core.state import TrainConfig
from sae_core.tokens import HarvestConfig
from sae_core.train import train

HOOKS = ("layers.6.out", "layers.10.out", "layers.15.out")
DEEPEST = HOOKS[-1]
KINDS, WIDTH, SIZE = ("gba", "topk"), 4608, 1024
TURNS = 1  # of the second part, which is long and far from its bound
READS = 20
Seconds = tuple[float, float]


def main() -> None:
    """Run the parts and write results/sweep.json."""
    parser = argparse.ArgumentParser(description="Several SAEs on one harvest.")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    started = time.time()
    root = Path(tempfile.mkdtemp(prefix="sweep-"))
    try:
        rows = harvest_rows(root, args.tokens, args.rounds)
        rows += reading_rows(root / "kept")
        rows += sweep_rows(root, args.tokens // 4)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    write_result("sweep", rows, goals, started)


def _timed(work: Callable[[], object]) -> Seconds:
    """Seconds of the wall and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _row(name: str, found: list[Seconds], floor: list[Seconds] | None = None) -> dict[str, Any]:
    wall, cpu = ([one[i] for one in found] for i in (0, 1))
    ratios = [a[0] / b[0] for a, b in zip(found, floor or found, strict=True)]
    return {
        "name": name, "turns": len(found), "wall_s": median(wall), "wall_low": min(wall),
        "wall_high": max(wall), "cpu_s": median(cpu), "times": median(ratios),
    }  # fmt: skip


def harvest_rows(root: Path, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """The deepest hook point alone and three in one pass, in turns; keeps the last three."""
    from sae_apps.tasks.text import open_text

    lm, rows = load_model("smollm2-135m", dtype=torch.bfloat16), open_text("demo")
    config = HarvestConfig(max_tokens=tokens)

    def harvest(names: tuple[str, ...]) -> Seconds:
        shutil.rmtree(root / "kept", ignore_errors=True)
        folders = {name: root / "kept" / name for name in names}
        return _timed(lambda: harvest_each(lm, rows, folders, config, dtype="bfloat16"))

    one, three = [], []
    for _ in range(rounds):
        one.append(harvest((DEEPEST,)))
        three.append(harvest(HOOKS))
    return [_row("harvest of one hook point", one), _row("harvest of three", three, one)]


def reading_rows(folder: Path) -> list[dict[str, Any]]:
    """Batches of stored activations, and steps of training on them."""
    stored = ShardedActivations.open(folder / DEEPEST, DEEPEST)
    source = batches(stored, SIZE, seed=0)
    next(source)
    read = [_timed(lambda: next(source)) for _ in range(READS)]
    x = next(source).x
    sae = SAE(SAEConfig(stored.d_in, WIDTH), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(steps=READS + 2, log_every=1, init_tokens=SIZE)
    records = train(sae, (x for _ in range(10 * READS)), config)
    next(records)
    step = [_timed(lambda: next(records)) for _ in range(READS)]
    return [_row("training step of gba", step), _row("reading its batch", read, step)]


def sweep_rows(root: Path, tokens: int) -> list[dict[str, Any]]:
    """Four SAEs by one sweep and by four trainings."""
    shared = ["--tokens", str(tokens), "--dtype", "bfloat16", "--eval-tokens", "2k", "--quiet"]
    shared += ["--loss-tokens", "1k", "--train.gba.calibrate_tokens", "16384"]

    def command(*argv: str) -> None:
        with redirect_stdout(StringIO()):
            if code := sae_apps([*argv, *shared]):
                raise RuntimeError(f"{argv} ended with {code}")

    def trainings() -> None:
        for hook in HOOKS[1:]:
            for kind in KINDS:
                out = str(root / "alone" / f"{hook}-{kind}")
                command("train", "--hook", hook, "--kind", kind, "--out", out)

    def sweep() -> None:
        command("sweep", "--hooks", *HOOKS[1:], "--kinds", *KINDS, "--out", str(root / "sweep"))

    alone, together = [], []
    for _ in range(TURNS):
        for work, found in ((sweep, together), (trainings, alone)):
            found.append(_timed(work))
        shutil.rmtree(root / "alone")
        shutil.rmtree(root / "sweep")
    return [_row("four trainings", alone), _row("sweep of the four", together, alone)]


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """What one harvest for all promises."""
    times = {row["name"]: row["times"] for row in rows}
    three, four = times["harvest of three"], times["sweep of the four"]
    return [
        Goal("harvest of the sweep / harvest of one run at the deepest hook", three, "<= 1.1",
             three <= 1.1),
        Goal("sweep of four SAEs / four trainings", four, "< 1", four < 1),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
