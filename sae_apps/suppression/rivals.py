"""What a user would compare with: masks, ranges, AurA, directions, LEACE, chance, a plain request.

    gates    a_j' = a_j - s w_j 1[lo_j <= a_j <= hi_j] (a_j - t_j)     on units
    planes   v'   = v - s left right^T (v - c)                         on units or on x itself

The gates are full masking (w = 1, everywhere), range suppression (NeuronLens, arXiv 2502.06809) and
AurA (arXiv 2407.12824, github apple/ml-aura); the planes are the ablation of a difference of means
(as DirectionalAblation of AISteer360) and LEACE (arXiv 2306.03819). ``fit_*`` are in
``rival_fits``. All edits take a strength s >= 0; 0 leaves x as it is, beyond 1 overshoots.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_apps.suppression.units import Units
from sae_core.errors import UserError
from sae_core.kernels.codes import Codes


def at_strength(edit: Any, strength: float) -> Any:
    """The same edit with another strength.

    Raises:
        UserError: negative or not finite.
    """
    check_strength(strength)
    return replace(edit, strength=float(strength))


def check_strength(strength: float) -> None:
    """Raises:
    UserError: negative or not finite.
    """
    if not (np.isfinite(strength) and strength >= 0):
        raise UserError(f"Expected a strength of at least 0, got {strength}.")


def unit_values(units: Units, x: Float[Tensor, "n d"]) -> Float[Tensor, "n u"]:
    """Dense values of chosen units.

    Raises:
        UserError: all latents of an SAE, whose values are sparse.
    """
    found = units.values(x)
    if isinstance(found, Codes):
        raise UserError(f"Expected chosen latents, got all {units.n_units}: use take() first.")
    return found


@dataclass(frozen=True, eq=False)
class GateEdit:
    """Units are drawn to a neutral value where they lie in a range."""

    units: Units
    """Those that are edited, u of them."""
    weight: Float[Tensor, " u"]
    """Part of the way at strength 1, [u]."""
    low: Float[Tensor, " u"]
    """Lower end of the range, [u]."""
    high: Float[Tensor, " u"]
    """Upper end of the range, [u]."""
    neutral: Float[Tensor, " u"]
    """Where values are drawn to, [u]; 0 for latents, which an edit does not switch on."""
    strength: float = 1.0
    """Factor on the weight."""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        for name in ("weight", "low", "high", "neutral"):
            if getattr(self, name).shape != (self.units.n_units,):
                raise UserError(
                    f"Expected {name} for {self.units.n_units} units, got shape "
                    f"{list(getattr(self, name).shape)}."
                )
        if not self.units.two_sided and bool(self.neutral.any()):
            raise UserError(
                "Expected neutral values of 0 for latents, got "
                f"{int(self.neutral.count_nonzero())} others."
            )

    @property
    def hook_point(self) -> str:
        """Where it acts."""
        return self.units.hook_point

    def to(self, device: torch.device | str) -> "GateEdit":
        """The same on another device."""
        names = ("weight", "low", "high", "neutral")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, units=self.units.to(device), **moved)

    def apply(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Edited activations, in the units of x."""
        old = unit_values(self.units, x)
        inside = (old >= self.low) & (old <= self.high)
        new = old - self.strength * self.weight * inside * (old - self.neutral)
        return self.units.write(x, old, new)


@dataclass(frozen=True, eq=False)
class PlaneEdit:
    """The part of the activations within a subspace is removed, about a centre."""

    hook_point: str
    """Where it acts."""
    left: Float[Tensor, "d k"]
    """What is taken away, [d, k]."""
    right: Float[Tensor, "d k"]
    """What measures how much, [d, k]; equal to ``left`` for an orthogonal projection."""
    center: Float[Tensor, " d"]
    """Point that stays, [d]."""
    strength: float = 1.0
    """Part that is removed."""
    units: Units | None = None
    """The space is that of these units; None: the activations themselves."""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.left.shape != self.right.shape or len(self.center) != len(self.left):
            raise UserError(
                f"Expected left and right of one shape [d, k] and a centre [d], got "
                f"{list(self.left.shape)}, {list(self.right.shape)} and {list(self.center.shape)}."
            )
        if self.units is not None and self.units.n_units != len(self.left):
            raise UserError(
                f"Expected a plane in the space of {self.units.n_units} units, got "
                f"{len(self.left)} dimensions."
            )

    def to(self, device: torch.device | str) -> "PlaneEdit":
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("left", "right", "center")}
        return replace(self, units=self.units and self.units.to(device), **moved)

    def apply(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Edited activations, in the units of x."""
        old = x if self.units is None else unit_values(self.units, x)
        new = old - self.strength * ((old - self.center) @ self.right) @ self.left.T
        return new if self.units is None else self.units.write(x, old, new)


@dataclass(frozen=True, eq=False)
class EqualNormEdit:
    """Control: as large a change as another edit's at every token, along units drawn by lot.

    x' = x - ||x - ref(x)|| r / ||r||,    r = sum over random units of +-1 times its direction
    """

    reference: Any
    """The edit whose change is matched in norm, token by token."""
    units: Units
    """Those drawn, u of them."""
    signs: Float[Tensor, " u"]
    """+1 or -1 for each, [u]."""
    strength: float = 1.0
    """That of the reference."""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.signs.shape != (self.units.n_units,) or self.units.n_units == 0:
            raise UserError(
                f"Expected a sign for each of at least one unit, got {list(self.signs.shape)} for "
                f"{self.units.n_units}."
            )
        if self.reference.hook_point != self.units.hook_point:
            raise UserError(
                f"Expected units of the reference's hook point {self.reference.hook_point}, got "
                f"{self.units.hook_point}."
            )

    @property
    def hook_point(self) -> str:
        """Where it acts."""
        return self.units.hook_point

    def to(self, device: torch.device | str) -> "EqualNormEdit":
        """The same on another device."""
        move = getattr(self.reference, "to", None)
        reference = move(device) if move else self.reference
        return replace(
            self, reference=reference, units=self.units.to(device), signs=self.signs.to(device)
        )

    def apply(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Edited activations, in the units of x."""
        size = (x - at_strength(self.reference, self.strength).apply(x)).norm(dim=1, keepdim=True)
        signs = self.signs.expand(len(x), -1)
        step = x - self.units.write(x, signs, torch.zeros_like(signs))
        norm = step.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return x - size * (step / norm)


@dataclass(frozen=True)
class PromptEdit:
    """An instruction before the text: no hook. Evaluation scores the text's own tokens alone, with
    the instruction in the context."""

    instruction: str
    """What stands before the text, e.g. 'Write politely.' and a line break."""
    strength: float = 1.0
    """How many times it stands there: a whole number."""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if not self.instruction:
            raise UserError("Expected an instruction, got an empty text.")
        if self.strength != round(self.strength):
            raise UserError(
                f"An instruction stands a whole number of times before a text, got strength "
                f"{self.strength:g}."
            )

    @property
    def prefix(self) -> str:
        """What stands before the text at this strength."""
        return self.instruction * round(self.strength)
