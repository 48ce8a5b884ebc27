"""Train small language models from scratch: Monet (HD, VD) and a dense one of equal size.

All see the same tokens in the same order, with the same optimiser. The dense model is a Llama whose
MLP is relu(U x)^2 V as wide as gives the number of parameters of the Monet models to a per cent.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.monet_data import cached, load_corpus, make_tokenizer, sequences
from sae_core.download import cache_dir
from sae_core.models import LanguageModel
from sae_core.monet.model import MonetConfig, MonetForCausalLM

# decomposition, and of what the uniformity is taken (published: gates)
KINDS = ("vertical logits", "horizontal logits", "vertical gates", "dense")


@dataclass(frozen=True)
class Size:
    """Shape of the models and of their training."""

    d_model: int = 128
    layers: int = 4
    heads: int = 4
    vocab: int = 4096
    n: int = 64
    """Halves a side: n * n experts a layer."""
    m: int = 8
    """Neurons of an expert."""
    routing_heads: int = 4
    topk: int = 8
    groups: int = 2
    """Layers that share a router."""
    aux: float = 1e-3
    tokens: int = 2_500_000
    context: int = 128
    batch: int = 32
    lr: float = 3e-3
    seed: int = 0


SIZES = {
    "reduced": Size(),
    "full": Size(
        d_model=512, layers=8, heads=8, vocab=16384, n=256, topk=16, routing_heads=8, groups=4,
        tokens=200_000_000, context=512, batch=128, lr=1e-3,
    ),  # fmt: skip
}


class SquaredMLP(nn.Module):
    """V relu(U x)^2 with biases, the dense counterpart of the experts."""

    def __init__(self, d_model: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, inner)
        self.down_proj = nn.Linear(inner, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[*b, d] to [*b, d]."""
        return self.down_proj(self.up(x).relu().square())


def build(kind: str, size: Size) -> Any:
    """A model with fresh weights, seeded."""
    torch.manual_seed(size.seed)
    common: dict[str, Any] = {
        "vocab_size": size.vocab, "hidden_size": size.d_model, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    if kind != "dense":
        decomposition, uniformity = kind.split()
        return MonetForCausalLM(MonetConfig(
            moe_dim=size.m, moe_heads=size.routing_heads, moe_experts=size.n, moe_topk=size.topk,
            moe_groups=size.groups, moe_decompose=decomposition, moe_aux=size.aux,
            moe_uniformity=uniformity, **common,
        ))  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=8, **common))
    routers = -(-size.layers // size.groups) * 2 * size.d_model * size.routing_heads * size.n
    experts = 2 * size.n * size.m * size.d_model + size.n * size.m + size.n * size.d_model
    inner = round((experts + routers / size.layers) / (2 * size.d_model + 1))
    for layer in model.model.layers:
        layer.mlp = SquaredMLP(size.d_model, inner)
        for linear in (layer.mlp.up, layer.mlp.down_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
    return model


def load_dense(folder: Path, size: Size, device: str) -> LanguageModel:
    """The dense model of a folder: a Llama whose MLP is ours, which transformers does not know."""
    from safetensors.torch import load_file
    from transformers import PreTrainedTokenizerFast

    model = build("dense", size)
    found = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert found.missing_keys == ["lm_head.weight"] and not found.unexpected_keys, found  # tied
    model.tie_weights()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return LanguageModel(model.to(device).eval(), tokenizer, folder.name, "unknown")


def folder_of(kind: str, size: Size) -> Path:
    """Where a trained model is kept."""
    name = "-".join(str(value) for value in asdict(size).values())
    return cache_dir() / "benchmarks" / "monet" / f"{kind.replace(' ', '-')}-{name}"


def trained(kind: str, size: Size, device: str = "cpu") -> Path:
    """Folder of a trained model with its tokenizer; trained now where it is not there yet."""
    folder = folder_of(kind, size)
    if not cached(folder):
        corpus = load_corpus(size.tokens)
        tokenizer = make_tokenizer(corpus, size.vocab)
        ids = sequences(tokenizer, corpus, size.tokens, size.context, size.seed)
        model = build(kind, size).to(device)
        record = fit(model, ids, size, device)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(record))
    return folder


def fit(model: Any, ids: Tensor, size: Size, device: str) -> dict[str, Any]:
    """One pass over the sequences with AdamW; cosine to a tenth, 5% of warming up."""
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=size.lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    steps, curve = len(ids) // size.batch, []
    started = time.time()
    for step in range(steps):
        rise = min(1.0, (step + 1) / (0.05 * steps))
        lr = size.lr * rise * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = ids[step * size.batch : (step + 1) * size.batch].to(device)
        output = model(input_ids=batch, labels=batch, use_cache=False)
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            curve.append((step, float(output.loss.detach())))
            rate = (step + 1) * batch.numel() / (time.time() - started)
            print(f"step {step} of {steps}, loss {curve[-1][1]:.3f}, {rate:.0f} tokens/s")
    seconds = time.time() - started
    n_parameters = sum(p.numel() for p in model.parameters())
    model.eval()
    return {"seconds": seconds, "tokens": steps * size.batch * size.context,
            "parameters": n_parameters, "curve": curve}  # fmt: skip
