"""Units of one layer: where their values come from and how an edited value is written back.

    latents    a = SAE(x),  x' = x - ||x|| sum_j (a_j - a_j') scale_j W_dec[j]
    residual   a = x,       x'_j = a_j'           (dimensions of the hook point)
    neurons    a = x,       x'_j = a_j'           (input of the MLP's down projection)

All three go through the same histograms, posteriors and hooks, so that a language model and SAEs
of it are compared on equal terms. Latents are never negative and mostly zero; the others take both
signs (``two_sided``).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_apps.suppression.reader import LatentReader, read_latents
from sae_core.activations import resolve_hook_point
from sae_core.encoder import SparseEncoder
from sae_core.errors import UserError
from sae_core.hooks import decoder_blocks
from sae_core.kernels.codes import Codes
from sae_core.metrics import evaluating
from sae_core.models import LanguageModel
from sae_core.sae import SAE, load_sae

KINDS = ("latents", "residual", "neurons")
_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2")


@dataclass(frozen=True, eq=False)
class Units:
    """Units of one hook point, all of them or a chosen few."""

    kind: str
    """latents, residual or neurons."""
    hook_point: str
    """Where they are read and written, as the model names it."""
    n_units: int
    """Number of units."""
    d_in: int
    """Width of the hook point."""
    model_id: str
    """The language model."""
    model_revision: str
    """Its weights."""
    sae: SparseEncoder | None = None
    """latents: the SAE, or a Monet router (read only); None for the others, and for latents read
    from a file."""
    sae_hash: str = "none"
    """sha256 of the SAE; none for the others."""
    index: Int[Tensor, " u"] | None = None
    """Numbers of the chosen units, ascending or not; None: all."""
    reader: LatentReader | None = None
    """latents, chosen: what reads them."""

    @property
    def two_sided(self) -> bool:
        """Whether values may be negative: no atom at zero then."""
        return self.kind != "latents"

    def values(self, x: Float[Tensor, "n d_in"]) -> Codes | Float[Tensor, "n u"]:
        """Values of the units: sparse for all latents of an SAE, else dense, in float32.

        Differentiable in x, but for all latents of an SAE.

        Raises:
            UserError: x has another width.
        """
        if x.shape[-1] != self.d_in:
            raise UserError(
                f"Expected activations of width {self.d_in} at {self.hook_point}, "
                f"got {x.shape[-1]}."
            )
        if self.reader is not None:
            return self.reader.values(x.float())
        if self.sae is not None:
            with evaluating(self.sae):
                return self.sae.encode_sparse(x.to(self.sae.device, self.sae.dtype))
        return x.float() if self.index is None else x.float().index_select(1, self.index)

    def write(
        self,
        x: Float[Tensor, "n d_in"],
        old: Float[Tensor, "n u"],
        new: Float[Tensor, "n u"],
    ) -> Float[Tensor, "n d_in"]:
        """x with the chosen units at their new values and everything else as it was.

        Raises:
            UserError: all latents of an SAE at once: choose some with ``take``.
        """
        if self.reader is not None:
            return self.reader.subtract(x, old - new)
        if self.sae is not None:
            raise UserError(f"Expected chosen latents, got all {self.n_units}: use take() first.")
        if self.index is None:
            return x - (old - new)
        return x.index_add(1, self.index, (new - old).to(x.dtype))

    def take(self, index: Int[Tensor, " u"]) -> "Units":
        """Only the units with these numbers, in this order.

        Raises:
            UserError: numbers that are not there, or twice; units that are a choice already.
        """
        if self.index is not None:
            raise UserError(f"Expected all units, got a choice of {self.n_units} already.")
        index = index.to(torch.int64)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.n_units:
            raise UserError(
                f"Expected units in 0..{self.n_units - 1}, "
                f"got {int(index.min())}..{int(index.max())}."
            )
        if len(torch.unique(index)) != len(index):
            raise UserError(f"Expected each unit once, got {len(index)} with repetitions.")
        if self.sae is not None and not isinstance(self.sae, SAE):
            raise UserError(
                "Expected an SAE to choose latents of, got experts: they have no fixed direction "
                "to write to; delete them with masked_experts."
            )
        return Units(
            self.kind,
            self.hook_point,
            len(index),
            self.d_in,
            self.model_id,
            self.model_revision,
            None,
            self.sae_hash,
            index,
            None if self.sae is None else read_latents(self.sae, index),
        )

    def to(self, device: torch.device | str) -> "Units":
        """The same on another device; the SAE itself stays where it is."""
        if self.index is None:
            return self
        reader = None if self.reader is None else self.reader.to(device)
        return Units(
            self.kind,
            self.hook_point,
            self.n_units,
            self.d_in,
            self.model_id,
            self.model_revision,
            None,
            self.sae_hash,
            self.index.to(device),
            reader,
        )


def open_units(
    lm: LanguageModel,
    sae: SparseEncoder | str | Path | None = None,
    hook_point: str | None = None,
    kind: str = "latents",
) -> Units:
    """All units of one kind at one place of a language model.

    Args:
        lm: model and tokenizer.
        sae: for latents: an SAE, or the folder of one (then it says where it was trained); or the
            routing of a Monet model, whose experts are read as latents.
        hook_point: e.g. ``layers.15.out``; None takes what the folder of the SAE says. For neurons
            any hook point of the layer, or the path of a module with ``.in`` or ``.out``.
        kind: latents, residual or neurons.
    Raises:
        UserError: unknown kind, no hook point, an SAE of another model, layer or width.
    """
    if kind not in KINDS:
        raise UserError(f"Expected a kind of units of {KINDS}, got {kind!r}.")
    if (kind == "latents") != (sae is not None):
        raise UserError(
            f"Expected an SAE for units 'latents' and none for the others, got kind {kind!r} "
            f"{'without' if sae is None else 'with'} one."
        )
    if isinstance(sae, (str, Path)):
        sae, hook_point = _load(lm, Path(sae), hook_point)
    if hook_point is None:
        raise UserError(f"Expected the hook point of the {kind}, e.g. 'layers.15.out', got None.")
    if kind == "neurons":
        hook_point = _down_projection(lm.model, hook_point)
    point = resolve_hook_point(lm.model, hook_point)
    width = _width(lm, point.path, point.side)
    if sae is not None and sae.d_in != width:
        raise UserError(
            f"Expected an SAE of width d_in {width} for {hook_point} of {lm.model_id}, "
            f"got one of {sae.d_in}: it belongs to another model or hook point."
        )
    n_units = width if sae is None else sae.d_sae
    digest = "none" if sae is None else sae.hash()
    return Units(kind, hook_point, n_units, width, lm.model_id, lm.revision, sae, digest)


def _load(lm: LanguageModel, path: Path, hook_point: str | None) -> tuple[SAE, str]:
    folder = path / "sae" if (path / "sae" / "config.json").is_file() else path
    sae, facts = load_sae(folder)
    trained = facts.get("hook_point") or hook_point
    if trained is None:
        raise UserError(f"Expected the SAE in {folder} to say its hook_point, got none: name it.")
    if hook_point not in (None, trained):
        raise UserError(f"Expected the layer of the SAE in {folder}, {trained}, got {hook_point}.")
    revision = facts.get("model_revision") or "unknown"
    known = "unknown" not in (revision, lm.revision)
    named = facts.get("model_id") or lm.model_id
    if (revision != lm.revision) if known else (named != lm.model_id):
        raise UserError(
            f"Expected the model that the SAE in {folder} was trained on, {named} "
            f"({revision[:12]}), got {lm.model_id} ({lm.revision[:12]})."
        )
    return sae.to(lm.device).eval(), trained


def _down_projection(model: nn.Module, hook_point: str) -> str:
    """Input of the last matrix of the MLP in the layer of a canonical hook point."""
    parts = hook_point.split(".")
    if parts[0] != "layers" or len(parts) < 2 or not parts[1].isdigit():
        return hook_point
    path, blocks = decoder_blocks(model)
    if int(parts[1]) >= len(blocks):
        raise UserError(f"Expected a layer in 0..{len(blocks) - 1}, got {parts[1]}.")
    mlp = getattr(blocks[int(parts[1])], "mlp", None)
    name = next((one for one in _DOWN if hasattr(mlp, one)), None)
    if name is None:
        raise UserError(f"Expected an MLP with one of {_DOWN} in layer {parts[1]}, got none.")
    return f"{path}.{parts[1]}.mlp.{name}.in"


def _width(lm: LanguageModel, path: str, side: str) -> int:
    """Width of the value: of a linear module its own, else that of the residual stream."""
    module = lm.model.get_submodule(path)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return lm.d_model
    if type(module).__name__ == "Conv1D":  # transformers stores it [in, out]
        return weight.shape[0 if side == "in" else 1]
    return weight.shape[1 if side == "in" else 0]
