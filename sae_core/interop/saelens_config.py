"""The cfg.json of a SAELens folder, checked and without the differences between its versions."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_core.errors import UserError
from sae_core.interop.files import Shapes, need, read_object

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SCALER = "activation_scaler.json"
NAMES = ("model_name", "hook_name", "sae_apps_hook_point")
BATCH = ("batchtopk", "matryoshka_batchtopk")
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", *BATCH)
NONE, PER_TOKEN, AVERAGE = "none", "constant_norm_rescale", "expected_average_only_in"


@dataclass(frozen=True)
class LensConfig:
    """What decides how a SAELens SAE computes."""

    architecture: str
    """One of ARCHITECTURES."""
    d_in: int
    d_sae: int
    is_centred: bool = True
    """Whether the encoder reads x - b_dec (apply_b_dec_to_input)."""
    normalize: str = NONE
    """none, or constant_norm_rescale: every token at norm sqrt(d_in)."""
    input_scale: float = 1.0
    """What x is multiplied by before encoding; from the activation scaler of a checkpoint."""
    is_hook_z: bool = False
    """Whether activations come as [n, heads, d_head] there."""
    k: float = 0.0
    """topk and batchtopk."""
    is_rescaled: bool = False
    """topk and batchtopk: codes are multiplied by the norm of their decoder row."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The free dictionary: model_name, hook_name, ..."""

    def shapes(self) -> Shapes:
        """Names and shapes of the tensors that belong to it."""
        wide: Shapes = {
            "W_enc": (self.d_in, self.d_sae), "W_dec": (self.d_sae, self.d_in),
            "b_dec": (self.d_in,),
        }  # fmt: skip
        match self.architecture:
            case "gated":
                return wide | {name: (self.d_sae,) for name in ("b_gate", "b_mag", "r_mag")}
            case "jumprelu":
                return wide | {"b_enc": (self.d_sae,), "threshold": (self.d_sae,)}
            case "standard" | "topk":
                return wide | {"b_enc": (self.d_sae,)}
            case _:
                return wide | {"b_enc": (self.d_sae,), "topk_threshold": ()}


def read_lens_config(folder: Path) -> LensConfig:
    """cfg.json of a SAELens folder.

    Raises:
        UserError: a key is absent or has another type, an architecture or a treatment of the
            input that is not known here or cannot be held exactly.
    """
    file = folder / CONFIG
    raw = read_object(file)
    architecture = _architecture(raw, file)
    k = raw.get("k", _part(raw, "activation_fn_kwargs", file).get("k", 0))
    has_k = architecture == "topk" or architecture in BATCH
    d_sae = need(raw, "d_sae", int, file)
    if has_k and not (isinstance(k, int | float) and 1 <= k <= d_sae):
        raise UserError(f"{file} must give k in 1..{d_sae}, got {k!r}.")
    normalize, scale = _normalisation(raw, folder)
    reshape = raw.get("reshape_activations", NONE)
    if reshape not in (NONE, "hook_z"):
        raise UserError(f"Expected reshape_activations none or hook_z in {file}, got {reshape!r}.")
    return LensConfig(
        architecture,
        need(raw, "d_in", int, file),
        d_sae,
        is_centred=bool(raw.get("apply_b_dec_to_input", True)),
        normalize=normalize,
        input_scale=scale,
        is_hook_z=reshape == "hook_z",
        k=float(k) if has_k else 0.0,
        is_rescaled=has_k and bool(raw.get("rescale_acts_by_decoder_norm", architecture in BATCH)),
        metadata=_metadata(raw, file),
    )


def _part(raw: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    """The object under a key; an empty one where it is absent or null."""
    return need({key: raw.get(key) or {}}, key, dict, file)


def _metadata(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """The free dictionary; before version 6 its entries stood in the configuration itself."""
    metadata = _part(raw, "metadata", file) or {k: raw[k] for k in NAMES if k in raw}
    for key in NAMES:
        if metadata.get(key) is not None:
            need(metadata, key, str, file)
    return metadata


def _architecture(raw: dict[str, Any], file: Path) -> str:
    """`architecture`, or what SAELens before version 6 says in activation_fn."""
    function = raw.get("activation_fn", raw.get("activation_fn_str", "relu"))
    architecture = raw.get("architecture", "standard" if "activation_fn_str" in raw else None)
    if architecture == "standard" and function == "topk":
        return "topk"
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"Expected an architecture of {', '.join(ARCHITECTURES)} in {file}, "
            f"got {architecture!r}."
        )
    if function not in ("relu", "topk"):
        raise UserError(f"Expected the activation function relu in {file}, got {function!r}.")
    return architecture


def _normalisation(raw: dict[str, Any], folder: Path) -> tuple[str, float]:
    name = raw.get("normalize_activations", NONE)
    if isinstance(name, bool):
        name = AVERAGE if name else NONE
    if name in (NONE, None):
        return NONE, 1.0
    if name == PER_TOKEN:
        return PER_TOKEN, 1.0
    if name == AVERAGE and (folder / SCALER).is_file():
        scale = read_object(folder / SCALER).get("scaling_factor")
        if isinstance(scale, float) and scale > 0:
            return NONE, scale
    why = f"without a scaling factor in {SCALER}" if name == AVERAGE else "not held exactly here"
    raise UserError(
        f"Expected normalize_activations {NONE} or {PER_TOKEN} in {folder / CONFIG}, "
        f"got {name!r}, {why}."
    )


def without_old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under today's names: `log_threshold` is the logarithm of `threshold`, and `scaling_factor`,
    which older versions wrote although it was 1, is left out.

    Raises:
        UserError: scaling_factor is not 1.
    """
    logarithm = tensors.get("log_threshold")
    if logarithm is not None and not logarithm.is_complex() and "threshold" not in tensors:
        tensors = tensors | {"threshold": logarithm.double().exp().float()}
        del tensors["log_threshold"]
    scaling = tensors.get("scaling_factor")
    if scaling is None:
        return tensors
    if scaling.is_complex() or not bool((scaling.double() == 1).all()):
        raise UserError(
            "Expected a scaling_factor of 1, got another: SAELens 6 does not apply the finetuning "
            "scale any more, so its meaning is not certain."
        )
    return {name: tensor for name, tensor in tensors.items() if name != "scaling_factor"}
