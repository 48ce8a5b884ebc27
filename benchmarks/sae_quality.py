"""Quality of every kind of SAE on the same SmolLM2 activations, at matched L0.

    python -m benchmarks.sae_quality [--size full] [--ablation]

Demo text through SmolLM2-135M, residual stream behind block 15. Every kind sees the same tokens
in the same order (each token about once), the same input normalisation, the same schedule. The
learning rate of each kind is searched at L0 = 64 by the training FVU of the last steps; the best
is used at 32 and 128. All numbers in the table are measured on held-out rows.

`--ablation` runs the choices behind GBA's defaults instead (start, floor, centre, gate, tying,
target frequencies, period) and writes results/gba_ablation.json.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log as ln
from typing import Any

import torch

from benchmarks.common import Goal, write_result
from sae_apps.tasks.text import open_text
from sae_core.buffer import batches
from sae_core.download import cache_dir
from sae_core.gba import GBAConfig, group_frequencies, paper_main, paper_recommended
from sae_core.harvest import harvest_shards
from sae_core.metrics import evaluate, loss_recovered
from sae_core.models import LanguageModel, load_model
from sae_core.sae import SAE, SAEConfig
from sae_core.shards import ShardedActivations
from sae_core.text import TextSource, split_rows
from sae_core.tokens import HarvestConfig
from sae_core.train import TrainConfig, TrainState, train

HOOK = "layers.15.out"
D_SAE = 4608
BATCH = 1024
KINDS = ("gba", "topk", "batch_topk", "jumprelu", "relu")
RATES = {"full": (2e-3, 4e-3, 8e-3), "reduced": (4e-3, 8e-3)}
L1_RATES = {"full": (5e-4, 1e-3, 2e-3), "reduced": (1e-3, 2e-3)}  # higher ones kill its latents
TOKENS = {"full": 1_048_576, "reduced": 262_144}
HELD_OUT = {"full": 131_072, "reduced": 65_536}
LOSS_TOKENS = {"full": 16_384, "reduced": 4_096}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """What every run of the suite shares."""

    lm: LanguageModel
    train: ShardedActivations
    held_out: ShardedActivations
    loss_rows: TextSource
    loss_config: HarvestConfig
    mean: torch.Tensor


def prepare(size: str) -> Data:
    """Harvest once into the cache folder; later runs of the suite read it from there."""
    lm = load_model("smollm2-135m", dtype=torch.bfloat16)
    rows, held_out = split_rows(open_text("demo"), 0.1, 0)
    folder = cache_dir() / "benchmarks" / f"sae_quality-{size}"
    # calibration reads on after the last step, hence the extra tokens
    config = HarvestConfig(max_tokens=TOKENS[size] + 131_072)
    shards = harvest_shards(lm, rows, [HOOK], folder / "train", config, dtype="bfloat16")
    config = HarvestConfig(max_tokens=HELD_OUT[size])
    held = harvest_shards(lm, held_out, [HOOK], folder / "held_out", config, dtype="bfloat16")
    total, n = torch.zeros(lm.d_model, dtype=torch.float64), 0
    for batch in held[HOOK].iter_sequential(8192):
        total, n = total + batch.x.double().sum(0), n + len(batch)
    loss_config = HarvestConfig(max_tokens=LOSS_TOKENS[size])
    return Data(lm, shards[HOOK], held[HOOK], held_out, loss_config, total / n)


def run(
    data: Data, sae_config: SAEConfig, config: TrainConfig, name: str
) -> tuple[dict[str, Any], SAE]:
    """Train one SAE and measure it on the held-out rows."""
    begin = time.perf_counter()
    sae = SAE(sae_config, generator=torch.Generator().manual_seed(config.seed))
    state = TrainState()
    stream = batches(data.train, config.batch_size, seed=config.seed)
    records = list(train(sae, stream, config, state))
    seconds = time.perf_counter() - begin
    result = evaluate(sae, data.held_out.iter_sequential(8192))
    over = worst = None
    if sae_config.kind == "gba":
        freq = torch.from_numpy(result.freq)
        groups = group_frequencies(freq, state.group, state.taf)
        over = sum(group.n_above for group in groups)
        worst = float((freq / state.taf[state.group]).max())
    row = {
        "name": name, "kind": sae_config.kind, "k": sae_config.k,
        "lr": config.lr, "train_fvu": sum(r.fvu for r in records[-5:]) / len(records[-5:]),
        "l0": result.l0, "fvu": result.fvu, "fvu_raw": result.fvu_raw,
        "loss_recovered": None, "dead_fraction": result.dead_fraction,
        "latents_above_1.1_ceiling": over, "worst_over_ceiling": worst, "seconds": seconds,
    }  # fmt: skip
    log.info("%s", row)
    return row, sae


def with_loss(data: Data, row: dict[str, Any], sae: SAE) -> dict[str, Any]:
    """The row with the cross-entropy recovered against mean-ablation."""
    mean = data.mean.float()
    found = loss_recovered(data.lm, sae, data.loss_rows, HOOK, data.loss_config, mean=mean)
    return row | {"loss_recovered": found.recovered_mean}


def configs(kind: str, l0: int, lr: float, size: str) -> tuple[SAEConfig, TrainConfig]:
    """Shape and schedule of one cell of the table."""
    sae = SAEConfig(576, D_SAE, kind=kind, k=l0)  # type: ignore[arg-type]
    config = TrainConfig(
        steps=TOKENS[size] // BATCH, batch_size=BATCH, lr=lr, precision="bfloat16",
    )  # fmt: skip
    return sae, config


def table_rows(data: Data, size: str, kinds: list[str]) -> Iterator[dict[str, Any]]:
    """Search the rate at 64, then the other two L0 at the best rate."""
    for kind in kinds:
        rates = (L1_RATES if kind == "relu" else RATES)[size]
        found = [run(data, *configs(kind, 64, lr, size), f"{kind}-64-lr{lr:g}") for lr in rates]
        best = min(range(len(found)), key=lambda i: found[i][0]["train_fvu"])  # noqa: B023
        yield from (row for i, (row, _) in enumerate(found) if i != best)
        yield with_loss(data, *found[best])
        lr = found[best][0]["lr"]
        for l0 in (32, 128):
            yield with_loss(data, *run(data, *configs(kind, l0, lr, size), f"{kind}-{l0}"))


def frontier(rows: list[dict[str, Any]], kind: str, l0: float) -> float:
    """FVU of a kind at this L0, linear in log L0 between (or beyond) its measured points."""
    points = sorted((row["l0"], row["fvu"]) for row in rows if row["kind"] == kind)
    pairs = list(zip(points, points[1:], strict=False))
    (x0, y0), (x1, y1) = next((p for p in pairs if l0 <= p[1][0]), pairs[-1])
    return y0 + (y1 - y0) * (ln(l0) - ln(x0)) / (ln(x1) - ln(x0))


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """GBA against the TopK frontier, alive latents, ceilings; at each kind's best rate."""
    rows = [row for row in rows if row["loss_recovered"] is not None]
    found = []
    for row in (r for r in rows if r["kind"] == "gba"):
        bar = frontier(rows, "topk", row["l0"])
        excess = row["fvu"] / bar - 1
        found.append(
            Goal(f"FVU of {row['name']} over the TopK frontier at L0 {row['l0']:.1f}", excess,
                 "<= 0", excess <= 0, f"TopK there: {bar:.4f}")
        )  # fmt: skip
        alive = 1 - row["dead_fraction"]
        found.append(Goal(f"alive latents of {row['name']}", alive, ">= 0.95", alive >= 0.95))
        over, worst = row["latents_above_1.1_ceiling"], row["worst_over_ceiling"]
        found.append(
            Goal(f"largest frequency / ceiling of {row['name']}", worst, "<= 1.1", worst <= 1.1,
                 f"{over} of {D_SAE} latents above 1.1 times their ceiling")
        )  # fmt: skip
    return found


