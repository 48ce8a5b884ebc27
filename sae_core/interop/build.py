"""An SAE out of matrices that another library stored, exact folds included, computed in float64."""

from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sae_core.errors import UserError
from sae_core.sae import SAE, Kind, SAEConfig


class Parts(NamedTuple):
    """Of pre = (x - b_dec) W_enc + b_enc and x_hat = acts W_dec + b_dec."""

    W_enc: Tensor
    """[d_in, d_sae]"""
    b_enc: Tensor
    """[d_sae]"""
    W_dec: Tensor
    """[d_sae, d_in]"""
    b_dec: Tensor
    """[d_in]"""
    threshold: Tensor | None = None
    """[d_sae]; fires where pre > max(threshold, 0)."""

    def double(self) -> "Parts":
        """All in float64."""
        return Parts(*(None if part is None else part.double() for part in self))  # type: ignore[arg-type]

    def uncentred(self) -> "Parts":
        """Of an encoder that reads x itself: b_enc + b_dec W_enc makes up for our subtraction."""
        return self._replace(b_enc=self.b_enc + self.b_dec @ self.W_enc)

    def decoder_norm_in_codes(self) -> "Parts":
        """Codes multiplied by the norm of their decoder row, which becomes a unit vector."""
        norm = self.W_dec.norm(dim=1).clamp_min(1e-8)
        return self._replace(
            W_enc=self.W_enc * norm, b_enc=self.b_enc * norm, W_dec=self.W_dec / norm[:, None]
        )

    def rescaled(self, factor: float) -> "Parts":
        """Of an SAE that reads factor * x: the same codes from x, reconstructions in x's units."""
        return self._replace(
            W_enc=self.W_enc * factor, W_dec=self.W_dec / factor, b_dec=self.b_dec / factor
        )

    def of_unit_tokens(self) -> "Parts":
        """Of an SAE that reads sqrt(d_in) x / ||x||: the same from x / ||x||."""
        return self.rescaled(sqrt(self.W_enc.shape[0]))


def build_sae(
    kind: Kind, parts: Parts, *, k: int = 0, normalize: Literal["token", "none"] = "none"
) -> SAE:
    """The SAE with these parts, in float32 and for inference.

    Args:
        k: active latents a token of topk and batch_topk; 0 for the other kinds.
    Raises:
        UserError: k does not fit, or a number is too large for float32.
    """
    d_in, d_sae = parts.W_enc.shape
    config = SAEConfig(d_in, d_sae, kind=kind, k=k, normalize=normalize)
    sae = SAE(config, generator=torch.Generator())
    tensors = {name: part for name, part in parts._asdict().items() if part is not None}
    if parts.threshold is not None:  # their ReLU comes before the threshold
        tensors["threshold"] = parts.threshold.clamp_min(0)
    tensors = {name: part.float() for name, part in tensors.items()}
    for name, part in tensors.items():
        if not torch.isfinite(part).all():
            raise UserError(f"Expected numbers that fit float32, got larger ones in {name}.")
    sae.set_tensors(sae.tensors() | tensors)
    return sae.eval()
