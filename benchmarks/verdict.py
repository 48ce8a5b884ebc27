"""Does the verdict on a latent predict whether the latent is a planted feature?

    python -m benchmarks.verdict [--size full] [--calibrate]

Planted data X = H V under many settings, some inside the theory's conditions, many outside; on each
an SAE is trained with two seeds, and `sae_core.verdict` scores the latents of the first from data
and dictionaries alone. A latent is *recovered* where its cosine with some true feature is >= 0.9.
The weights of the rule were fitted on the `CALIBRATION` settings (`--calibrate` fits them again and
prints them); everything reported is measured on the `SETTINGS`, none of which is among those.
`full` trains twice as long and measures twice the tokens.

The seed of an SAE's start must not be that of the planted dictionary: both are the first normal
numbers of their generator, and the start would contain the truth.
"""

import argparse
import logging
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import rankdata

from benchmarks.common import Goal, write_result
from sae_core.conditions import Conditions, measure_conditions
from sae_core.gba import GBAConfig
from sae_core.identifiability import consistency, feature_recovery_rate, max_cosine
from sae_core.sae import SAE, Kind, SAEConfig
from sae_core.synthetic import PlantedConfig, plant
from sae_core.theory import n_features
from sae_core.train import TrainConfig, train
from sae_core.verdict import MIN_FIRINGS, UNRELIABLE, terms, verdict

log = logging.getLogger(__name__)
COSINE = 0.9  # from which a latent counts as recovered
BATCH = 512
PLANT_SEED, SEEDS = 0, (1, 2)
TOKENS = {"reduced": 16_384, "full": 32_768}
LONGER = {"reduced": 1, "full": 2}


@dataclass(frozen=True)
class Setting:
    """Planted data and the SAE trained on them."""

    planted: PlantedConfig
    """Data."""
    kind: Kind = "gba"
    """Kind of SAE."""
    k: int = 8
    """Active latents a token, for the kinds that have it."""
    targets: tuple[float, float] = (0.1, 0.001)
    """gba: highest and lowest target frequency."""
    steps: int = 1500
    """Training steps of 512 tokens in the reduced size."""
    d_sae: int = 512
    """Latents."""


def planted(s: int | tuple[int, ...], **kwargs: Any) -> PlantedConfig:
    """Planted data of row sparsity s; n=128, d=42 unless given."""
    return PlantedConfig(row_sparsity=s if isinstance(s, tuple) else (s,), **kwargs)


CALIBRATION = {
    "mixture": Setting(planted((3, 20)), steps=2000),
    "mixture, topk 20": Setting(planted((3, 20)), "topk", 20),
    "mixture, jumprelu 10": Setting(planted((3, 20)), "jumprelu", 10),
    "mixture, targets .5-.2": Setting(planted((3, 20)), targets=(0.5, 0.2), steps=1000),
    "s=3, topk 3": Setting(planted(3), "topk", 3, steps=1000),
    "s=5, pairs .5": Setting(planted(5, structure="pairs", strength=0.5)),
    "s=5, zipf 1, topk 8": Setting(planted(5, zipf=1.0), "topk", 8, steps=1000),
    "s=3, n=64, d=16": Setting(planted(3, n=64, d=16), d_sae=256),
    "s=5, noise .1": Setting(planted(5, noise=0.1)),
    "s=4, hierarchy .9": Setting(planted(4, structure="hierarchy", strength=0.9)),
}
SETTINGS = {
    "s=3": Setting(planted(3)),
    "s=8": Setting(planted(8)),
    "s=14": Setting(planted(14)),
    "s=5, targets .3-.1": Setting(planted(5), targets=(0.3, 0.1), steps=1000),
    "s=5, targets .004-.001": Setting(planted(5), targets=(0.004, 0.001)),
    "s=5, zipf 1": Setting(planted(5, zipf=1.0)),
    "s=5, zipf .5": Setting(planted(5, zipf=0.5)),
    "s=5, pairs .9": Setting(planted(5, structure="pairs", strength=0.9)),
    "s=5, pairs 1, topk 6": Setting(
        planted(5, structure="pairs", strength=1.0), "topk", 6, steps=1000
    ),
    "s=4, topics .9": Setting(planted(4, structure="topics", strength=0.9)),
    "s=5, hierarchy 1, topk 5": Setting(
        planted(5, structure="hierarchy", strength=1.0), "topk", 5, steps=1000
    ),
    "s=5, hierarchy .5": Setting(planted(5, structure="hierarchy", strength=0.5)),
    "s=3, d=16": Setting(planted(3, d=16)),
    "s=5, d=24": Setting(planted(5, d=24)),
    "s=8, d=64": Setting(planted(8, d=64)),
    "s=3, noise .3": Setting(planted(3, noise=0.3)),
    "s=8, noise .05, topk 8": Setting(planted(8, noise=0.05), "topk", 8, steps=1000),
    "s=5, exponential": Setting(planted(5, coefficients="exponential")),
    "s=5, exponential, topk 10": Setting(
        planted(5, coefficients="exponential"), "topk", 10, steps=1000
    ),
    "s=8, uniform, batch_topk 8": Setting(
        planted(8, coefficients="uniform"), "batch_topk", 8, steps=1000
    ),
    "s=5, topk 20": Setting(planted(5), "topk", 20, steps=1000),
    "s=8, relu 12": Setting(planted(8), "relu", 12),
    "s=5, jumprelu 6": Setting(planted(5), "jumprelu", 6),
    "s=5, 128 latents": Setting(planted(5), d_sae=128),
    "s=6, 1024 latents, topk 6": Setting(planted(6), "topk", 6, steps=800, d_sae=1024),
    "mixture, 500 steps": Setting(planted((3, 20)), steps=500),
}


