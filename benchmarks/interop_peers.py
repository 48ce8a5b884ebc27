"""Run another SAE library and write down what it computes; for the interpreter that has it.

    PYTHON_OF_THE_LIBRARY benchmarks/interop_peers.py make LIBRARY FOLDER [tiny]
    PYTHON_OF_SAELENS     benchmarks/interop_peers.py load FOLDER
    PYTHON_OF_SAEBENCH    benchmarks/interop_peers.py bench FOLDER

`make` saves SAEs with the library's own functions, FOLDER/<case>/, and its results,
FOLDER/<case>.safetensors: x, codes, x_hat. `load` reads FOLDER/<case>/ with SAELens and
FOLDER/<case>.safetensors with x, and writes FOLDER/<case>.out.safetensors. `bench` hands our SAEs
in FOLDER/<case>/ to SAEBench's own functions and writes FOLDER/<case>.bench.json; it alone imports
this project.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

IS_TINY = sys.argv[-1] == "tiny"  # for the test's stored example
D_IN, D_SAE, K, N = (4, 8, 2, 6) if IS_TINY else (64, 512, 8, 256)
THRESHOLD = 0.8 if IS_TINY else 5.3
Apply = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)


def fill(module: torch.nn.Module) -> None:
    """Random values for every parameter: unlike rows, and biases and thresholds that matter."""
    for name, p in module.named_parameters():
        if "threshold" in name:
            value = 2 * rand(*p.shape) - 0.3
        elif p.ndim == 2:
            value = 0.3 * randn(*p.shape) * (0.5 + rand(1, p.shape[1]))
        else:
            value = 0.5 * randn(*p.shape)
        p.data = value.to(p.dtype)


def keep(folder: Path, name: str, apply: Apply) -> None:
    """Apply an SAE to random activations and save what came."""
    x = 3 * randn(N, D_IN) + randn(D_IN)
    with torch.no_grad():
        codes, x_hat = apply(x)
    tensors = {"x": x, "codes": codes.float(), "x_hat": x_hat.float()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")


def by_lens(sae: Any) -> Apply:
    """encode, then decode."""

    def apply(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = sae.encode(x)
        return codes, sae.decode(codes)

    return apply


def make_saelens(folder: Path) -> None:
    """Inference and training SAEs of sae-lens, saved by its own functions."""
    import sae_lens as lens

    shape = {"d_in": D_IN, "d_sae": D_SAE}
    inference = {
        "standard": lens.StandardSAEConfig(**shape),
        "standard, b_dec not subtracted": lens.StandardSAEConfig(
            **shape, apply_b_dec_to_input=False
        ),
        "standard, constant_norm_rescale": lens.StandardSAEConfig(
            **shape, normalize_activations="constant_norm_rescale"
        ),
        "topk": lens.TopKSAEConfig(**shape, k=K),
        "topk, rescaled by decoder norm": lens.TopKSAEConfig(
            **shape, k=K, rescale_acts_by_decoder_norm=True
        ),
        "jumprelu": lens.JumpReLUSAEConfig(**shape),
        "gated": lens.GatedSAEConfig(**shape),
        "gated, b_dec not subtracted": lens.GatedSAEConfig(**shape, apply_b_dec_to_input=False),
    }
    for name, config in inference.items():
        sae = lens.SAE.get_sae_class_for_architecture(config.architecture())(config)
        fill(sae)
        sae.save_model(folder / name)
        keep(folder, name, by_lens(sae))
    make_training_saves(folder, shape)


def make_training_saves(folder: Path, shape: dict[str, int]) -> None:
    """What training saves, beside the inference model that the library makes of it."""
    import sae_lens as lens

    half = lens.StandardSAE(lens.StandardSAEConfig(**shape))
    fill(half)
    half.to(dtype=torch.bfloat16).save_model(folder / "standard, bfloat16 file")
    loaded = lens.SAE.load_from_disk(folder / "standard, bfloat16 file", dtype="float32")
    keep(folder, "standard, bfloat16 file", by_lens(loaded))
    for name, cls, config in (
        (
            "standard, training save",
            lens.StandardTrainingSAE,
            lens.StandardTrainingSAEConfig(**shape),
        ),
        (
            "jumprelu, training save",
            lens.JumpReLUTrainingSAE,
            lens.JumpReLUTrainingSAEConfig(**shape),
        ),
        ("gated, training save", lens.GatedTrainingSAE, lens.GatedTrainingSAEConfig(**shape)),
        ("topk, training save", lens.TopKTrainingSAE, lens.TopKTrainingSAEConfig(**shape, k=K)),
        (
            "batchtopk, training save",
            lens.BatchTopKTrainingSAE,
            lens.BatchTopKTrainingSAEConfig(**shape, k=K),
        ),
        (
            "matryoshka_batchtopk, training save",
            lens.MatryoshkaBatchTopKTrainingSAE,
            lens.MatryoshkaBatchTopKTrainingSAEConfig(
                **shape, k=K, matryoshka_widths=[D_SAE // 4, D_SAE]
            ),
        ),
    ):
        sae = cls(config)
        fill(sae)
        if hasattr(sae, "threshold"):  # as every step of their training does
            sae.threshold.data.clamp_(min=0)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(THRESHOLD, dtype=torch.double)
        sae.save_model(folder / name)
        if hasattr(sae, "topk_threshold"):
            exported = folder / name.replace("training", "inference")
            sae.save_inference_model(exported)
            sae = lens.SAE.load_from_disk(exported)  # what its library makes of it
            keep(folder, exported.name, by_lens(sae))
        keep(folder, name, by_lens(sae))


def make_sparsify(folder: Path) -> None:
    """Sparse coders, a folder of a seed among them."""
    from sparsify import SparseCoder, SparseCoderConfig

    for name, more in {
        "topk": {},
        "seeds/seed0": {},
        "topk, multi_topk": {"multi_topk": True},
        "topk, num_latents": {"num_latents": D_SAE - 1},
    }.items():
        config = SparseCoderConfig(expansion_factor=D_SAE // D_IN, k=K, **more)
        coder = SparseCoder(D_IN, config)
        fill(coder)
        coder.save_to_disk(folder / name)

        def apply(x: torch.Tensor, coder: Any = coder) -> tuple[torch.Tensor, torch.Tensor]:
            acts, indices, pre = coder.encode(x)
            codes = torch.zeros_like(pre).scatter(1, indices, acts)
            return codes, coder.decode(acts, indices)

        keep(folder, name, apply)


def make_dictionary_learning(folder: Path) -> None:
    """Each class of dictionary, as its trainers save it."""
    from dictionary_learning import dictionary as d
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    groups = [D_SAE // 4, D_SAE - D_SAE // 4]
    for made in (
        d.AutoEncoder(D_IN, D_SAE),
        d.AutoEncoderNew(D_IN, D_SAE),
        AutoEncoderTopK(D_IN, D_SAE, K),
        BatchTopKSAE(D_IN, D_SAE, K),
        MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, groups),
        d.JumpReluAutoEncoder(D_IN, D_SAE),
        d.GatedAutoEncoder(D_IN, D_SAE),
    ):
        fill(made)
        if hasattr(made, "k"):
            made.threshold.fill_(THRESHOLD)
        name = type(made).__name__
        place = folder / name
        place.mkdir(parents=True)
        torch.save(made.state_dict(), place / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 1}
        trainer |= {"k": K} if hasattr(made, "k") else {}
        (place / "config.json").write_text(json.dumps({"trainer": trainer}))
        keep(folder, name, lambda x, made=made: (made.encode(x), made.decode(made.encode(x))))


def load_saelens(folder: Path) -> None:
    """What SAELens computes with the folders that we wrote."""
    import sae_lens as lens

    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        x = load_file(folder / f"{place.name}.safetensors")["x"]
        sae = lens.SAE.load_from_disk(place)
        with torch.no_grad():
            codes = sae.encode(x)
            x_hat = sae.decode(codes)
        tensors = {"codes": codes.contiguous(), "x_hat": x_hat.contiguous()}
        save_file(tensors, folder / f"{place.name}.out.safetensors")


def bench(folder: Path) -> None:
    """SAEBench's check of a custom SAE, its reading of cfg, its metrics of weights, two decodes."""
    from sae_bench.custom_saes.base_sae import BaseSAE
    from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig
    from sae_bench.evals.core.main import get_featurewise_weight_based_metrics
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    from sae_core.interop.saebench import BenchSAE
    from sae_core.sae import load_sae

    wanted = set(CustomSAEConfig("m", D_IN, D_SAE, 1, "blocks.1.hook_resid_post").to_dict())
    base = BaseSAE.__init__.__code__.co_names
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        x = load_file(folder / f"{place.name}.safetensors")["x"]
        plain, _ = load_sae(place)
        sae = BenchSAE(plain, model_name="gpt2", hook_layer=1)
        absent = [name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "device", "dtype", "cfg")
                  if name not in base or not hasattr(sae, name)]  # fmt: skip
        absent += sorted(wanted - set(sae.cfg.to_dict()))
        formatted = load_and_format_sae("custom", sae, "cpu")
        assert formatted is not None and formatted[1] is sae
        metrics = get_featurewise_weight_based_metrics(sae)
        three = x.reshape(2, -1, D_IN)
        codes = sae.encode(three)
        first, second = sae.decode(codes), sae.decode(codes)  # as scr_and_tpp does
        u = plain.reconstruct(x).reshape(three.shape)
        found = {
            "absent": absent,
            "is_unit": BaseSAE.check_decoder_norms(sae),
            "n_weight_metrics": len(metrics),
            "is_repeatable": torch.equal(first, second),
            "x_hat": float((first - u).abs().max() / u.abs().max()),
        }
        (folder / f"{place.name}.bench.json").write_text(json.dumps(found))


def main() -> None:
    """Do what the arguments say."""
    made = {
        "sae_lens": make_saelens,
        "sparsify": make_sparsify,
        "dictionary_learning": make_dictionary_learning,
    }
    if sys.argv[1] in ("load", "bench"):
        (load_saelens if sys.argv[1] == "load" else bench)(Path(sys.argv[2]))
    else:
        made[sys.argv[2]](Path(sys.argv[3]))


if __name__ == "__main__":
    main()
