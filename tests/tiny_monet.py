"""A small Monet with a tokenizer in a folder, saved as published checkpoints are laid out."""

from pathlib import Path
from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "moe_dim": 4,
    "moe_heads": 3, "moe_experts": 8, "moe_topk": 2, "moe_groups": 2,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
TEXT = """<end> the a cat dog bird sun moon sees likes runs eats big small red blue und der die das
katze hund vogel sonne mond sieht mag rennt isst gross klein rot blau ."""
WORDS = TEXT.split()


def tiny_monet(kind: str = "vertical", seed: int = 0, **shape: Any) -> Any:
    """A model in eval mode whose routers have seen some batches, weights large enough to matter."""
    from sae_core.monet.model import MonetConfig, MonetForCausalLM

    torch.manual_seed(seed)
    config = MonetConfig(
        vocab_size=len(WORDS), moe_decompose=kind, initializer_range=0.2, **(SHAPE | shape)
    )
    model = MonetForCausalLM(config)
    for name, parameter in model.named_parameters():
        if ".moe.b" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model(input_ids=torch.randint(0, len(WORDS), (8, 16)))
    return model.eval()


def tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", unk_token="<end>", pad_token="<end>",
        model_max_length=256,
    )  # fmt: skip


def save_monet(folder: Path, model: Any) -> Path:
    """Model and tokenizer, as ``load_model`` reads them."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