@dataclass(frozen=True)
class Outcome:
    """One trained setting with the truth beside what the verdict may see."""

    conditions: Conditions
    """Measured on fresh tokens."""
    consistency: torch.Tensor
    """With the SAE of the second seed, [d_sae]."""
    best: np.ndarray
    """Largest cosine of each latent with a true feature."""
    frequency: np.ndarray
    """True frequency of that feature."""
    frr: float
    """Feature recovery rate at 0.9."""
    n: int
    """True features."""

    @property
    def is_recovered(self) -> np.ndarray:
        return self.best >= COSINE


def fit(setting: Setting, size: str, seed: int) -> SAE:
    """Train on planted data."""
    data = setting.planted
    config = SAEConfig(data.d, setting.d_sae, kind=setting.kind, k=setting.k)
    sae = SAE(config, generator=torch.Generator().manual_seed(seed))
    htf, ltf = setting.targets
    gba = GBAConfig(htf=htf, ltf=ltf, rule="published", centre="mean", calibrate_tokens=0)
    steps = LONGER[size] * setting.steps
    rate = 1e-3 if setting.kind == "relu" else 3e-3
    how = TrainConfig(steps=steps, batch_size=BATCH, lr=rate, log_every=steps, gba=gba)
    for _ in train(sae, plant(data, PLANT_SEED).batches(BATCH, 100 + seed), how):
        pass
    return sae


def outcome(setting: Setting, size: str) -> Outcome:
    """Train two seeds and measure the first."""
    data = plant(setting.planted, PLANT_SEED)
    first, second = (fit(setting, size, seed) for seed in SEEDS)
    n_batches = TOKENS[size] // 4096
    found = measure_conditions(first, islice(data.batches(4096, 999), n_batches))
    other = measure_conditions(second, islice(data.batches(4096, 999), n_batches))
    pair = [first.W_dec.detach(), second.W_dec.detach()]
    best, feature = max_cosine(pair[0], data.dictionary)
    codes = data.sample(TOKENS[size], torch.Generator().manual_seed(5)).codes
    frequency = torch.bincount(codes.col, minlength=setting.planted.n) / codes.n
    return Outcome(
        found,
        consistency(pair, [found.is_alive, other.is_alive]),
        best.numpy(),
        frequency[feature].numpy(),
        feature_recovery_rate(pair[0], data.dictionary, COSINE),
        setting.planted.n,
    )


