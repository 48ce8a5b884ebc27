"""Does the converted SAE compute what the file's own formula computes?

Codes must agree within RTOL * ((||u|| + ||b_dec||) ||w_j|| + |b_j| + |threshold_j|): RTOL times
what bounds the rounding of a float32 product (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, section 3.1). Reconstructions from these codes must agree within
RTOL * (|acts| |W_dec| + |b_dec|). Where a latent fires on one side only, its pre-activation must
lie within the tolerance of the boundary, since the last bit decides there.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import UserError
from sae_core.interop.result import Original
from sae_core.sae import SAE

RTOL = 1e-5  # 84 units in the last place of float32: sums of thousands of products stay below
N_PROBES = 128
SEED = 0


class ConversionError(UserError):
    """The converted SAE computes something else than the file; nothing was written."""


@dataclass(frozen=True)
class Difference:
    """Largest differences over the activations that were tried."""

    codes: float
    """Of codes, relative to the largest code."""
    reconstruction: float
    """Of reconstructions, relative to the largest entry."""
    n_active: int
    """Codes that were not zero."""
    n_flips: int
    """Codes that fired on one side only, at the boundary within the tolerance."""

    def merge(self, other: "Difference") -> "Difference":
        """Over the activations of both."""
        return Difference(
            max(self.codes, other.codes),
            max(self.reconstruction, other.reconstruction),
            self.n_active + other.n_active,
            self.n_flips + other.n_flips,
        )


def check_conversion(
    original: Original, sae: SAE, x: Float[Tensor, "n d_in"] | None = None
) -> Difference:
    """Compare encode and decode on random activations, and on x where it is given.

    Args:
        original: the file's formula.
        sae: the conversion.
        x: real activations [n, d_in], in the units the SAE reads.
    Returns:
        The larger of each difference.
    Raises:
        ConversionError: a code or a reconstruction differs by more than the tolerance, or no
            latent fired, so that nothing was compared.
    """
    found = compare(original, sae, probes(sae), "random activations")
    return found if x is None else found.merge(compare(original, sae, x, "the given activations"))


@torch.no_grad()
def compare(
    original: Original, sae: SAE, x: Float[Tensor, "n d_in"], name: str = "x"
) -> Difference:
    """Differences on x [n, d_in]; `name` says in a message what x is.

    Tokens that are 0 everywhere are passed over: they have no direction to normalise to.

    Raises:
        ConversionError: see `check_conversion`.
    """
    found = Difference(0.0, 0.0, 0, 0)
    for part in x[x.norm(dim=1) > 0].split(N_PROBES):
        found = found.merge(_compare(original, sae, part, name))
    if not found.n_active:
        raise ConversionError(
            f"Expected latents that fire on {name}, got none on {x.shape[0]} tokens: "
            "the conversion cannot be checked."
        )
    return found


def _compare(original: Original, sae: SAE, x: Tensor, name: str) -> Difference:
    out, x64 = sae(x), x.double()
    wanted = original.encode(x64)
    allowed = _tolerance(sae, x)
    is_flip = (out.acts != 0) != (wanted != 0)
    is_flip &= _to_boundary(sae, out.pre) <= allowed.codes
    gap = (out.acts.double() - wanted).abs().masked_fill(is_flip, 0)
    _refuse(gap, allowed.codes, f"Codes of {name}", out.acts, wanted)
    x_hat = original.decode(out.acts.double(), x64)
    off = (out.x_hat.double() - x_hat).abs()
    _refuse(off, allowed.x_hat(out.acts), f"Reconstructions of {name}", out.x_hat, x_hat)
    return Difference(
        _share(gap, wanted), _share(off, x_hat), int((wanted != 0).sum()), int(is_flip.sum())
    )


def probes(sae: SAE, n: int = N_PROBES, seed: int = SEED) -> Float[Tensor, "n d_in"]:
    """Random activations on which latents fire: around b_dec, half of them along encoder vectors.

    Lengths lie between a third and thirty times what the median latent needs to fire.
    """
    generator = torch.Generator().manual_seed(seed)
    norm = sae.W_enc.detach().norm(dim=0).clamp_min(1e-12)
    boundary = sae.threshold if sae.config.kind in ("jumprelu", "batch_topk") else 0 * sae.b_enc
    typical = ((boundary - sae.b_enc) / norm).detach().abs().median()
    directions = torch.randn(n, sae.d_in, generator=generator)
    along = torch.randint(sae.d_sae, (n // 2,), generator=generator)
    directions[: n // 2] = (sae.W_enc.detach() / norm).T[along]
    exponent = 2 * torch.rand(n, 1, generator=generator) - 0.5
    length = torch.where(typical > 0, typical, torch.ones(())) * 10**exponent
    return sae.b_dec.detach() + length * directions


class _Tolerance(NamedTuple):
    codes: Tensor  # [n, d_sae]
    sae: SAE
    norm: Tensor  # [n, 1]

    def x_hat(self, acts: Tensor) -> Tensor:
        size = (acts * self.sae.scale).abs().double() @ self.sae.W_dec.abs().double()
        return RTOL * self.norm.double() * (size + self.sae.b_dec.abs())


def _tolerance(sae: SAE, x: Tensor) -> _Tolerance:
    u, norm = sae.normalise(x)
    # a difference of large, nearly equal vectors keeps the rounding of the large ones
    length = u.norm(dim=1, keepdim=True) + sae.b_dec.norm()
    size = length * sae.W_enc.norm(dim=0) + sae.b_enc.abs() + sae.threshold.abs()
    return _Tolerance(RTOL * size.double(), sae, norm)


def _to_boundary(sae: SAE, pre: Tensor) -> Tensor:
    """How far each pre-activation is from firing or from falling silent, [n, d_sae]."""
    match sae.config.kind:
        case "topk":
            k = sae.config.k
            top = pre.topk(min(k + 1, sae.d_sae), dim=1).values
            last = top[:, k - 1 : k].clamp_min(0)
            beyond = top[:, -1:].clamp_min(0) if k < sae.d_sae else torch.zeros_like(last)
            return torch.where(pre >= last, pre - beyond, last - pre).double()
        case "jumprelu" | "batch_topk":
            return (pre - sae.threshold).abs().double()
        case _:
            return pre.abs().double()


def _refuse(gap: Tensor, allowed: Tensor, what: str, found: Tensor, wanted: Tensor) -> None:
    bad = ~(gap <= allowed)  # NaN is bad
    if not bool(bad.any()):
        return
    row, col = (int(i) for i in bad.nonzero()[0])
    raise ConversionError(
        f"{what} differ after the conversion: expected {float(wanted[row, col]):.7g} at "
        f"[{row}, {col}], got {float(found[row, col]):.7g}; {int(bad.sum())} of {bad.numel()} "
        f"exceed the relative tolerance {RTOL:g}."
    )


def _share(gap: Tensor, wanted: Tensor) -> float:
    return float(gap.max() / wanted.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
