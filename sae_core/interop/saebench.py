"""An SAE as SAEBench's evaluations expect it (sae-bench 0.6.0, custom_saes/base_sae.py).

They want W_enc, W_dec with rows of unit norm, b_enc, b_dec, device, dtype, a mutable cfg, and
encode and decode of tensors [..., d] that may be called in any order and number. `SAE` differs in
four ways: it reads [n, d_in] alone, its forward gives more than the reconstruction, its decoder
rows carry a scale, and with normalize="token" decode needs the token's norm. Here

    codes_j = ||x|| scale_j ||W_dec[j]|| acts_j         (||x|| for normalize="token" only)
    x_hat   = codes W_dec / ||W_dec[j]|| + b_dec

and with normalize="token" one more latent, always active, carries the norm: its code is
||x|| ||b_dec||, its direction b_dec / ||b_dec||, and b_dec itself is 0. That is exact, and L0
counts the latent that was added. SAELens's constant_norm_rescale keeps the norm inside the SAE
until the next decode instead, which fails where an evaluation decodes twice (scr_and_tpp, ravel).
"""

from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sae_core.sae import SAE


@dataclass
class BenchConfig:
    """The fields of SAEBench's CustomSAEConfig; the evaluations write into it."""

    model_name: str
    """Name in TransformerLens."""
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = "sae_apps"
    activation_fn_str: str = ""
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    exclude_special_tokens: bool = False
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


class BenchSAE(nn.Module):
    """What `sae_bench.evals.*.main.run_eval` takes as a custom SAE.

    Args:
        sae: of any kind; it is not changed.
        model_name: the model's name in TransformerLens, e.g. pythia-70m-deduped.
        hook_layer: number of the layer whose residual stream behind the block is read.
        hook_name: another place, in TransformerLens's names.
    """

    def __init__(
        self, sae: SAE, *, model_name: str, hook_layer: int, hook_name: str | None = None
    ) -> None:
        super().__init__()
        self.sae = deepcopy(sae).eval()  # `to` changes it in place
        is_token = sae.config.normalize == "token"
        rows = sae.W_dec.detach() * sae.scale.detach()[:, None]
        encoder, b_dec = sae.W_enc.detach(), sae.b_dec.detach()
        b_enc = sae.b_enc.detach()
        if is_token:
            rows = torch.cat([rows, b_dec[None]])
            encoder = torch.cat([encoder, b_dec[:, None]], dim=1)
            b_enc, b_dec = torch.cat([b_enc, b_enc.new_zeros(1)]), torch.zeros_like(b_dec)
        weight = rows.norm(dim=1)
        # a zero row has no direction: any unit vector serves a code that is always 0
        unit = torch.where(weight[:, None] > 0, rows, torch.eye(1, sae.d_in).to(rows))
        self.weight = nn.Parameter(weight, False)
        self.W_dec = nn.Parameter(unit / unit.norm(dim=1, keepdim=True), False)
        self.W_enc = nn.Parameter(encoder.clone(), False)
        self.b_enc = nn.Parameter(b_enc.clone(), False)
        self.b_dec = nn.Parameter(b_dec.clone(), False)
        hook_name = hook_name or f"blocks.{hook_layer}.hook_resid_post"
        self.cfg = BenchConfig(model_name, sae.d_in, len(weight), hook_layer, hook_name)
        self.cfg.dtype = str(self.dtype).removeprefix("torch.")
        self.cfg.device = str(self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.W_dec.dtype

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes [..., d_sae] of activations [..., d_in]; with normalize="token" one more."""
        flat = x.reshape(-1, self.cfg.d_in)
        codes = self.sae.encode(flat)
        if self.sae.config.normalize == "token":
            _, norm = self.sae.normalise(flat)
            codes = norm * torch.cat([codes, torch.ones_like(norm)], dim=1)
        return (codes * self.weight).reshape(*x.shape[:-1], self.cfg.d_sae)

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstructions [..., d_in] in the units of x; differentiable in the codes."""
        return codes @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x [..., d_in]."""
        return self.decode(self.encode(x))