def ablation(data: Data, size: str, only: list[str]) -> Iterator[dict[str, Any]]:
    """One choice changed at a time, at the default learning rate; `only` some of them.

    The changes start from given targets (ten groups, ratio 10, summing to k), one step behind the
    default, which takes them from the data.
    """
    base = GBAConfig(targets="fixed", ratio=10.0)
    wide = {"htf": 0.1, "ltf": 0.001}
    variants = {
        "default": (GBAConfig(), {}),
        "default, published rule": (GBAConfig(rule="published"), {}),
        "given targets": (base, {}),
        "published start b=0": (replace(base, start="zero"), {}),
        "published rule": (replace(base, rule="published"), {}),
        "published rule, published frequencies": (replace(base, rule="published", **wide), {}),
        "frozen b_dec": (replace(base, centre="mean"), {}),
        "biases at most 0": (replace(base, b_max=0.0), {}),
        "relu gate": (replace(base, centre="learned"), {"gate": "relu"}),
        "relu gate, frozen b_dec": (base, {"gate": "relu"}),
        "tied": (base, {"tied": True}),
        "period 10": (replace(base, period=10), {}),
        "gamma 0.01": (replace(base, gamma=0.01), {}),
        "gamma 0.1": (replace(base, gamma=0.1), {}),
        "ratio 100": (replace(base, ratio=100.0), {}),
        "one group": (replace(base, n_groups=1), {}),
        "no calibration": (replace(base, calibrate_tokens=0), {}),
        "preset paper_main": (paper_main(), {"tied": True}),
        "preset paper_recommended": (paper_recommended(), {"tied": True}),
        "preset paper_main, lr 0.001": (paper_main(), {"tied": True}, 1e-3),
        "preset paper_recommended, lr 0.001": (paper_recommended(), {"tied": True}, 1e-3),
    }
    for name, (gba, shape, *lr) in variants.items():
        if only and name not in only:
            continue
        sae, config = configs("gba", 64, 1e-3, size)
        config = replace(config, lr=lr[0] if lr else None, gba=gba)
        yield run(data, replace(sae, **shape), config, name)[0]


def main() -> None:
    """Run the table or the ablation."""
    parser = argparse.ArgumentParser(description="Quality of every kind of SAE.")
    parser.add_argument("--size", choices=TOKENS, default="reduced")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=[], help="as --only, by kind")
    parser.add_argument(
        "--only", nargs="*", default=[], help="variants to put into the last result"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.time()
    data = prepare(args.size)
    if args.ablation:
        found = list(ablation(data, args.size, args.only))
        write_result("gba_ablation", found, lambda _: [], started, merge=bool(args.only))
        return
    rows = list(table_rows(data, args.size, args.kinds or list(KINDS)))
    write_result("sae_quality", rows, goals, started, merge=bool(args.kinds))


if __name__ == "__main__":
    main()
