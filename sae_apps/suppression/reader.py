"""Values of a few latents of an SAE without encoding the others, and the way to write them back.

    u    = x / ||x||                              (or x, where the SAE does not normalise)
    a_j  = gate((u - b_dec) W_enc[:, j] + b_enc_j)                       for j in the chosen latents
    x'   = x - ||x|| * sum_j (a_j - a_j') scale_j W_dec[j]

The reconstruction error of the SAE stays where it is, because only the difference is written.
ReLU, GBA, JumpReLU and BatchTopK (at inference a threshold per latent) decide latent by latent, so
only the columns of the chosen latents are multiplied. TopK ranks all latents of a token, so all
columns are: exact too, and slower.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_core.errors import UserError
from sae_core.sae import SAE


@dataclass(frozen=True, eq=False)
class LatentReader:
    """What is needed of an SAE to read u latents and to write them back; m columns are read."""

    encoder: Float[Tensor, "d_in m"]
    """Columns of W_enc: those of the chosen latents, or all (TopK)."""
    offset: Float[Tensor, " m"]
    """b_enc - b_dec W_enc."""
    threshold: Float[Tensor, " m"]
    """A latent is active where its pre-activation exceeds this."""
    gate_bias: Float[Tensor, " m"]
    """Subtracted from active pre-activations: b_enc for GBA with gate jumprelu, else 0."""
    chosen: Int[Tensor, " u"]
    """The chosen latents' places among the m columns."""
    decoder: Float[Tensor, "u d_in"]
    """scale_j W_dec[j]."""
    normalize: bool
    """Whether tokens are divided by their norm."""
    k: int
    """TopK: latents a token at most; 0 for the other kinds."""

    @property
    def n_units(self) -> int:
        """Number of chosen latents."""
        return self.chosen.shape[0]

    def values(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n u"]:
        """Activations of the chosen latents, differentiable in x; x in float32."""
        if x.shape[-1] != self.encoder.shape[0]:
            raise UserError(
                f"Expected activations of width d_in {self.encoder.shape[0]}, got {x.shape[-1]}: "
                "the SAE belongs to another model or hook point."
            )
        u = x / _norm(x) if self.normalize else x
        pre = torch.addmm(self.offset, u, self.encoder)
        if not self.k:
            return torch.where(pre > self.threshold, pre - self.gate_bias, 0.0)
        top, where = pre.topk(min(self.k, pre.shape[1]), dim=-1, sorted=False)
        kept = torch.zeros_like(pre).scatter(1, where, top.clamp_min(0))
        return kept.index_select(1, self.chosen)

    def subtract(
        self, x: Float[Tensor, "n d_in"], delta: Float[Tensor, "n u"]
    ) -> Float[Tensor, "n d_in"]:
        """x - ||x|| sum_j delta_j scale_j W_dec[j]."""
        change = delta @ self.decoder
        return x - (change * _norm(x) if self.normalize else change)

    def to(self, device: torch.device | str) -> "LatentReader":
        """The same on another device."""
        moved = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return LatentReader(**moved, normalize=self.normalize, k=self.k)


def _norm(x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n 1"]:
    return x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


@torch.no_grad()
def read_latents(sae: SAE, chosen: Int[Tensor, " u"]) -> LatentReader:
    """A reader of some latents of an SAE at inference, in float32.

    Args:
        chosen: numbers of the latents, each once.
    Raises:
        UserError: a latent that the SAE does not have.
    """
    chosen = chosen.to(sae.W_enc.device, torch.int64)
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < sae.d_sae:
        raise UserError(
            f"Expected latents in 0..{sae.d_sae - 1}, got {int(chosen.min())}..{int(chosen.max())}."
        )
    kind = sae.config.kind
    ranked = kind == "topk"
    columns = torch.arange(sae.d_sae, device=chosen.device) if ranked else chosen
    encoder = sae.W_enc.index_select(1, columns).float()
    bias = sae.b_enc.index_select(0, columns).float()
    threshold = sae.threshold.index_select(0, columns).float()
    shifted = kind == "gba" and sae.config.gate == "jumprelu"
    return LatentReader(
        encoder=encoder,
        offset=bias - sae.b_dec.float() @ encoder,
        threshold=threshold if kind in ("jumprelu", "batch_topk") else torch.zeros_like(bias),
        gate_bias=bias.clone() if shifted else torch.zeros_like(bias),
        chosen=chosen if ranked else torch.arange(len(chosen), device=chosen.device),
        decoder=(sae.scale[:, None] * sae.W_dec).index_select(0, chosen).float(),
        normalize=sae.config.normalize == "token",
        k=sae.config.k if ranked else 0,
    )
