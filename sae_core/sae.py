"""The sparse autoencoder: parameters, encode, decode. Training lives in train.py.

    u     = x / ||x||                                     (normalize="token"; u = x for "none")
    pre   = (u - b_dec) W_enc + b_enc
    acts  = nonlinearity(pre)                             by kind, see nonlinearity.py
    x_hat = ||x|| * ((acts * scale) W_dec + b_dec)

`kind="gba"` (Group Bias Adaptation, arXiv 2506.14002) fires where pre > 0. Its gate "jumprelu"
reads the value without the bias, acts = (pre - b_enc) 1[pre > 0], so the bias decides only *when*
a latent fires; "relu" reads acts = max(pre, 0). b_enc = b_m there belongs to the controller of
gba.py, never to the optimiser, and columns of W_enc have unit norm.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_core import nonlinearity
from sae_core.errors import UserError
from sae_core.gba import identifiable_k
from sae_core.kernels import active, autograd
from sae_core.kernels.codes import Codes
from sae_core.store import atomic_folder, verify_folder
from sae_core.untrusted import MAX_D_SAE, read_object, reading

Kind = Literal["gba", "topk", "batch_topk", "jumprelu", "relu"]


@dataclass(frozen=True)
class SAEConfig:
    """Shape and nonlinearity of an SAE."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    kind: Kind = "gba"
    """gba, topk, batch_topk, jumprelu or relu."""
    k: int = 0
    """Active latents a token: topk at most, batch_topk on average; gba the sum of the targets
    (unless htf and ltf are given), jumprelu and relu where their controllers steer to. 0 becomes
    `identifiable_k(d_in, d_sae)`."""
    gate: Literal["jumprelu", "relu"] = "jumprelu"
    """gba only: value without the bias (jumprelu) or with it (relu)."""
    tied: bool = False
    """Decoder direction = encoder direction (gba only, as the paper)."""
    normalize: Literal["token", "none"] = "token"
    """Divide each token by its norm before encoding and multiply after decoding."""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise UserError(f"d_in and d_sae must be positive, got {self.d_in} and {self.d_sae}.")
        if self.d_sae > MAX_D_SAE:
            raise UserError(f"d_sae must be at most {MAX_D_SAE}, got {self.d_sae}.")
        if self.k == 0:
            object.__setattr__(self, "k", identifiable_k(self.d_in, self.d_sae))
        most = self.d_sae if self.kind in ("topk", "batch_topk") else self.k
        if not 1 <= self.k <= most:
            raise UserError(
                f"k must lie between 1 and d_sae={self.d_sae}, or be 0 for the default, "
                f"got {self.k}."
            )
        if self.tied and self.kind != "gba":
            raise UserError(f"tied=True is defined for kind='gba', got kind={self.kind!r}.")


class SAEOutput(NamedTuple):
    """What a forward pass gives, all dense."""

    x_hat: Float[Tensor, "n d_in"]
    """Reconstruction in the units of x."""
    acts: Float[Tensor, "n d_sae"]
    """Latent activations."""
    pre: Float[Tensor, "n d_sae"]
    """Pre-activations."""


