"""How far two runs agree, beside chance, with intervals over seeds.

For each pair of seeds, on decoder directions of the latents alive in each run, with signed cosines:

    pw_mcc    mean cosine of the best one-to-one matching (arXiv 2505.20254)
    mean_mcs  mean of MCS_m = max_m' cos(w_m, w'_m'), both directions
    mcs_.9    share of latents with MCS > .9; top03_ and top005_ of the 0.3% and 0.05% with the
              largest activation on the held-out tokens (14 and 3 of 4,608)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from sae_core.identifiability import max_cosine, mcs_shares, pw_mcc, top_fraction

THRESHOLDS = (0.6, 0.7, 0.8, 0.9)
CURVE = tuple(round(0.05 * step, 2) for step in range(21))
SUBSETS = {"": 1.0, "top03_": 0.003, "top005_": 0.0005}


@dataclass(frozen=True, eq=False)
class Run:
    """A trained SAE as the comparison sees it."""

    seed: int
    """Of the weights and the batch order."""
    directions: Float[Tensor, "n_alive d_in"]
    """Decoder rows of the latents active on the held-out tokens."""
    peak: Float[Tensor, "n_alive"]
    """Largest activation of each on the held-out tokens."""
    d_sae: int
    """Latents, dead ones counted."""
    measures: dict[str, float]
    """Flat numbers of this run alone: FVU, L0, dead fraction, semantic consistency."""


def compared(a: Run, b: Run) -> dict[str, float]:
    """Agreement of two runs; MCS in both directions, the shares averaged over the two."""
    match = pw_mcc(a.directions, b.directions)
    found = {"pw_mcc": match.mean, "pw_mcc_gap": match.gap}
    scores = both_mcs(a, b)
    found["mean_mcs"] = float(np.mean([float(mcs.mean()) for mcs in scores]))
    for subset, fraction in SUBSETS.items():
        by_side = [
            mcs_shares(mcs[strongest(run, fraction)], THRESHOLDS)
            for mcs, run in zip(scores, (a, b), strict=True)
        ]
        for threshold in THRESHOLDS:
            shares = [side[threshold] for side in by_side]
            found[f"{subset}mcs_{threshold:g}".replace("0.", ".")] = float(np.mean(shares))
    return found


def both_mcs(a: Run, b: Run) -> tuple[Tensor, Tensor]:
    """MCS of the latents of a against b, and of b against a."""
    return (
        max_cosine(a.directions, b.directions)[0],
        max_cosine(b.directions, a.directions)[0],
    )


def strongest(run: Run, fraction: float) -> Tensor:
    """Mask of the largest peaks among the alive: the fraction is of all latents, as published."""
    return top_fraction(run.peak, min(1.0, fraction * run.d_sae / len(run.peak)))


def random_pair(a: Run, b: Run, *, matched: bool, seed: int = 0) -> tuple[Run, Run]:
    """Random directions in place of two runs: as many, and as wide.

    Args:
        matched: Gaussian with the second moments of both dictionaries; else uniform on the sphere.
    """
    rows = torch.cat([a.directions, b.directions]).double()
    root = torch.eye(rows.shape[1], dtype=torch.float64)
    if matched:
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        root = vectors * values.clamp_min(0).sqrt()
    generator = torch.Generator().manual_seed(seed)

    def drawn(run: Run) -> Run:
        noise = torch.randn(run.directions.shape, generator=generator, dtype=torch.float64)
        return replace(run, directions=(noise @ root.T).float())

    return drawn(a), drawn(b)


def curve(pairs: Sequence[tuple[Run, Run]], fraction: float) -> list[tuple[float, float, float]]:
    """(mean, least, largest) share of latents with MCS above each of CURVE, over all directions."""
    sides = [
        mcs_shares(mcs[strongest(run, fraction)], CURVE)
        for pair in pairs
        for mcs, run in zip(both_mcs(*pair), pair, strict=True)
    ]
    values = np.array([[side[t] for t in CURVE] for side in sides])
    return list(
        zip(
            values.mean(0).tolist(),
            values.min(0).tolist(),
            values.max(0).tolist(),
            strict=True,
        )
    )


def jackknife(
    n_seeds: int, estimate: Callable[[tuple[int, ...]], float]
) -> tuple[float, float | None, float | None]:
    """(estimate from all seeds, low, high): 95% t interval, leaving out one seed at a time.

        var = (n - 1) / n * sum_i (theta_(-i) - mean)^2,   n - 1 degrees of freedom

    Args:
        estimate: of the seeds at these places, e.g. the mean over their pairs; three are needed
            for an interval, since a pair is all that is left of three.
    """
    everyone = tuple(range(n_seeds))
    value = estimate(everyone)
    if n_seeds < 3:
        return value, None, None
    without = np.array([estimate(tuple(j for j in everyone if j != i)) for i in everyone])
    variance = (n_seeds - 1) / n_seeds * ((without - without.mean()) ** 2).sum()
    half = float(student.ppf(0.975, n_seeds - 1) * np.sqrt(variance))
    return value, value - half, value + half
