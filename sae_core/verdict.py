"""Which latents stand for a feature of the data: a score, a flag and a reason for each.

    score = sigmoid(a0 + a1 ln(kurtosis / 3) + a2 L(alignment) + a3 excess + a4 L(consistency))
    L(c)  = -ln(1 - c), cosines near 1 spread out; c is taken to be at most 0.999

Each term belongs to a condition of arXiv 2506.14002, Definition 5.2: a sparse feature of a size
bounded away from 0 makes its projection heavy-tailed (H1, H2; kurtosis, 3 for a Gaussian); in an
incoherent dictionary the tokens that it fires on share nothing but its direction (V1; alignment);
features rarely occur together (H3; excess co-occurrence). Consistency is the mean over other seeds
of the largest cosine with their latents. The rule and its weights are this project's own, a
logistic regression of "best cosine with a true feature >= 0.9" on the calibration settings of
benchmarks/verdict.py, which measures it on others. There is no such measurement on language
models: no truth is known for them, and there the verdict is supposed to carry over, no more.

What it cannot see: features that nearly always occur together. Their sum is then itself a sparse
direction which every seed finds, and is called reliable: of 755 reliable latents on 26 planted
settings 79% were recovered, and of those outside "pairs" and "hierarchy" 99% (600 of 606).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_core.conditions import Conditions
from sae_core.errors import UserError

MIN_FIRINGS = 10  # below, alignment and excess are noise
RELIABLE, UNRELIABLE = 0.8, 0.2  # scores from which and below which
FLAGS = ("unreliable", "doubtful", "reliable")
TERMS = ("tail", "alignment", "excess", "consistency")
CAUSES = (
    "no condition speaks against it",
    "its direction is not heavy-tailed in the data: no sparse feature of a clear size (H1, H2)",
    "the tokens that it fires on share more than its direction (V1)",
    "it fires together with another latent (H3)",
    "other seeds agree on it less than on features",
    "it fires too rarely to tell",
)
RARE = len(CAUSES) - 1


@dataclass(frozen=True)
class Rule:
    """Weights of the score."""

    weight: tuple[float, float, float, float]
    """Of tail, alignment, excess and consistency; 0 leaves a term out."""
    intercept: float
    """a0."""


# python -m benchmarks.verdict --calibrate prints these; alignment added nothing beside consistency.
ONE_RUN = Rule((10.99, 0.38, -2.74, 0.0), -3.45)
SEVERAL_RUNS = Rule((6.29, 0.0, -2.87, 0.86), -3.52)
# Means over the recovered latents of the calibration settings: reasons compare with these.
TYPICAL = (0.29, 3.86, 0.12, 3.65)


@dataclass(frozen=True)
class Verdict:
    """Verdicts on the latents of one run."""

    score: Float[Tensor, "d_sae"]
    """Predicted chance, in [0, 1], that the latent is a feature up to cosine 0.9; 0 if rare."""
    flag: Int[Tensor, "d_sae"]
    """Place in `FLAGS`: 0 below score 0.2, 2 from 0.8 on, 1 between."""
    cause: Int[Tensor, "d_sae"]
    """Place in `CAUSES`: the term that lowers the score most; 0 for reliable latents."""
    consistency: Float[Tensor, "d_sae"] | None
    """Mean over other runs of the largest cosine there; None for one run alone."""
    n_features: float
    """Sum of the scores with copies counted once: how many features are supposed to be found."""

    @property
    def counts(self) -> dict[str, int]:
        """Flag -> number of latents."""
        return {name: int((self.flag == i).sum()) for i, name in enumerate(FLAGS)}

    @property
    def cause_counts(self) -> dict[str, int]:
        """Cause -> number of latents that are not reliable because of it."""
        return {name: int((self.cause == i).sum()) for i, name in enumerate(CAUSES) if i}


def terms(
    conditions: Conditions, consistency: Float[Tensor, "d_sae"] | None
) -> Float[Tensor, "d_sae 4"]:
    """ln(kurtosis / 3), L(alignment), excess, L(consistency) (0 without), float64."""
    tail = (conditions.kurtosis.double().clamp_min(1) / 3).log()
    agree = torch.zeros_like(tail) if consistency is None else _spread(consistency)
    return torch.stack(
        (tail, _spread(conditions.alignment), conditions.excess.double(), agree), dim=1
    )


def verdict(conditions: Conditions, consistency: Float[Tensor, "d_sae"] | None = None) -> Verdict:
    """Score every latent, from one run alone or with its consistency across seeds.

    Raises:
        UserError: the consistency is not of these latents.
    """
    if consistency is not None and len(consistency) != conditions.d_sae:
        raise UserError(
            f"Expected a consistency for each of {conditions.d_sae} latents, "
            f"got {len(consistency)}."
        )
    if consistency is not None:
        consistency = consistency.detach().float().cpu()
    rule = ONE_RUN if consistency is None else SEVERAL_RUNS
    x = terms(conditions, consistency)
    weight = x.new_tensor(rule.weight)
    is_rare = conditions.count < MIN_FIRINGS
    score = torch.where(is_rare, 0.0, torch.sigmoid(x @ weight + rule.intercept)).float()
    flag = (score >= UNRELIABLE).long() + (score >= RELIABLE).long()
    worst = ((x - x.new_tensor(TYPICAL)) * weight).min(dim=1).indices + 1
    cause = torch.where(flag == 2, 0, torch.where(is_rare, RARE, worst))
    found = float((score.double() / (1 + conditions.n_copies)).sum())
    return Verdict(score, flag, cause, consistency, found)


def reason(conditions: Conditions, found: Verdict, latent: int) -> str:
    """The cause for one latent in words, with the number behind it.

    Raises:
        UserError: no such latent.
    """
    if not 0 <= latent < conditions.d_sae:
        raise UserError(f"Expected a latent between 0 and {conditions.d_sae - 1}, got {latent}.")
    cause = int(found.cause[latent])
    agree = 0.0 if found.consistency is None else float(found.consistency[latent])
    numbers = (
        "",
        f"kurtosis {float(conditions.kurtosis[latent]):.2f}, a Gaussian has 3",
        f"cosine {float(conditions.alignment[latent]):.2f} with their mean",
        f"latent {int(conditions.partner[latent])}, "
        f"{100 * float(conditions.excess[latent]):.0f}% of its firings more than by chance",
        f"consistency {agree:.2f}",
        f"{int(conditions.count[latent])} firings in {conditions.n_tokens} tokens",
    )
    return CAUSES[0] if cause == 0 else f"{CAUSES[cause]} ({numbers[cause]})"


def _spread(cosine: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    return -torch.log1p(-cosine.double().clamp(0, 0.999))
