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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import table, write_result
from benchmarks.reweighting_data import SETTINGS
from benchmarks.reweighting_sums import BASELINE, goals, summarise
from sae_core.identifiability import max_cosine, pw_mcc
from sae_core.metrics import evaluate
from sae_core.reweighting import WeightConfig
from sae_core.sae import SAE, SAEConfig
from sae_core.synthetic import Planted
from sae_core.train import TrainConfig, TrainState, train

ALPHAS = (-1.0, -0.5, 0.5, 1.0)
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
    from benchmarks.semantics import semantic_consistency
    from benchmarks.semantics_data import prepare_labelled
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


# ---- command ----


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
