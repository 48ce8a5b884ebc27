"""How well an SAE reconstructs, streaming: FVU, L0, firing frequencies, dead latents.

Every number is a ratio of sums over tokens, so the batches make no difference to it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import UserError
from sae_core.firing import FiringStats
from sae_core.kernels.codes import Codes


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Quality of a reconstruction over n_tokens tokens."""

    fvu: float
    """Residual sum of squares / total sum of squares about the global mean; 0 is perfect. Of
    normalised tokens where the SAE normalises: the vectors that it is trained on."""
    fvu_raw: float
    """The same of the activations as they are in the model, where few tokens of a huge norm can
    outweigh all the others."""
    l0: float
    """Mean number of active latents a token."""
    freq: Float[np.ndarray, " d_sae"]
    """Fraction of tokens in which each latent is active, [d_sae] float64."""
    peak: Float[np.ndarray, " d_sae"]
    """Largest activation of each latent, 0 where it never fired, [d_sae]."""
    dead_fraction: float
    """Fraction of latents that fired in none of the n_tokens tokens."""
    n_tokens: int
    """Tokens evaluated; fewer tokens make more latents look dead."""


class Variation:
    """Streaming sums behind one FVU; `update` and `merge` add up in any order.

        FVU = sum_t ||x_t - x_hat_t||^2 / sum_t ||x_t - mean||^2,   mean over all t

    The spread about the mean is merged pair by pair in float64 (Chan, Golub and LeVeque 1983,
    "Algorithms for computing the sample variance", eq. 2.1), so that an offset much larger than
    the spread costs no digits.
    """

    def __init__(self, d_in: int, device: torch.device | str = "cpu") -> None:
        self.n_tokens = 0
        self.mean = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.residual = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> None:
        """Add the tokens x [n, d_in] and their reconstructions."""
        if x.shape[0] == 0:
            return
        x64 = x.double()
        mean = x64.mean(dim=0)
        self._spread(x.shape[0], mean, (x64 - mean).square().sum())
        self.residual += (x64 - x_hat.double()).square().sum()

    def merge(self, other: "Variation") -> None:
        """Add the tokens of another process or shard."""
        self._spread(other.n_tokens, other.mean, other.total)
        self.residual += other.residual

    def fvu(self) -> float:
        """The ratio so far.

        Raises:
            UserError: no tokens, a sum that is not finite, or vectors that do not vary.
        """
        if self.n_tokens == 0:
            raise UserError("Expected at least one token to evaluate, got none.")
        for name, value in (("activations", self.total), ("reconstructions", self.residual)):
            if not torch.isfinite(value):
                raise UserError(f"Expected finite {name}, got a sum of squares of {float(value)}.")
        if float(self.total) == 0:
            raise UserError(
                f"The FVU needs activations that vary, got {self.n_tokens} tokens "
                "that are all the same."
            )
        return float(self.residual / self.total)

    def _spread(self, n: int, mean: Float[Tensor, "d_in"], total: Float[Tensor, ""]) -> None:
        both = self.n_tokens + n
        if both:
            gap = mean - self.mean
            self.total = self.total + total + gap.square().sum() * (self.n_tokens * n / both)
            self.mean = self.mean + gap * (n / both)
        self.n_tokens = both


class ReconstructionStats:
    """Streaming sums for :class:`Reconstruction`; `update` and `merge` add up in any order."""

    def __init__(self, d_in: int, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.raw = Variation(d_in, device)
        self.normalised = Variation(d_in, device)
        self.firing = FiringStats(d_sae, device)

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "n d_in"],
        x_hat: Float[Tensor, "n d_in"],
        codes: Codes,
        norm: Float[Tensor, "n 1"] | float = 1.0,
    ) -> None:
        """Add a batch.

        Args:
            x: [n, d_in] activations as they are in the model.
            x_hat: [n, d_in] reconstruction in the same units.
            codes: [n, d_sae] the latents that made it.
            norm: what the SAE divides each token by.
        """
        self.raw.update(x, x_hat)
        self.normalised.update(x / norm, x_hat / norm)
        self.firing.update(codes)

    def merge(self, other: "ReconstructionStats") -> None:
        """Add the tokens of another process's or shard's statistics."""
        self.raw.merge(other.raw)
        self.normalised.merge(other.normalised)
        self.firing.merge(other.firing)

    def compute(self) -> Reconstruction:
        """The metrics so far.

        Raises:
            UserError: no tokens, or activations that do not vary, whose FVU is not defined.
        """
        fvu, firing = self.normalised.fvu(), self.firing.compute()
        return Reconstruction(
            fvu=fvu,
            fvu_raw=self.raw.fvu(),
            l0=float(firing.count.sum()) / firing.n_tokens,
            freq=firing.freq.cpu().numpy(),
            peak=firing.peak.cpu().numpy(),
            dead_fraction=float((firing.count == 0).double().mean()),
            n_tokens=firing.n_tokens,
        )
