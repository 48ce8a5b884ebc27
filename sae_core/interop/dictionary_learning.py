"""Read the dictionaries of dictionary_learning (0.1.0: dictionary.py and trainers/*.py).

A folder `trainer_<i>/` holds config.json and ae.pt, a pickled state dict of which only tensors are
read (`pickled`). With u = x - b_dec:

    AutoEncoder                  relu(u W_enc + b_enc)
    AutoEncoderNew               relu(x W_enc + b_enc)
    AutoEncoderTopK              the k largest of relu(u W_enc + b_enc)
    BatchTopKSAE, Matryoshka...  relu(pre) where relu(pre) > threshold
    JumpReluAutoEncoder          relu(pre) where pre > threshold, pre = x W_enc + b_enc
    GatedAutoEncoder             relu(e^r_mag (u W_enc) + mag_bias) where u W_enc + gate_bias > 0
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import UserError
from sae_core.interop.build import Parts, build_sae
from sae_core.interop.checks import check_conversion
from sae_core.interop.files import Shapes, check_tensors, dtype_note, need, need_files, read_object
from sae_core.interop.gated import jump_parts
from sae_core.interop.pickled import load_state
from sae_core.interop.result import Converted, Original
from sae_core.sae import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
TOPK, BATCH, MATRYOSHKA = "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"
JUMP, GATED, PLAIN, NEW = "JumpReluAutoEncoder", "GatedAutoEncoder", "AutoEncoder", "AutoEncoderNew"
CLASSES = (PLAIN, NEW, TOPK, BATCH, MATRYOSHKA, JUMP, GATED)


def read_dictionary_learning(
    folder: Path | str, *, x: Float[Tensor, "n d_in"] | None = None
) -> Converted:
    """The dictionary in a folder, as an SAE.

    Args:
        folder: `trainer_<i>/`, with config.json and ae.pt.
        x: real activations [n, d_in] to check the conversion on, beside random ones.
    Raises:
        UserError: files, names, shapes or values are not as expected, an unknown class, or a
            pickle that holds more than tensors.
        ConversionError: the SAE does not compute what the file's formula computes.
    """
    folder = Path(folder)
    need_files(folder, (CONFIG, WEIGHTS))
    trainer = need(read_object(folder / CONFIG), "trainer", dict, folder / CONFIG)
    name = need(trainer, "dict_class", str, folder / CONFIG)
    if name not in CLASSES:
        raise UserError(f"Expected a dict_class of {', '.join(CLASSES)}, got {name!r}.")
    tensors = load_state(folder / WEIGHTS)
    d_in = need(trainer, "activation_dim", int, folder / CONFIG)
    d_sae = need(trainer, "dict_size", int, folder / CONFIG)
    check_tensors(folder / WEIGHTS, tensors, _shapes(name, d_in, d_sae, tensors))
    t = right_multiplied(tensors)
    k = _active(name, trainer, tensors, folder / CONFIG)
    if name in (TOPK, BATCH, MATRYOSHKA) and not 1 <= k <= d_sae:
        raise UserError(f"{folder / CONFIG} must give k in 1..{d_sae}, got {k}.")
    sae = _convert(name, t, k)
    check_conversion(dictionary_original(name, t, k), sae, x)
    notes = dtype_note(tensors, "dictionary_learning") + _notes(name, t, trainer)
    return Converted(sae, notes, _facts(trainer))


def right_multiplied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One orientation and one set of names, in float64: encoder.weight [d_sae, d_in] is W_enc^T."""
    names = {
        "encoder.bias": "b_enc", "bias": "b_dec", "decoder_bias": "b_dec", "decoder.bias": "b_dec",
    }  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        match name:
            case "encoder.weight":
                found["W_enc"] = tensor.T.double()
            case "decoder.weight":
                found["W_dec"] = tensor.T.double()
            case _:
                found[names.get(name, name)] = tensor.double()
    return found


def dictionary_original(name: str, t: dict[str, Tensor], k: int) -> Original:
    """`encode` and `decode` of the class, at their defaults, in float64.

    Args:
        name: the class.
        t: from `right_multiplied`.
        k: of AutoEncoderTopK.
    """

    def encode(x: Tensor) -> Tensor:
        reads_x = name in (JUMP, NEW)
        product = (x if reads_x else x - t["b_dec"]) @ t["W_enc"]
        if name == GATED:
            gate = (product + t["gate_bias"] > 0).double()
            return gate * torch.relu(t["r_mag"].exp() * product + t["mag_bias"])
        pre = product + t["b_enc"]
        if name == JUMP:
            return torch.relu(pre * (pre > t["threshold"]))
        acts = torch.relu(pre)
        if name in (BATCH, MATRYOSHKA):
            return acts * (acts > t["threshold"])
        if name == TOPK:
            top = acts.topk(k, dim=-1)
            return torch.zeros_like(acts).scatter(-1, top.indices, top.values)
        return acts

    return Original(encode, lambda acts, x: acts @ t["W_dec"] + t["b_dec"])


