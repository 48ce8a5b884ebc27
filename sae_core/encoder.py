"""What turns activation vectors into sparse codes: an SAE, or the router of a Monet model."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from sae_core.kernels.codes import Codes


@runtime_checkable
class SparseEncoder(Protocol):
    """The part of an SAE that featurising needs; whatever has it is read as features."""

    training: bool

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        ...

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        ...

    @property
    def device(self) -> torch.device:
        """Where activations must lie."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type that they must have."""
        ...

    def encode_sparse(self, x: Tensor) -> Codes:
        """Codes of activations [n, d_in]."""
        ...

    def hash(self) -> str:
        """Identity of everything that a code depends on."""
        ...

    def train(self, mode: bool = True) -> object:
        """To training mode or back."""
        ...
