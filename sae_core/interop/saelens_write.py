"""Write an SAE as a SAELens folder, so that sae-lens 6 loads it with SAE.load_from_disk.

| here | there |
| gba, gate relu; relu | standard |
| gba, gate jumprelu: y = (u - b_dec) W_enc where y > -b_enc | jumprelu: b_enc 0, threshold -b_enc |
| topk | topk |
| batch_topk, jumprelu | jumprelu |

`scale` goes into W_dec. normalize="token", u = x / ||x||, becomes constant_norm_rescale, z = s u
with s = sqrt(d_in): W_enc / s, s W_dec and s b_dec give the same codes and reconstruction.
"""

import json
from copy import deepcopy
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from sae_core.errors import UserError
from sae_core.interop.checks import check_conversion
from sae_core.interop.hook_names import to_transformer_lens
from sae_core.interop.saelens import FLOOR, lens_original, load_lens
from sae_core.interop.saelens_config import CONFIG, NONE, PER_TOKEN, SPARSITY, WEIGHTS
from sae_core.sae import SAE
from sae_core.store import atomic_folder

LENS_VERSION = "6.0.0"  # of the format: what is older is read in another way there


def write_sae_lens(
    sae: SAE,
    folder: Path | str,
    facts: dict[str, Any] | None = None,
    *,
    x: Float[Tensor, "n d_in"] | None = None,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write cfg.json, sae_weights.safetensors and, where facts know it, sparsity.safetensors.

    The files are read back and compared with the SAE before the folder takes its name.

    Args:
        sae: of any kind.
        folder: new or empty; with overwrite also one that was written so.
        facts: what `load_sae` returns beside the SAE: model_id, hook_point, freq, ...
        x: real activations [n, d_in] to check the files on, beside random ones.
    Returns:
        What was folded, and what the format cannot say, one sentence each.
    Raises:
        UserError: the folder is taken, or the codes cannot be expressed there.
        ConversionError: the files do not compute what the SAE computes; nothing was written.
    """
    facts = facts or {}
    architecture, tensors, notes = lens_tensors(sae)
    config = _config(sae, architecture, facts)
    if config["metadata"].get("hook_name") is None and facts.get("hook_point"):
        notes += (f"TransformerLens has no name for {facts['hook_point']}: hook_name is absent.",)
    with atomic_folder(folder, overwrite=overwrite) as temp:
        save_file(tensors, temp / WEIGHTS)
        (temp / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")
        if (freq := facts.get("freq")) is not None and len(freq) == sae.d_sae:
            rate = torch.tensor(freq, dtype=torch.float64)
            save_file({"sparsity": (rate + FLOOR).log10().float()}, temp / SPARSITY)
        is_ready = sae.W_enc.device.type == "cpu" and not sae.training
        checked = sae if is_ready else deepcopy(sae).cpu().eval()
        check_conversion(lens_original(*load_lens(temp)), checked, x)
    return notes


@torch.no_grad()
def lens_tensors(sae: SAE) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """Architecture, tensors and notes.

    Raises:
        UserError: a GBA bias above 0 with gate jumprelu, or a JumpReLU threshold below 0, either
            of which lets a latent fire with a negative code, which SAELens cannot express.
    """
    parts = {name: tensor.double() for name, tensor in sae.tensors().items()}
    step = sqrt(sae.d_in) if sae.config.normalize == "token" else 1.0
    W_dec = sae.W_dec.detach().double().cpu() * parts["scale"][:, None]
    tensors = {
        "W_enc": parts["W_enc"] / step, "b_enc": parts["b_enc"],
        "W_dec": W_dec * step, "b_dec": parts["b_dec"] * step,
    }  # fmt: skip
    notes: list[str] = []
    kind, is_gba = sae.config.kind, sae.config.kind == "gba"
    architecture = {"topk": "topk", "relu": "standard"}.get(kind, "jumprelu")
    if is_gba and sae.config.gate == "relu":
        architecture = "standard"
    elif is_gba:
        tensors |= {"threshold": -parts["b_enc"], "b_enc": torch.zeros_like(parts["b_enc"])}
        notes.append("GBA's biases became thresholds: they decide when a latent fires.")
    elif architecture == "jumprelu":
        tensors["threshold"] = parts["threshold"]
    _refuse_negative(tensors.get("threshold"), "biases above 0" if is_gba else "thresholds below 0")
    if kind == "batch_topk":
        notes.append("BatchTopK is written as its inference form, JumpReLU; k is not kept.")
    if not bool((parts["scale"] == 1).all()):
        notes.append("The output scale was multiplied into W_dec, whose rows lose unit norm.")
    if sae.config.tied:
        notes.append("Tied weights are written as two matrices.")
    if step != 1:
        notes.append(
            "Tokens are normalised by constant_norm_rescale: in SAELens decode takes each token's "
            "norm from the encode before it, so codes alone cannot be decoded."
        )
    return architecture, {n: t.float().contiguous() for n, t in tensors.items()}, tuple(notes)


def _refuse_negative(threshold: Tensor | None, what: str) -> None:
    n = 0 if threshold is None else int((threshold < 0).sum())
    if n:
        raise UserError(
            f"Expected codes that are never negative, got {n} latents with {what}, which fire with "
            "negative codes too: SAELens has no such SAE. Training ends by lowering them to 0."
        )


def _config(sae: SAE, architecture: str, facts: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"sae_lens_version": LENS_VERSION, "sae_apps_hash": sae.hash()}
    hook_point = facts.get("hook_point")
    if facts.get("model_id"):
        metadata["model_name"] = facts["model_id"]
    if hook_point:
        metadata |= {
            "hook_name": to_transformer_lens(hook_point), "sae_apps_hook_point": hook_point,
        }  # fmt: skip
    metadata["sae_apps_kind"] = sae.config.kind
    config = {
        "architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae,
        "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": PER_TOKEN if sae.config.normalize == "token" else NONE,
        "reshape_activations": NONE, "metadata": metadata,
    }  # fmt: skip
    if architecture == "topk":
        config |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    return config