def _shapes(name: str, d_in: int, d_sae: int, found: dict[str, Tensor]) -> Shapes:
    linear = {"encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae)}
    right = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    k: Shapes = {"k": ()}
    match name:
        case "AutoEncoder":
            return linear | {"encoder.bias": (d_sae,), "bias": (d_in,)}
        case "AutoEncoderNew":
            return linear | {"encoder.bias": (d_sae,), "decoder.bias": (d_in,)}
        case "AutoEncoderTopK":  # the buffers came with later versions
            buffers: Shapes = {key: () for key in ("k", "threshold") if key in found}
            return linear | {"encoder.bias": (d_sae,), "b_dec": (d_in,)} | buffers
        case "BatchTopKSAE":
            bias = {"encoder.bias": (d_sae,), "b_dec": (d_in,)}
            return linear | bias | k | {"threshold": ()}
        case "MatryoshkaBatchTopKSAE":
            sizes = found.get("group_sizes")
            groups = (1,) if sizes is None else (min(sizes.numel(), d_sae),)
            return right | k | {"threshold": (), "group_sizes": groups}
        case "JumpReluAutoEncoder":
            return right | {"threshold": (d_sae,)}
        case _:
            biases = {key: (d_sae,) for key in ("gate_bias", "mag_bias", "r_mag")}
            return linear | {"decoder_bias": (d_in,)} | biases


def _active(name: str, trainer: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> int:
    if name not in (TOPK, BATCH, MATRYOSHKA):
        return 0
    asked = trainer.get("k")
    stored = int(tensors["k"]) if "k" in tensors else asked
    if not isinstance(stored, int) or (asked is not None and asked != stored):
        raise UserError(f"{file} and {WEIGHTS} must give the same k, got {asked} and {stored}.")
    return stored


def _convert(name: str, t: dict[str, Tensor], k: int) -> SAE:
    if name == GATED:
        return build_sae(
            "jumprelu",
            jump_parts(
                t["W_enc"], t["gate_bias"], t["mag_bias"], t["r_mag"], t["W_dec"], t["b_dec"]
            ),
        )
    parts = Parts(t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"])
    if name in (BATCH, MATRYOSHKA):
        every = t["threshold"].expand_as(t["b_enc"])
        return build_sae("batch_topk", parts._replace(threshold=every), k=k)
    if name == TOPK:
        return build_sae("topk", parts, k=k)
    if name == JUMP:
        return build_sae("jumprelu", parts._replace(threshold=t["threshold"]).uncentred())
    return build_sae("relu", parts.uncentred() if name == NEW else parts)


def _notes(name: str, t: dict[str, Tensor], trainer: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if name == PLAIN and not torch.allclose(
        t["W_dec"].norm(dim=1), torch.ones(len(t["W_dec"])).double()
    ):
        notes.append(
            "Decoder norms are not 1 and are kept as stored; AutoEncoder.from_pretrained "
            "multiplies them into the codes unless normalize_decoder=False."
        )
    if name == TOPK and "threshold" in t:
        notes.append("The threshold beside the k largest, an option of encode, is dropped.")
    if name in (BATCH, MATRYOSHKA) and t["threshold"] < 0:
        notes.append("The threshold was never estimated (below 0): every positive latent fires.")
    if name == MATRYOSHKA:
        sizes = ", ".join(str(int(n)) for n in t["group_sizes"])
        notes.append(f"The nested groups ({sizes} latents) shaped the training loss; dropped.")
    if name == GATED:
        notes.append("Gate and magnitude became one JumpReLU with a threshold; the codes agree.")
    if name in (JUMP, NEW):
        notes.append("The encoder reads x, not x - b_dec: b_dec W_enc was added to b_enc.")
    if "norm_factor" in trainer:
        notes.append("Trained on scaled activations; the stored biases are for unscaled ones.")
    return tuple(notes)


def _facts(trainer: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"converted_from": f"dictionary_learning {trainer['dict_class']}"}
    if isinstance(trainer.get("lm_name"), str):
        facts["model_id"] = trainer["lm_name"]
    layer, place = trainer.get("layer"), str(trainer.get("submodule_name"))
    sides = {"resid_post": "out", "resid_pre": "in", "mlp_out": "mlp.out", "attn_out": "attn.out"}
    for mark, side in sides.items():
        if type(layer) is int and layer >= 0 and mark in place:
            facts["hook_point"] = f"layers.{layer}.{side}"
    return facts
