"""Read SAELens folders, cfg.json and sae_weights.safetensors (sae-lens 6.54.12, sae_lens/saes).

With z = x, or sqrt(d_in) x / ||x|| for constant_norm_rescale, less b_dec if apply_b_dec_to_input,
pre = z W_enc + b_enc, and n_j = ||W_dec[j]|| where rescale_acts_by_decoder_norm, else 1:

    standard                  relu(pre)
    topk                      relu of the k largest of n pre
    jumprelu                  relu(pre) where pre > threshold
    batchtopk, matryoshka...  relu(n pre) where n pre > topk_threshold   (as exported for inference)
    gated                     relu(z e^r_mag W_enc + b_mag) where z W_enc + b_gate > 0

    x_hat = (acts / n) W_dec + b_dec, divided by what x was multiplied by
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.interop.build import Parts, build_sae
from sae_core.interop.checks import check_conversion
from sae_core.interop.files import check_tensors, dtype_note, need_files, read_tensors
from sae_core.interop.gated import jump_parts
from sae_core.interop.hook_names import from_transformer_lens
from sae_core.interop.result import Converted, Original
from sae_core.interop.saelens_config import (
    BATCH,
    CONFIG,
    PER_TOKEN,
    SPARSITY,
    WEIGHTS,
    LensConfig,
    read_lens_config,
    without_old_names,
)
from sae_core.sae import SAE, Kind

KINDS: dict[str, Kind] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "jumprelu",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
}
FLOOR = 1e-10  # SAELens adds it before the logarithm of a firing rate


def read_sae_lens(
    folder: Path | str, *, x: Float[Tensor, "n d_in"] | None = None
) -> Converted:
    """The SAE in a SAELens folder.

    standard becomes kind relu, topk topk, jumprelu and gated jumprelu, batchtopk and
    matryoshka_batchtopk batch_topk with the stored threshold.

    Args:
        folder: with cfg.json and sae_weights.safetensors.
        x: real activations [n, d_in] to check the conversion on, beside random ones.
    Raises:
        UserError: files, names, shapes or values are not as expected; an architecture or a
            treatment of the input that cannot be held exactly.
        ConversionError: the SAE does not compute what the file's formula computes.
    """
    folder = Path(folder)
    config, tensors = load_lens(folder)
    sae = _convert(config, {name: tensor.double() for name, tensor in tensors.items()})
    check_conversion(lens_original(config, tensors), sae, x)
    facts = _facts(config, folder)
    return Converted(sae, dtype_note(tensors, "SAELens") + _notes(config, folder), facts)


def load_lens(folder: Path) -> tuple[LensConfig, dict[str, Tensor]]:
    """Configuration and tensors of a SAELens folder, checked.

    Raises:
        UserError: see `read_sae_lens`.
    """
    need_files(folder, (CONFIG, WEIGHTS))
    config = read_lens_config(folder)
    tensors = without_old_names(read_tensors(folder / WEIGHTS))
    check_tensors(folder / WEIGHTS, tensors, config.shapes())
    return config, tensors


def lens_original(config: LensConfig, tensors: Mapping[str, Tensor]) -> Original:
    """SAELens's own `encode` and `decode` in float64.

    Args:
        config: from `load_lens`, with the tensors.
    """
    t = {name: tensor.double() for name, tensor in tensors.items()}
    norm = t["W_dec"].norm(dim=1).clamp_min(1e-8) if config.is_rescaled else torch.ones(())

    def factor(x: Tensor) -> Tensor:
        if config.normalize == PER_TOKEN:
            return config.d_in**0.5 / x.norm(dim=-1, keepdim=True)
        return torch.full((), config.input_scale, dtype=torch.float64)

    def encode(x: Tensor) -> Tensor:
        z = x * factor(x) - (t["b_dec"] if config.is_centred else 0)
        if config.architecture == "gated":
            gate = (z @ t["W_enc"] + t["b_gate"] > 0).double()
            return gate * torch.relu(z @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"])
        pre = (z @ t["W_enc"] + t["b_enc"]) * norm
        if config.architecture == "topk":
            top = pre.topk(int(config.k), dim=-1)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        if config.architecture == "standard":
            return torch.relu(pre)
        name = "topk_threshold" if config.architecture in BATCH else "threshold"
        return torch.relu(pre) * (pre > t[name])

    def decode(acts: Tensor, x: Tensor) -> Tensor:
        return ((acts / norm) @ t["W_dec"] + t["b_dec"]) / factor(x)

    return Original(encode, decode)


def _convert(config: LensConfig, t: dict[str, Tensor]) -> SAE:
    if config.architecture == "gated":
        names = ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")
        parts = jump_parts(*(t[name] for name in names))
    else:
        parts = Parts(t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], t.get("threshold"))
    if config.architecture in BATCH:
        parts = parts._replace(threshold=t["topk_threshold"].expand_as(parts.b_enc))
    if config.is_rescaled:
        parts = parts.decoder_norm_in_codes()
    if not config.is_centred:
        parts = parts.uncentred()
    parts = parts.rescaled(config.input_scale)
    kind, k = KINDS[config.architecture], round(config.k)
    if config.normalize == PER_TOKEN:
        return build_sae(kind, parts.of_unit_tokens(), k=k, normalize="token")
    return build_sae(kind, parts, k=k)


def _notes(config: LensConfig, folder: Path) -> tuple[str, ...]:
    notes = []
    if config.is_rescaled:
        notes.append("The norms of the decoder rows were multiplied into the encoder.")
    if not config.is_centred:
        notes.append("The encoder reads x, not x - b_dec: b_dec W_enc was added to b_enc.")
    if config.normalize == PER_TOKEN:
        notes.append("Tokens are scaled to norm 1 instead of sqrt(d_in), the weights with them.")
    if config.input_scale != 1:
        notes.append(f"The activation scale {config.input_scale:.7g} was multiplied into W_enc.")
    if config.is_hook_z:
        notes.append("Activations of the heads must come flattened, [n, n_heads * d_head].")
    if config.architecture == "gated":
        notes.append("Gate and magnitude became one JumpReLU with a threshold; the codes agree.")
    if config.architecture in BATCH:
        notes.append("The codes are those of SAELens's inference model: a threshold, no ranking.")
        if config.k != round(config.k):
            notes.append(f"k = {config.k:g}, which only training uses, became {round(config.k)}.")
    name = config.metadata.get("hook_name")
    if name and from_transformer_lens(name) is None:
        notes.append(f"The hook {name!r} has no canonical name here and is not carried.")
    known = {CONFIG, WEIGHTS, SPARSITY, "activation_scaler.json", "manifest.json"}
    rest = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in known)
    if rest:
        notes.append(f"Other files of the folder are not read: {', '.join(rest)}.")
    return tuple(notes)


def _facts(config: LensConfig, folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"converted_from": f"sae_lens {config.architecture}"}
    if config.metadata.get("model_name"):
        facts["model_id"] = config.metadata["model_name"]
    own = config.metadata.get("sae_apps_hook_point")  # what we wrote there ourselves
    hook_point = own or from_transformer_lens(config.metadata.get("hook_name") or "")
    if hook_point:
        facts["hook_point"] = hook_point
    if (folder / SPARSITY).is_file():
        sparsity = read_tensors(folder / SPARSITY)
        check_tensors(folder / SPARSITY, sparsity, {"sparsity": (config.d_sae,)})
        freq = (10 ** sparsity["sparsity"].double() - FLOOR).clamp(0, 1)
        facts["freq"] = freq.tolist()
    return facts
