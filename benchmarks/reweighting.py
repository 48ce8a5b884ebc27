"""Does weighting the input dimensions of the loss find better features? (arXiv 2506.15963)

    python -m benchmarks.reweighting [--size full|smoke] [--part planted|model]

Variance weights with alpha in {-1, -1/2, 0, 1/2, 1}, kurtosis and Frobenius weights (see
sae_core/reweighting.py), each beside its control: the same weights handed to the dimensions in a
random order. A gain counts where it is above 0 *and* above the control's, both paired by seed with
95% Student t intervals. FVU is unweighted everywhere.

planted  results/reweighting.json. TopK as in the paper, with k = s and d_sae = n as its theorems
         ask, and GBA on two settings:
         elhage     the paper's toy: W [20, 200] trained so that ReLU(W'W h) is h, two of 200
                    features a row; features with a norm of at least half the largest count
         default    PlantedConfig(): 128 Gaussian directions in 42 dimensions, three a row
         digon      40 antipodal pairs, randomly rotated
         mixed      20 dimensions of one feature, 10 of a digon, 5 planes of a pentagon, along the
                    axes: the one place where "monosemantic dimension" means something
         rotated    the same, randomly rotated: no dimension is special, no weight should help
         zipf       mixed, with frequencies (rank)^-1 in random order: variances differ widely
model    results/reweighting_model.json. SmolLM2-135M layers.15.out, the tokens of
         benchmarks.sae_quality: FVU, loss recovered, semantic consistency of latents on parts of
         speech and emotions, PW-MCC between seeds. TopK has the same L0 in every arm; GBA's is in
         the table. One permutation serves all seeds, as one set of weights does. Pairs of seeds
         share seeds, so that the interval of PW-MCC is too narrow; with two seeds there is none.

code_error of planted data is E sum_i (h_i |v_i| - a_i)^2 / E sum_i (h_i |v_i|)^2, a_i the
activation, in the units of x, of the latent nearest to feature i: the paper's L_GT for unit
features. spread is the standard deviation of gamma^2 (mean 1): 0 says that a setting gives the
weights nothing to do. The control of the Frobenius weights follows the decoder that it trains
itself, so its spread may differ from theirs: it is a weaker control than the others.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from math import cos, pi, sin, sqrt
from typing import Any

import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from benchmarks.common import Goal, table, write_result
from sae_core.identifiability import max_cosine, pw_mcc
from sae_core.metrics import evaluate
from sae_core.reweighting import WeightConfig
from sae_core.sae import SAE, SAEConfig
from sae_core.synthetic import Planted, PlantedConfig, plant
from sae_core.train import TrainConfig, TrainState, train

ALPHAS = (-1.0, -0.5, 0.5, 1.0)
BASELINE = "plain"
PUBLISHED = ("variance 0.5", "variance 1")
STEPS = {"full": 2000, "reduced": 500}
SEEDS = {"full": 10, "reduced": 4}
BATCH = 512
log = logging.getLogger(__name__)


def arms(permutation: int, refresh: int) -> dict[str, WeightConfig]:
    """Every weighting by name, the control of each under its name and "permuted"."""
    found = {f"variance {a:g}": WeightConfig("variance", alpha=a) for a in ALPHAS}
    found["kurtosis 0.5"] = WeightConfig("kurtosis", alpha=0.5)
    found["frobenius"] = WeightConfig("frobenius", refresh=refresh)
    controls = {
        f"{name} permuted": replace(config, permute=True, seed=permutation)
        for name, config in found.items()
    }
    return {BASELINE: WeightConfig()} | found | controls


# ---- planted data ----


def mixed_dictionary() -> Float[Tensor, "65 40"]:
    """20 axes, 10 digons on an axis each, 5 pentagons on a pair of axes each."""
    v = torch.zeros(65, 40)
    for i in range(20):
        v[i, i] = 1.0
    for i in range(10):
        v[20 + 2 * i, 20 + i], v[21 + 2 * i, 20 + i] = 1.0, -1.0
    corners = torch.tensor([[cos(2 * pi * j / 5), sin(2 * pi * j / 5)] for j in range(5)])
    for i in range(5):
        v[40 + 5 * i : 45 + 5 * i, 30 + 2 * i : 32 + 2 * i] = corners
    return v


def rotation(d: int, seed: int) -> Float[Tensor, "d d"]:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def toy_model(seed: int, steps: int = 1500) -> Planted:
    """The toy of arXiv 2209.10652 without bias: min_W E ||h - ReLU(W'W h)||^2, W [20, 200]."""
    config = PlantedConfig(n=200, d=20, row_sparsity=(2,), coefficients="uniform")
    planted = plant(config, seed)
    w = planted.dictionary.clone().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        h = planted.sample(512, generator).codes.to_dense()
        loss = (h - torch.relu(h @ w @ w.T)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Planted(config, w.detach())


def _mixed(seed: int, *, rotated: bool = False, zipf: float = 0.0) -> Planted:
    config = PlantedConfig(n=65, d=40, row_sparsity=(6,), coefficients="uniform", zipf=zipf)
    v = mixed_dictionary()
    if rotated:
        v = v @ rotation(40, seed)
    if zipf:
        v = v[torch.randperm(65, generator=torch.Generator().manual_seed(seed))]
    return Planted(config, v)


_DIGON = PlantedConfig(
    n=80, d=40, row_sparsity=(6,), dictionary="polygon", coefficients="uniform"
)  # fmt: skip
SETTINGS: dict[str, Callable[[int], Planted]] = {
    "elhage": toy_model,
    "default": lambda seed: plant(PlantedConfig(), seed),
    "digon": lambda seed: plant(_DIGON, seed),
    "mixed": _mixed,
    "rotated": lambda seed: _mixed(seed, rotated=True),
    "zipf": lambda seed: _mixed(seed, zipf=1.0),
}
KINDS = {"topk": tuple(SETTINGS), "gba": ("mixed", "zipf")}


def recovered(planted: Planted, sae: SAE, seed: int) -> dict[str, float]:
    """Recovery of the true features and of their coefficients, on fresh rows."""
    norm = planted.dictionary.norm(dim=1)
    there = norm >= norm.max() / 2
    best, index = max_cosine(planted.dictionary[there], sae.W_dec.detach())
    x, codes = planted.sample(4096, torch.Generator().manual_seed(10_000 + seed))
    found = evaluate(sae, [x])
    _, length = sae.normalise(x)
    acts = (sae.encode(x) * sae.scale.detach() * length)[:, index]
    truth = (codes.to_dense() * norm)[:, there]
    return {
        "n_features": float(there.sum()), "mmc": float(best.double().mean()),
        "frr_0.8": float((best >= 0.8).double().mean()),
        "frr_0.9": float((best >= 0.9).double().mean()),
        "code_error": float((truth - acts).square().sum() / truth.square().sum()),
        "fvu": found.fvu, "l0": found.l0,
    }  # fmt: skip


def fit(sae: SAE, stream: Iterator[Any] | list[Tensor], config: TrainConfig) -> dict[str, float]:
    """Train in place; the spread of the last weights."""
    state = TrainState()
    for _ in train(sae, stream, config, state):
        pass
    squared = torch.ones(1) if state.weights is None else state.weights.squared
    return {"spread": float(squared.std(correction=0))}


def planted_runs(setting: str, kind: str, seed: int, size: str) -> Iterator[dict[str, Any]]:
    """One record for each arm; all arms see the same data and the same initial weights."""
    planted = SETTINGS[setting](seed)
    steps = STEPS[size]
    stream = planted.batches(BATCH, seed)
    data = [next(stream) for _ in range(steps)]
    n, d = planted.dictionary.shape
    shape = SAEConfig(
        d, n, kind=kind, k=planted.config.row_sparsity[0],  # type: ignore[arg-type]
        normalize="none" if kind == "topk" else "token",
    )  # fmt: skip
    for arm, weights in arms(seed, refresh=50).items():
        sae = SAE(shape, generator=torch.Generator().manual_seed(seed))
        config = TrainConfig(
            steps=steps, batch_size=BATCH, lr=3e-3, seed=seed, init_tokens=16384, log_every=100,
            weights=weights,
        )  # fmt: skip
        facts = fit(sae, data, config)
        row = {"setting": setting, "kind": kind, "arm": arm, "seed": seed}
        yield row | recovered(planted, sae, seed) | facts


# ---- a language model ----


@dataclass(frozen=True)
class ModelSize:
    """Size of the language model part."""

    tokens: int
    """Training tokens of a run."""
    seeds: int
    """Runs of each arm."""
    kinds: tuple[str, ...]
    """Kinds of SAE."""
    labelled: str
    """Size of the labelled text."""
    held_out: int
    """Held-out tokens for FVU, L0 and alive latents, in steps of 8,192."""
    loss_tokens: int
    """Held-out tokens for the loss recovered."""


MODEL_SIZES = {
    "full": ModelSize(1_048_576, 3, ("topk", "gba"), "full", 131_072, 16_384),
    "reduced": ModelSize(262_144, 2, ("topk",), "reduced", 65_536, 4_096),
    "smoke": ModelSize(4_096, 2, ("topk",), "reduced", 8_192, 512),
}


def model_runs(size: ModelSize, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One record for each kind, arm and seed; PW-MCC with the earlier seeds of the arm in it.

    The permutation is the same for all seeds, as the true weights are.
    """
    from benchmarks import sae_quality
    from benchmarks.semantics import prepare_labelled, semantic_consistency
    from sae_core.buffer import batches
    from sae_core.download import cache_dir

    data = sae_quality.prepare("full")
    data = replace(data, loss_config=replace(data.loss_config, max_tokens=size.loss_tokens))
    folder = cache_dir() / "benchmarks" / f"semantics-{size.labelled}"
    labelled = prepare_labelled(data.lm, sae_quality.HOOK, size.labelled, folder)
    found = {arm: w for arm, w in arms(0, refresh=25).items() if not only or arm in only}
    for kind, (arm, weights) in ((k, a) for k in size.kinds for a in found.items()):
        directions: list[Tensor] = []
        for seed in range(size.seeds):
            begin = time.perf_counter()
            rate = {"topk": 4e-3, "gba": 8e-3}[kind]
            shape, config = sae_quality.configs(kind, 64, rate, "full")
            steps = size.tokens // config.batch_size
            config = replace(config, steps=steps, seed=seed, weights=weights)
            sae = SAE(shape, generator=torch.Generator().manual_seed(seed))
            facts = fit(sae, batches(data.train, config.batch_size, seed=seed), config)
            held_out = islice(data.held_out.iter_sequential(8192), size.held_out // 8192)
            result = evaluate(sae, held_out)
            row = {"setting": "smollm2", "kind": kind, "arm": arm, "seed": seed}
            row |= {"fvu": result.fvu, "l0": result.l0, "dead_fraction": result.dead_fraction}
            for text in labelled:
                semantic = semantic_consistency(sae, text)
                row |= {text.name: semantic.mean_share, f"{text.name}_excess": semantic.mean_excess}
            row = sae_quality.with_loss(data, row, sae)
            directions.append(sae.W_dec.detach()[torch.from_numpy(result.freq > 0)])
            row["seconds"] = time.perf_counter() - begin
            log.info("%s", row)
            yield row | facts
        pairs = [pw_mcc(a, b) for a, b in combinations(directions, 2)]
        for number, pair in enumerate(pairs):
            yield {"setting": "smollm2", "kind": kind, "arm": arm, "pair": number,
                   "pw_mcc": pair.mean}  # fmt: skip


# ---- means, intervals, goals ----


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95% Student t interval (None for one value)."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    deviation = sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, float(student.ppf(0.975, n - 1)) * deviation / sqrt(n)


def summarise(
    runs: Sequence[dict[str, Any]], measures: Sequence[str], outcome: dict[str, int]
) -> list[dict[str, Any]]:
    """A row for each setting, kind and arm: means, and paired gains of the outcomes.

    Args:
        measures: columns to average over seeds, each with its half width in `_pm`.
        outcome: column -> 1 where more is better, -1 where less is; gains are signed so that
            positive is better: `_gain` over the plain loss, `_over` over the permuted control.
    """
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for run in runs:
        cell = cells.setdefault((run["setting"], run["kind"], run["arm"]), {})
        for name in measures:
            if name in run:
                cell.setdefault(name, []).append(float(run[name]))
    rows = []
    for (setting, kind, arm), cell in cells.items():
        row: dict[str, Any] = {
            "name": f"{setting}-{kind}-{arm}", "setting": setting, "kind": kind, "arm": arm,
        }  # fmt: skip
        for name in measures:
            mean, half = interval(cell[name]) if name in cell else (None, None)
            row |= {name: mean, f"{name}_pm": half}
        for name, sign in outcome.items():
            for suffix, other in (("gain", BASELINE), ("over", f"{arm} permuted")):
                values = cells.get((setting, kind, other), {}).get(name)
                difference = (None, None)
                if values and name in cell and other != arm and len(values) == len(cell[name]):
                    paired = zip(cell[name], values, strict=True)
                    difference = interval([sign * (a - b) for a, b in paired])
                row |= dict(zip((f"{name}_{suffix}", f"{name}_{suffix}_pm"), difference,
                                strict=True))  # fmt: skip
        rows.append(row)
    return rows


def goals(rows: list[dict[str, Any]], outcome: dict[str, int]) -> list[Goal]:
    """The published weights better than the plain loss and than their control, by outcome."""
    found = []
    for row in rows:
        if row["arm"] not in PUBLISHED:
            continue
        for name in outcome:
            gain, over = row[f"{name}_gain"], row[f"{name}_over"]
            if gain is None or over is None:
                continue
            gain_pm, over_pm = row[f"{name}_gain_pm"], row[f"{name}_over_pm"]
            title = f"{name} of {row['arm']} ({row['setting']}, {row['kind']})"
            if gain_pm is None or over_pm is None:
                note = f"gain {gain:.4f}, over its control {over:.4f}; one value, no interval"
                found.append(Goal(title, min(gain, over), "> 0", False, note))
                continue
            low = min(gain - gain_pm, over - over_pm)
            note = f"gain {gain:.4f} ± {gain_pm:.4f}, over its control {over:.4f} ± {over_pm:.4f}"
            found.append(Goal(f"{title}: lower bound", low, "> 0", low > 0, note))
    return found


PLANTED_MEASURES = ("mmc", "frr_0.8", "frr_0.9", "code_error", "fvu", "l0", "spread", "n_features")
PLANTED_OUTCOME = {"mmc": 1, "code_error": -1}
MODEL_MEASURES = (
    "fvu", "loss_recovered", "pos", "pos_excess", "emotion", "emotion_excess", "pw_mcc", "l0",
    "dead_fraction", "spread", "seconds",
)  # fmt: skip
MODEL_OUTCOME = {"pos_excess": 1, "pw_mcc": 1, "loss_recovered": 1}


def main() -> None:
    """Run one part, or both."""
    parser = argparse.ArgumentParser(description="Weights of the input dimensions in the loss.")
    parser.add_argument("--size", choices=("full", "reduced", "smoke"), default="reduced")
    parser.add_argument("--part", choices=("planted", "model", "both"), default="both")
    parser.add_argument(
        "--arms",
        nargs="*",
        default=[],
        help="model: only these, into the last result; gains need plain and the control among them",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.part in ("planted", "both") and args.size != "smoke":
        started, runs = time.time(), []
        for kind, settings in KINDS.items():
            for setting in settings:
                for seed in range(SEEDS[args.size]):
                    runs += planted_runs(setting, kind, seed, args.size)
                log.info("%s %s: %.0f s", kind, setting, time.time() - started)
        rows = summarise(runs, PLANTED_MEASURES, PLANTED_OUTCOME)
        write_result("reweighting", rows, lambda r: goals(r, PLANTED_OUTCOME), started)
    if args.part in ("model", "both"):
        started = time.time()
        runs = list(model_runs(MODEL_SIZES[args.size], args.arms))
        rows = summarise(runs, MODEL_MEASURES, MODEL_OUTCOME)
        if args.size == "smoke":  # shows that everything runs; its numbers mean nothing
            print(table(rows))
            return
        name = "reweighting_model"
        write_result(name, rows, lambda r: goals(r, MODEL_OUTCOME), started, merge=bool(args.arms))


if __name__ == "__main__":
    main()
