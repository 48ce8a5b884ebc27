"""A direction taken away only where a token's posterior says that the concept is there.

    x'_t = x_t - s w(x_t) d d^T (x_t - c)
    w(x) = clip((P(concept | x) - pi) / (1 - pi), 0, 1),    P(concept | x) = sigmoid(v . x + b)

APP (arXiv 2508.15094) attenuates each unit by its own posterior; single units know little of where
a concept is, and a direction, which removes much of it, is taken from every token alike, neutral
ones included. Here the excess posterior (``posterior.attenuation``) is that of the whole
activation, by a logistic regression over tokens with a background class, and what it attenuates is
the difference of means (``rivals.PlaneEdit``). This project's extension of APP, beside it.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_apps.suppression.probes import fit_probe
from sae_apps.suppression.rivals import PlaneEdit, at_strength, check_strength
from sae_core.errors import UserError


@dataclass(frozen=True, eq=False)
class LinearPosterior:
    """P(concept | x) of a token, from its whole activation."""

    weights: Float[Tensor, " d"]
    """v, in the units of the activations."""
    bias: float
    """b, at equal weight of both classes."""
    prior: float = 0.5
    """pi, in [0, 1): what a token without information has."""

    def __post_init__(self) -> None:
        if not 0 <= self.prior < 1:
            raise UserError(f"Expected a prior in [0, 1), got {self.prior}.")

    def excess(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
        """w(x), in [0, 1]."""
        p = torch.sigmoid(x @ self.weights + self.bias)[:, None]
        return ((p - self.prior) / (1 - self.prior)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class GatedPlane:
    """A plane's edit, weighted token by token with a posterior."""

    gate: LinearPosterior
    """How much of the edit a token gets."""
    plane: PlaneEdit
    """What is taken away at weight 1 and strength 1; in activations, not in units."""
    strength: float = 1.0
    """Factor on the weight."""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.plane.units is not None:
            raise UserError("Expected a plane in the activations, got one in the space of units.")
        if len(self.gate.weights) != len(self.plane.left):
            raise UserError(
                f"Expected a gate and a plane of one width, got {len(self.gate.weights)} and "
                f"{len(self.plane.left)}."
            )

    @property
    def hook_point(self) -> str:
        """Where it acts."""
        return self.plane.hook_point

    def to(self, device: torch.device | str) -> "GatedPlane":
        """The same on another device."""
        gate = replace(self.gate, weights=self.gate.weights.to(device))
        return replace(self, gate=gate, plane=self.plane.to(device))

    def apply(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Edited activations."""
        taken = x - at_strength(self.plane, 1.0).apply(x)
        return x - self.strength * self.gate.excess(x) * taken


def fit_gated(
    plane: PlaneEdit,
    x: Float[np.ndarray, "n d"],
    is_concept: Bool[np.ndarray, " n"],
    background: Float[np.ndarray, "m d"] | None = None,
    **options: Any,
) -> GatedPlane:
    """Gate a plane by the posterior of the tokens that it was fitted on.

    Args:
        plane: in the activations at its hook point.
        x: tokens there.
        is_concept: label of each token's text.
        background: tokens of running text without the concept, more of the rest.
        options: of ``LinearPosterior``.
    Raises:
        UserError: one class only, or another width than the plane's.
    """
    rows, label = x, is_concept
    if background is not None:
        rows = np.concatenate([x, background])
        label = np.concatenate([is_concept, np.zeros(len(background), dtype=bool)])
    probe = fit_probe(rows, label)
    weights = torch.from_numpy(probe.weights.astype(np.float32))
    return GatedPlane(LinearPosterior(weights, float(probe.bias), **options), plane)