class SAE(nn.Module):
    """W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in], scale [d_sae].

    `threshold` [d_sae] is the JumpReLU threshold (jumprelu: learned; batch_topk: the running
    estimate used at inference, so that a token's code does not depend on its batch).
    """

    def __init__(self, config: SAEConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        rows = torch.randn(config.d_sae, config.d_in, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        # latent by latent: a sparse gradient arrives that way, a latent's encoder vector is
        # contiguous, and Adam wants a contiguous parameter
        self._encoder = nn.Parameter(rows.clone())
        if not config.tied:
            self._decoder = nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae), config.kind != "gba")
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.scale = nn.Parameter(torch.ones(config.d_sae), config.kind == "gba")
        self.threshold = nn.Parameter(torch.zeros(config.d_sae), config.kind == "jumprelu")

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """Column j is what latent j reads; a view, whose columns are contiguous."""
        return self._encoder.T

    @property
    def encoder(self) -> Float[Tensor, "d_sae d_in"]:
        """The parameter behind W_enc, latent by latent."""
        return self._encoder

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """Row j is the direction of latent j (tied: the encoder's column j)."""
        return self._encoder if self.config.tied else self._decoder

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.config.d_sae

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self._encoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self._encoder.dtype

    def normalise(
        self, x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n 1"]]:
        """u and the norms to multiply back; UserError where x has another width."""
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise UserError(
                f"The SAE reads activations [n, d_in={self.d_in}], got shape {list(x.shape)}."
            )
        x = x.to(self._encoder.dtype)
        if self.config.normalize == "none":
            return x, x.new_ones(x.shape[0], 1)
        norm = x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return x / norm, norm

    @torch.no_grad()
    def pre_activations(
        self, u: Float[Tensor, "n d_in"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "n d_sae"]:
        """(u - b_dec) W_enc + b_enc, multiplied in `dtype`; no gradient."""
        if dtype == self._encoder.dtype or dtype == torch.float32:
            return torch.addmm(self.b_enc, u - self.b_dec, self.W_enc)
        return torch.addmm(self.b_enc.to(dtype), (u - self.b_dec).to(dtype), self.W_enc.to(dtype))

    def select(self, pre: Float[Tensor, "n d_sae"]) -> Codes:
        """Active entries with their pre-activations; BatchTopK ranks the batch in training only."""
        match self.config.kind:
            case "relu" | "gba":
                return nonlinearity.relu(pre)
            case "topk":
                return nonlinearity.topk(pre, self.config.k)
            case "batch_topk" if self.training:
                return nonlinearity.batch_topk(pre, self.config.k)
            case _:
                return nonlinearity.jumprelu(pre, self.threshold)

    def gate(self, codes: Codes) -> Codes:
        """Activations from active pre-activations (gba with gate jumprelu: minus the bias)."""
        if self.config.kind == "gba" and self.config.gate == "jumprelu":
            return codes.with_values(codes.values - self.b_enc.index_select(0, codes.col))
        return codes

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> Codes:
        """Activations of the active latents only, without gradient."""
        u, _ = self.normalise(x)
        return self.codes_of(u)

    @torch.no_grad()
    def codes_of(self, u: Float[Tensor, "n d_in"]) -> Codes:
        """`encode_sparse` of tokens that are normalised; a block at a time on the processor."""
        if self.config.kind in ("gba", "relu") and not u.is_cuda:
            x = u - self.b_dec
            if active.is_exact_quicker(x, self.d_sae):
                return self.gate(active.exact_codes(x, self.W_enc, self.b_enc))
            return self.gate(active.active_codes(x, self.W_enc, self.b_enc, dtype=u.dtype))
        return self.gate(self.select(self.pre_activations(u)))

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Dense activations [n, d_sae], without gradient."""
        return self.encode_sparse(x).to_dense()

    def decode(self, acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        """(acts * scale) W_dec + b_dec: the reconstruction of u, that is of a normalised token."""
        return (acts * self.scale) @ self.W_dec + self.b_dec

    def scaled(self, codes: Codes) -> Codes:
        """Activations times their latents' scale: what multiplies the rows of W_dec."""
        if self.config.kind != "gba":  # scale is 1 for every other kind
            return codes
        return codes.with_values(codes.values * autograd.lookup(self.scale, codes))

    def decode_sparse(self, codes: Codes) -> Float[Tensor, "n d_in"]:
        """As `decode`, from codes; differentiable in their values and in the decoder."""
        return autograd.decode(self.scaled(codes), self.W_dec) + self.b_dec

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Reconstruction in the units and dtype of x, without gradient and without a dense code."""
        u, norm = self.normalise(x)
        return (self.decode_sparse(self.codes_of(u)) * norm).to(x.dtype)

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "n d_in"]) -> SAEOutput:
        """Dense outputs for inspection, without gradient; training goes by step.py."""
        u, norm = self.normalise(x)
        pre = self.pre_activations(u)
        acts = self.gate(self.select(pre)).to_dense()
        return SAEOutput(self.decode(acts) * norm, acts, pre)

    def unit_matrices(self) -> list[Tensor]:
        """The parameters [d_sae, d_in] whose rows training keeps at unit norm."""
        found: list[Tensor] = [self._encoder] if self.config.kind == "gba" else []
        if not self.config.tied:
            found.append(self._decoder)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Named tensors as saved: W_dec only where it is its own."""
        names = ["W_enc", "b_enc", "b_dec", "scale", "threshold"]
        names += [] if self.config.tied else ["W_dec"]
        return {name: getattr(self, name).detach().contiguous().cpu() for name in names}

    def hash(self) -> str:
        """sha256 of configuration and weights."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode() + tensor.float().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy saved tensors in; UserError where a name or shape does not fit."""
        expected = self.tensors()
        if set(tensors) != set(expected):
            raise UserError(f"Expected tensors {sorted(expected)}, got {sorted(tensors)}.")
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                raise UserError(
                    f"Tensor {name} must have shape {list(expected[name].shape)}, "
                    f"got {list(tensor.shape)}."
                )
            getattr(self, name).copy_(tensor)


def save_sae(
    folder: Path | str, sae: SAE, extra: dict[str, Any] | None = None, *, overwrite: bool = False
) -> None:
    """Write sae.safetensors, config.json and a manifest with checksums; atomic.

    Args:
        extra: JSON-able facts that travel with the SAE (hook point, model, frequencies, ...).
    """
    from safetensors.torch import save_file

    with atomic_folder(Path(folder), overwrite=overwrite) as tmp:
        save_file(sae.tensors(), tmp / "sae.safetensors")
        config = {"sae": asdict(sae.config), "extra": extra or {}}
        (tmp / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def load_sae(folder: Path | str) -> tuple[SAE, dict[str, Any]]:
    """Read what `save_sae` wrote; CorruptFileError where a checksum or key does not fit."""
    from safetensors.torch import load_file

    folder = Path(folder)
    verify_folder(folder)
    config = read_object(folder / "config.json")
    with reading("an SAE", folder):
        tensors, asked = load_file(folder / "sae.safetensors"), SAEConfig(**config["sae"])
        if tensors["W_enc"].shape != (asked.d_in, asked.d_sae):  # before memory is asked for
            raise ValueError(f"W_enc {list(tensors['W_enc'].shape)} for {asked}")
        sae = SAE(asked)
        sae.set_tensors(tensors)
        return sae.eval(), dict(config["extra"])
