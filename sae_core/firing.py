"""How often each latent fires: streaming counts that merge across batches and processes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_core.kernels.codes import Codes
from sae_core.parallel import Layout


@dataclass(frozen=True)
class Firing:
    """Frozen statistics over n_tokens tokens."""

    count: Int[Tensor, "d_sae"]
    """Tokens on which the latent fired."""
    peak: Float[Tensor, "d_sae"]
    """Largest activation, 0 where it never fired."""
    n_tokens: int
    """Tokens seen."""

    @property
    def freq(self) -> Float[Tensor, "d_sae"]:
        """Fraction of tokens on which the latent fired, float64."""
        return self.count.double() / max(1, self.n_tokens)


class FiringStats:
    """Counts and peaks since the last clear. `update` and `merge` commute, so order is free."""

    def __init__(self, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.peak = torch.zeros(d_sae, device=device)
        self.n_tokens = 0

    @torch.no_grad()
    def update(self, codes: Codes) -> Int[Tensor, "d_sae"]:
        """Add a batch of codes (every entry counts as a firing); returns the batch's counts."""
        if codes.by_latent is None:
            count = torch.bincount(codes.col, minlength=codes.d_sae)
        else:  # bincount would make the host wait for the device
            count = codes.by_latent.starts.diff()
        self.count += count
        self.peak.scatter_reduce_(0, codes.col, codes.values.detach().to(self.peak.dtype), "amax")
        self.n_tokens += codes.n
        return count

    def merge(self, other: "FiringStats") -> None:
        """Add another process's or shard's statistics: counts add, peaks take the maximum."""
        self.count += other.count
        self.peak = torch.maximum(self.peak, other.peak)
        self.n_tokens += other.n_tokens

    def all_reduce(self, layout: Layout) -> None:
        """Merge over the processes that have the same latents, whose batches are equally large."""
        layout.add(self.count, "tokens")
        layout.largest(self.peak, "tokens")
        self.n_tokens *= layout.parts("tokens")

    def clear(self) -> None:
        """Forget everything."""
        self.count.zero_()
        self.peak.zero_()
        self.n_tokens = 0

    def compute(self) -> Firing:
        """A frozen copy."""
        return Firing(self.count.clone(), self.peak.clone(), self.n_tokens)
