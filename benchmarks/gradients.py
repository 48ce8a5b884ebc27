"""Selection by gradients: projected gradients of the loss on the response (after LESS).

LESS (arXiv 2402.04333) trains LoRA weights first and follows several checkpoints. Here the model is
taken as it is (no warm-up, one checkpoint, no Adam moments), and the gradient is that of the last
blocks' MLP output weights instead of LoRA's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from benchmarks.minilm import batches_by_length
from sae_core.models import LanguageModel


def rademacher(k: int, d: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """Random signs over sqrt(k): a projection that keeps inner products in expectation."""
    return (torch.randint(0, 2, (k, d), generator=generator) * 2.0 - 1) / k**0.5


def gradient_features(
    lm: LanguageModel,
    examples: Sequence[tuple[Sequence[int], int]],
    *,
    n_blocks: int = 2,
    sketch: tuple[int, int] = (64, 128),
    batch_tokens: int = 1024,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Float32[np.ndarray, "n k"]:
    """Unit-length projected gradients of each row's mean loss over its response.

        g = sum_blocks vec(P_b (d loss / d W_b) Q_b^T),  W_b: the MLP's output weights of a block

    with P_b, Q_b random signs: a Kronecker projection of the concatenated gradient, computed from
    the two factors of each gradient (errors and inputs of the layer), so that no gradient of the
    size of the weights is ever formed.

    Args:
        lm: of the Llama family (blocks under `model.layers`, each with `mlp.down_proj`).
        examples: (token ids, number of prompt tokens) of each row.
        n_blocks: blocks from the end whose weights count.
        sketch: rows of P_b and Q_b; their product is k, 8,192 as in LESS.
    """
    blocks = lm.model.model.layers[-n_blocks:]
    generator = torch.Generator().manual_seed(seed)
    d_hidden, d_out = blocks[0].mlp.down_proj.in_features, blocks[0].mlp.down_proj.out_features
    signs = [(rademacher(sketch[0], d_out, generator), rademacher(sketch[1], d_hidden, generator))
             for _ in blocks]  # fmt: skip
    out = np.zeros((len(examples), sketch[0] * sketch[1]), np.float32)
    done = 0
    for places in batches_by_length([len(ids) for ids, _ in examples], batch_tokens):
        factors = _layer_factors(lm, blocks, [examples[i] for i in places])
        found = sum(
            torch.einsum("btk,btl->bkl", error @ p.T, inputs @ q.T)
            for (error, inputs), (p, q) in zip(factors, signs, strict=True)
        )
        out[places] = F.normalize(torch.as_tensor(found).flatten(1), dim=1).numpy()
        progress(done := done + len(places))
    return out


def _layer_factors(
    lm: LanguageModel, blocks: Any, examples: Sequence[tuple[Sequence[int], int]]
) -> list[tuple[Tensor, Tensor]]:
    """Per block (d loss / d output [b, t, d_out], input [b, t, d_hidden]) of its down_proj."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(list(one), dtype=torch.int64) for one, _ in examples], batch_first=True
    )
    labels = torch.full_like(ids, -100)
    for row, (one, n_prompt) in enumerate(examples):
        labels[row, max(n_prompt, 1) : len(one)] = ids[row, max(n_prompt, 1) : len(one)]
    inputs, outputs = [], []

    def keep(module: Any, args: tuple[Tensor], output: Tensor) -> None:
        inputs.append(args[0].detach())
        outputs.append(output)

    def as_leaf(module: Any, args: tuple[Any, ...], kwargs: dict) -> tuple[tuple, dict]:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs

    handles = [block.mlp.down_proj.register_forward_hook(keep) for block in blocks]
    handles.append(blocks[0].register_forward_pre_hook(as_leaf, with_kwargs=True))
    try:
        with torch.enable_grad():
            logits = lm.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            counted = (labels[:, 1:] >= 0).sum(1).clamp(min=1)
            errors = torch.autograd.grad((loss.sum(1) / counted).sum(), outputs)
    finally:
        for handle in handles:
            handle.remove()
    return [(error.float(), x.float()) for error, x in zip(errors, inputs, strict=True)]