def roc_auc(score: np.ndarray, is_positive: np.ndarray) -> float | None:
    """Probability that a positive scores above a negative, ties half; None without both."""
    n_positive, n_negative = int(is_positive.sum()), int((~is_positive).sum())
    if not n_positive or not n_negative:
        return None
    rank = rankdata(score)[is_positive].sum()
    return float((rank - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def row(name: str, found: list[Outcome]) -> dict[str, Any]:
    """One setting, or several pooled, as a flat record; None where nothing is to be divided."""
    real = np.concatenate([o.is_recovered for o in found])
    best = np.concatenate([o.best for o in found])
    result: dict[str, Any] = {
        "name": name,
        "l0": sum(o.conditions.l0 for o in found) / len(found),
        "latents": len(real),
        "recovered_frac": float(real.mean()),
        "frr": sum(o.frr * o.n for o in found) / sum(o.n for o in found),
    }
    for runs in ("one", "two"):
        given = [verdict(o.conditions, o.consistency if runs == "two" else None) for o in found]
        score = np.concatenate([v.score.numpy() for v in given])
        sure = np.concatenate([v.flag.numpy() for v in given]) == 2
        n = int(sure.sum())
        result |= {
            f"auc_{runs}": roc_auc(score, real),
            f"predicted_frac_{runs}": float(score.mean()),
            f"predicted_frr_{runs}": sum(v.n_features for v in given) / sum(o.n for o in found),
            f"reliable_{runs}": n,
            f"reliable_right_{runs}": float(real[sure].mean()) if n else None,
            f"reliable_above_.8_{runs}": float((best[sure] >= 0.8).mean()) if n else None,
            f"unreliable_wrong_{runs}": float(real[score < UNRELIABLE].mean()),
        }
    seen = [o.is_recovered & o.conditions.has_band.numpy() for o in found]
    ratio = np.concatenate(
        [
            o.conditions.band_freq.numpy()[m] / o.frequency[m]
            for o, m in zip(found, seen, strict=True)
        ]
    )
    result["band_freq_over_true"] = float(np.median(ratio)) if len(ratio) else None
    estimated = sum(n_features(o.conditions) for o in found)
    result["n_estimated_over_true"] = estimated / sum(o.n for o in found)
    return result


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """AUC pooled and by setting, and the order of the settings, for one run and for two."""
    whole, single = rows[-1], rows[:-1]
    found = []
    for runs in ("one", "two"):
        note = f"{len(single)} settings, {whole['latents']} latents, verdict from {runs} run(s)"
        areas = [r[f"auc_{runs}"] for r in single if r[f"auc_{runs}"] is not None]
        predicted, real = ([r[key] for r in single] for key in (f"predicted_frr_{runs}", "frr"))
        order = float(np.corrcoef(rankdata(predicted), rankdata(real))[0, 1])
        right = whole[f"reliable_right_{runs}"]
        both = f"{len(areas)} settings with recovered and unrecovered latents"
        for name, value, bound, text in (
            ("AUC over latents of all settings", whole[f"auc_{runs}"], 0.9, note),
            ("median AUC of a setting", float(np.median(areas)), 0.9, both),
            ("smallest AUC of a setting", min(areas), 0.8, both),
            ("rank correlation of predicted and true recovery", order, 0.8, note),
            ("reliable latents that are recovered", right, 0.9,
             f"{whole[f'reliable_{runs}']} reliable latents"),
        ):  # fmt: skip
            found.append(Goal(f"{name}, {runs}", value, f">= {bound}", value >= bound, text))
    return found


def calibrate(found: list[Outcome]) -> None:
    """Print the weights of `sae_core.verdict`: penalised logistic regressions on these outcomes."""
    enough = [(o.conditions.count >= MIN_FIRINGS).numpy() for o in found]
    x = np.concatenate(
        [terms(o.conditions, o.consistency).numpy()[m] for o, m in zip(found, enough, strict=True)]
    )
    y = np.concatenate([o.is_recovered[m] for o, m in zip(found, enough, strict=True)])
    for name, used in (("ONE_RUN", [0, 1, 2]), ("SEVERAL_RUNS", [0, 2, 3])):
        a = np.column_stack((x[:, used], np.ones(len(x))))

        def loss(w: np.ndarray, a: np.ndarray = a) -> float:
            z = a @ w
            return float((np.logaddexp(0, z) - y * z).mean() + 1e-4 * (w[:-1] ** 2).sum())

        weights = minimize(loss, np.zeros(a.shape[1])).x
        print(name, "terms", used, "weights", weights[:-1].round(2), "intercept", weights[-1:])
    print("TYPICAL", x[y].mean(axis=0).round(2))


def main() -> None:
    """Run the settings and write the result, or calibrate."""
    parser = argparse.ArgumentParser(description="Verdict against planted truth.")
    parser.add_argument("--size", choices=TOKENS, default="reduced")
    parser.add_argument("--calibrate", action="store_true", help="print the rule's weights")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.time()
    found: dict[str, Outcome] = {}
    for name, setting in (CALIBRATION if args.calibrate else SETTINGS).items():
        found[name] = outcome(setting, args.size)
        log.info("%s", row(name, [found[name]]))
    if args.calibrate:
        calibrate(list(found.values()))
        return
    rows = [row(name, [o]) for name, o in found.items()] + [row("pooled", list(found.values()))]
    write_result("verdict", rows, goals, started)


if __name__ == "__main__":
    main()
