"""A Monet model of 4 x 4 experts, masks over it and a result of ``sae-apps monet``, for the fuzzer.

The weights are random and large, so that the two halves of the vocabulary meet other experts.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ["<end>", *(f"{side}{i}" for side in "ab" for i in range(12))]
SHAPE: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "moe_dim": 2,
    "moe_heads": 2, "moe_experts": 4, "moe_topk": 2, "moe_groups": 1,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LENGTH, DOCUMENTS = 8, 40


def make_monet(root: Path) -> None:
    """Write model, docs.jsonl, masks/one.safetensors and the result of the command, out."""
    from sae_apps.tasks.main import main
    from sae_core.monet.masks import ExpertMask

    root.mkdir(parents=True, exist_ok=True)
    _save_model(root / "model")
    rng = np.random.default_rng(0)
    records = []
    for i in range(DOCUMENTS):
        words = rng.choice(WORDS[1:13] if i % 2 else WORDS[13:], LENGTH)
        records.append({"text": " ".join(words), "domain": "ab"[i % 2], "harm": i % 2})
    (root / "docs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    ExpertMask(4, {0: np.array([1, 2, 7]), 1: np.array([15])}, "one").save(
        root / "masks" / "one.safetensors"
    )
    assert main(monet_arguments(root, root / "out")) == 0


def monet_arguments(root: Path, out: Path | str) -> list[str]:
    """The command on these files, of a second or less."""
    argv = ["monet", "--model", str(root / "model"), "--data", str(root / "docs.jsonl")]
    argv += ["--out", str(out), "--score", "harm", "--ratio", "1.01", "--min-tokens", "1"]
    return [*argv, "--permutations", "3", "--n-boot", "5", "--random-draws", "1", "--quiet"]


def _save_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from sae_core.monet.model import MonetConfig, MonetForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = MonetConfig(vocab_size=len(WORDS), initializer_range=0.5, **SHAPE)
        model = MonetForCausalLM(shape).train()
        with torch.no_grad():
            for _ in range(10):  # the routers learn their thresholds
                model(input_ids=torch.randint(0, len(WORDS), (8, LENGTH)))
    model.eval().save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    inner.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<end>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))


def read_monet(folder: Path) -> None:
    """The model of a folder, and a pass."""
    import torch

    from sae_core.models import load_model
    from sae_core.monet.masks import router_layers

    model = load_model(str(folder)).model
    router_layers(model)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]) % int(model.config.vocab_size))


def read_mask(root: Path, folder: Path) -> None:
    """A mask, and a pass of the model with it."""
    import torch

    from sae_core.monet.masks import ExpertMask, masked_experts

    mask = ExpertMask.load(folder / "one.safetensors")
    model = _loaded(root / "model")
    with masked_experts(model, mask), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))


@cache
def _loaded(folder: Path) -> Any:
    from sae_core.models import load_model

    return load_model(str(folder)).model


def read_result(root: Path, folder: Path) -> None:
    """The command once more, which finds its result whole and shows it."""
    from benchmarks.fuzz_options import run_command

    run_command(monet_arguments(root, folder))
