"""Read sparsify's sparse coders (eai-sparsify 1.3.3, sparsify/sparse_coder.py).

A folder `<hookpoint>/` or `<hookpoint>/seed<N>/` holds cfg.json and sae.safetensors:

    acts  = the k largest of relu((x - b_dec) encoder.weight^T + encoder.bias)
    x_hat = acts W_dec + b_dec
"""

import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import UserError
from sae_core.interop.build import Parts, build_sae
from sae_core.interop.checks import check_conversion
from sae_core.interop.files import (
    check_tensors,
    dtype_note,
    need,
    need_files,
    read_object,
    read_tensors,
)
from sae_core.interop.result import Converted, Original

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read_sparsify(
    folder: Path | str, *, x: Float[Tensor, "n d_in"] | None = None
) -> Converted:
    """The sparse coder in a folder, as an SAE of kind topk.

    Args:
        folder: `<hookpoint>/` or `<hookpoint>/seed<N>/`.
        x: real activations [n, d_in] to check the conversion on, beside random ones.
    Raises:
        UserError: files, names, shapes or values are not as expected; or a transcoder, a skip
            connection or GroupMax, which have no counterpart here.
        ConversionError: the SAE does not compute what the file's formula computes.
    """
    folder = Path(folder)
    need_files(folder, (CONFIG, WEIGHTS))
    config, tensors = read_object(folder / CONFIG), read_tensors(folder / WEIGHTS)
    d_in = need(config, "d_in", int, folder / CONFIG)
    k = need(config, "k", int, folder / CONFIG)
    _refuse_others(config, tensors, folder)
    n_latents = config.get("num_latents") or d_in * need(
        config, "expansion_factor", int, folder / CONFIG
    )
    matrix = (n_latents, d_in)
    shapes = {"encoder.weight": matrix, "encoder.bias": (n_latents,)}
    check_tensors(folder / WEIGHTS, tensors, shapes | {"W_dec": matrix, "b_dec": (d_in,)})
    if not 1 <= k <= n_latents:
        raise UserError(f"{folder / CONFIG} must give k in 1..{n_latents}, got {k}.")
    W_enc = tensors["encoder.weight"].T
    parts = Parts(W_enc, tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"])
    sae = build_sae("topk", parts, k=k)
    check_conversion(sparsify_original(k, tensors), sae, x)
    notes = dtype_note(tensors, "sparsify")
    if config.get("multi_topk"):
        notes += ("Multi-TopK was a term of the training loss; the codes do not know it.",)
    facts: dict[str, Any] = {"converted_from": "sparsify"}
    return Converted(sae, notes, facts | {"hook_point": hook_point_of(folder)})


def sparsify_original(k: int, tensors: dict[str, Tensor]) -> Original:
    """SparseCoder.encode and .decode of a sparse autoencoder (transcode false) in float64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def encode(x: Tensor) -> Tensor:
        acts = torch.relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
        top = acts.topk(k, dim=-1)
        return torch.zeros_like(acts).scatter(-1, top.indices, top.values)

    return Original(encode, lambda acts, x: acts @ t["W_dec"] + t["b_dec"])


def hook_point_of(folder: Path) -> str:
    """The hook point of a folder's name: `layers.5.mlp/seed0` is the output of `layers.5.mlp`."""
    folder = folder.resolve()
    name = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else folder.name
    return f"{name}.out"


def _refuse_others(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    where = folder / CONFIG
    if config.get("transcode"):
        raise UserError(
            f"Expected a sparse autoencoder in {where}, got a transcoder (transcode true), which "
            "predicts a module's output from its input."
        )
    if config.get("skip_connection") or "W_skip" in tensors:
        raise UserError(
            f"Expected a sparse autoencoder in {where}, got one with a skip connection (W_skip), "
            "which has no counterpart here."
        )
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise UserError(f"Expected the activation 'topk' in {where}, got {activation!r}.")
