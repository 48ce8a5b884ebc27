"""Small folders of other SAE libraries and of Monet, as good examples, and what reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 4, 8, 2
LENS = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none"}  # fmt: skip
META = {"metadata": {"sae_lens_version": "6.54.12", "model_name": "pythia-70m",
                     "hook_name": "blocks.3.hook_resid_post"}}  # fmt: skip
OLD = {"d_in": D_IN, "d_sae": D_SAE, "activation_fn_str": "topk",
       "activation_fn_kwargs": {"k": K}, "model_name": "gpt2-small",
       "hook_name": "blocks.8.hook_resid_pre"}  # fmt: skip
SPARSIFY = {"activation": "topk", "expansion_factor": 2, "normalize_decoder": True,
            "num_latents": 0, "k": K, "multi_topk": False, "skip_connection": False,
            "transcode": False, "d_in": D_IN}  # fmt: skip
TRAINER = {"activation_dim": D_IN, "dict_size": D_SAE, "layer": 1, "lm_name": "pythia-70m",
           "submodule_name": "resid_post_layer_1"}  # fmt: skip
WIDE = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
LINEAR = {"encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE)}
LATENTS = (D_SAE,)


def lens_folders(root: Path) -> None:
    """SAELens: every architecture, the layouts before and since version 6, its optional files."""
    plain = {**WIDE, "b_enc": LATENTS}
    gated = {**WIDE, **dict.fromkeys(("b_gate", "b_mag", "r_mag"), LATENTS)}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "standard": (LENS | META | {"architecture": "standard"}, plain),
        "old": (OLD, plain | {"scaling_factor": torch.ones(D_SAE)}),
        "gated": (LENS | {"architecture": "gated"}, gated),
        "jumprelu": (LENS | META | {"architecture": "jumprelu"},
                     plain | {"log_threshold": LATENTS}),
        "batchtopk": (LENS | {"architecture": "batchtopk", "k": K},
                      plain | {"topk_threshold": torch.tensor(0.1, dtype=torch.float64)}),
        "scaled": (LENS | {"architecture": "standard",
                           "normalize_activations": "expected_average_only_in"}, plain),
        "unit": (LENS | {"architecture": "topk", "k": K,
                         "normalize_activations": "constant_norm_rescale"}, plain),
    }  # fmt: skip
    for name, (config, shapes) in cases.items():
        folder = _folder(root / name, "cfg.json", config)
        save_file(_tensors(shapes), folder / "sae_weights.safetensors")
    (root / "scaled" / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    save_file({"sparsity": torch.full(LATENTS, -1.0)}, root / "standard" / "sparsity.safetensors")


def sparsify_folders(root: Path) -> None:
    """sparsify: by hookpoint and by seed."""
    matrix = {"encoder.weight": (D_SAE, D_IN), "W_dec": (D_SAE, D_IN)}
    tensors = _tensors({**matrix, "encoder.bias": LATENTS, "b_dec": (D_IN,)})
    for name, more in (("layers.5.mlp", {}), ("layers.3/seed0", {"num_latents": D_SAE})):
        save_file(tensors, _folder(root / name, "cfg.json", SPARSIFY | more) / "sae.safetensors")


def dictionary_folders(root: Path) -> None:
    """dictionary_learning: classes of every layout of its pickled state."""
    counts = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.1)}
    right = {**WIDE, "b_enc": LATENTS}
    biases = dict.fromkeys(("gate_bias", "mag_bias", "r_mag"), LATENTS)
    groups = {"group_sizes": torch.tensor([K, D_SAE - K])}
    cases: dict[str, dict[str, Any]] = {
        "AutoEncoder": {**LINEAR, "encoder.bias": LATENTS, "bias": (D_IN,)},
        "AutoEncoderTopK": {**LINEAR, "encoder.bias": LATENTS, "b_dec": (D_IN,), **counts},
        "MatryoshkaBatchTopKSAE": {**right, **counts, **groups},
        "JumpReluAutoEncoder": {**right, "threshold": LATENTS},
        "GatedAutoEncoder": {**LINEAR, "decoder_bias": (D_IN,), **biases},
    }
    for name, shapes in cases.items():
        trainer = TRAINER | {"dict_class": name} | ({"k": K} if "k" in shapes else {})
        folder = _folder(root / name, "config.json", {"trainer": trainer})
        torch.save(_tensors(shapes), folder / "ae.pt")


def activation_files(root: Path) -> None:
    """Activations that a conversion is checked on."""
    root.mkdir(parents=True, exist_ok=True)
    x = _tensors({"x": (16, D_IN)})
    np.save(root / "x.npy", x["x"].numpy())
    save_file(x, root / "x.safetensors")


def _folder(folder: Path, name: str, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config))
    return folder


def _tensors(shapes: dict[str, Any]) -> dict[str, Tensor]:
    """Small random numbers in shapes; what is a tensor already stays as it is."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: shape if isinstance(shape, Tensor) else 0.5 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def read_changed_folder(folder: Path) -> None:
    """The SAE in the folder of the changed file, as ``sae-apps convert`` reads and reports it."""
    from sae_apps.tasks.convert import ConvertOptions, as_text, open_source, summary

    source = open_source((folder / (folder / ".changed").read_text()).parent, None)
    json.dumps(summary(source, ConvertOptions(), source.converted.notes, is_written=False))
    as_text(summary(source, ConvertOptions(), source.converted.notes, is_written=False))
    _write_and_read(source.converted, folder / "native")


def _write_and_read(converted: Any, out: Path) -> None:
    from sae_core.sae import load_sae, save_sae

    save_sae(out, converted.sae, converted.facts)
    load_sae(out)


def read_changed_activations(folder: Path) -> None:
    """The matrix in the changed file."""
    from sae_apps.tasks.convert import read_activations

    read_activations(folder / (folder / ".changed").read_text(), D_IN)


FOREIGN: tuple[tuple[str, Callable[[Path], None], Callable[[Path], None], int], ...] = (
    ("saelens", lens_folders, read_changed_folder, 8),
    ("sparsify", sparsify_folders, read_changed_folder, 4),
    ("dictionary_learning", dictionary_folders, read_changed_folder, 8),
    ("activations", activation_files, read_changed_activations, 2),
)
"""Name, what makes the examples, what reads them, weight."""
