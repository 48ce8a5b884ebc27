"""Metrics of an SAE: of its reconstruction, and of the model that runs on the reconstruction.

Every number is a ratio of sums over tokens, so the batches make no difference to it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from sae_core.activations import Activations, HarvestConfig, replace_activations, stream_activations
from sae_core.encoder import SparseEncoder
from sae_core.errors import UserError
from sae_core.reconstruction import Reconstruction, ReconstructionStats
from sae_core.sae import SAE
from sae_core.text import TextRow
from sae_core.tokens import TokenBatch, token_windows

if TYPE_CHECKING:
    from sae_core.models import LanguageModel

__all__ = [
    "LossRecovered",
    "Reconstruction",
    "ReconstructionStats",
    "check_width",
    "evaluate",
    "evaluating",
    "loss_recovered",
]

_LOGIT_BYTES = 1 << 28  # float32 logits of one batch: with 49,152 tokens to choose from, 1,365 rows


@contextmanager
def evaluating(sae: SparseEncoder) -> Iterator[None]:
    """The SAE in eval mode while the block runs: no token's code depends on its batch then."""
    was_training = sae.training
    sae.train(False)
    try:
        yield
    finally:
        sae.train(was_training)


def check_width(sae: SparseEncoder, width: int, hook_point: str, model_id: str) -> None:
    """Refuse activations that the SAE was not made for.

    Raises:
        UserError: ``width`` is not the SAE's d_in; both are named.
    """
    if width != sae.d_in:
        raise UserError(
            f"The SAE was trained on activations of width d_in {sae.d_in}, "
            f"but {hook_point} of {model_id} has {width}."
        )


def evaluate(sae: SAE, batches: Iterable[Activations | Tensor]) -> Reconstruction:
    """Metrics of an SAE, in eval mode, over activations.

    Args:
        batches: Activations, or plain tensors [n, d_in]; finite, best held out from training.
    Raises:
        UserError: no tokens, another d_in, or activations that do not vary.
    """
    weights = sae.W_enc
    stats = ReconstructionStats(sae.d_in, sae.d_sae, weights.device)
    with evaluating(sae), torch.no_grad():
        for batch in batches:
            raw = batch.x if isinstance(batch, Activations) else batch
            x = raw.to(weights.device, weights.dtype)
            u, norm = sae.normalise(x)
            codes = sae.codes_of(u)
            stats.update(x, sae.decode_sparse(codes) * norm, codes, norm)
    return stats.compute()


@dataclass(frozen=True)
class LossRecovered:
    """Next-token cross-entropy in nats a token, and the part of an ablation's damage not done.

    recovered = (ce_ablated - ce_sae) / (ce_ablated - ce_clean)
    """

    ce_clean: float
    """The model as it is."""
    ce_sae: float
    """With the SAE's reconstruction in place of the activations."""
    ce_zero: float
    """With zeros in place of the same activations."""
    ce_mean: float
    """With their mean in place of the same activations."""
    recovered_zero: float
    """Against zero-ablation: 1 is as good as the model, 0 as bad as zeros."""
    recovered_mean: float
    """Against mean-ablation, the harder reference."""
    n_tokens: int
    """Predicted tokens: every real token of a sequence but its first."""


def loss_recovered(
    lm: "LanguageModel",
    sae: SAE,
    rows: Iterable[TextRow],
    hook_point: str,
    config: HarvestConfig | None = None,
    *,
    mean: Float[Tensor, "d_in"] | None = None,
) -> LossRecovered:
    """Cross-entropy of the model with the activations at a hook point replaced in four ways.

    Replaced are exactly the tokens that ``config`` keeps, those an SAE is trained on: by default
    special tokens and the first of each sequence keep their own activations in all four runs.
    The loss is taken over all predicted tokens, the sum of losses divided by their number.

    Args:
        rows: held-out text, read once, or twice where ``mean`` is not given.
        config: as in training; the batches are padded, whatever ``batching`` says.
        mean: [d_in] for the mean-ablation; None takes the mean over the replaced tokens.
    Raises:
        UserError: the SAE's d_in is not the hook point's; rows that cannot be read twice; no
            tokens; or an ablation that does not change the loss, so that nothing can be recovered.
    """
    config = config or HarvestConfig()
    if mean is None and iter(rows) is rows:
        raise UserError(
            "Without a mean the text is read twice: expected rows that can be read again "
            f"(a TextSource or a list), got {type(rows).__name__}."
        )
    if mean is None:
        mean = _mean_activation(lm, sae, rows, hook_point, config)
    if mean.shape != (sae.d_in,):
        raise UserError(f"Expected a mean of width d_in {sae.d_in}, got {list(mean.shape)}.")

    def reconstructed(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        check_width(sae, x.shape[1], hook_point, lm.model_id)
        return sae.reconstruct(x.to(sae.W_enc.device)).to(x.device)

    ways: tuple[Callable[[Tensor], Tensor] | None, ...] = (
        None,
        reconstructed,
        torch.zeros_like,
        lambda x: mean.to(x).expand_as(x),
    )
    sums = [0.0] * len(ways)
    n_tokens = 0
    with evaluating(sae), torch.no_grad():
        for batch in loss_batches(lm, rows, config):
            for place, way in enumerate(ways):
                sums[place] += _summed_loss(lm, batch, hook_point, way)
            n_tokens += int(_predicted(batch).sum())
    return _recovered(sums, n_tokens)


def _recovered(sums: list[float], n_tokens: int) -> LossRecovered:
    if n_tokens == 0:
        raise UserError("Expected at least one token to predict, got none.")
    clean, spliced, zero, mean = (value / n_tokens for value in sums)
    for name, ablated in (("zero", zero), ("mean", mean)):
        if ablated == clean:
            raise UserError(
                f"Expected {name}-ablation to change the loss of {clean:.4f} nats, got the same: "
                "no part of it can be recovered."
            )
    return LossRecovered(
        ce_clean=clean,
        ce_sae=spliced,
        ce_zero=zero,
        ce_mean=mean,
        recovered_zero=(zero - spliced) / (zero - clean),
        recovered_mean=(mean - spliced) / (mean - clean),
        n_tokens=n_tokens,
    )


def _mean_activation(
    lm: "LanguageModel", sae: SAE, rows: Iterable[TextRow], hook_point: str, config: HarvestConfig
) -> Float[Tensor, "d_in"]:
    total = torch.zeros(sae.d_in, dtype=torch.float64)
    n = 0
    for found in stream_activations(lm, rows, [hook_point], config):
        x = found[hook_point].x
        check_width(sae, x.shape[1], hook_point, lm.model_id)
        total += x.double().sum(dim=0).cpu()
        n += len(x)
    if n == 0:
        raise UserError("Expected at least one token to replace, got none.")
    return total / n


def loss_batches(
    lm: "LanguageModel", rows: Iterable[TextRow], config: HarvestConfig
) -> Iterator[TokenBatch]:
    """Padded batches: one sequence a line, so that the token to predict is the next in the line."""
    fit = _LOGIT_BYTES // (4 * len(lm.tokenizer))
    tokens = max(config.context_size, min(config.batch_tokens, fit))
    config = replace(config, batching="pad", batch_tokens=tokens)
    for window in token_windows(lm.tokenizer, rows, config):
        yield from window.batches


def _predicted(batch: TokenBatch) -> Int64[Tensor, "b t_minus_1"]:
    """1 where the next token of the line is a real one, else 0 (padding stands on the right)."""
    return (batch.chunk[:, 1:] >= 0).long()


def _logits(lm: "LanguageModel", batch: TokenBatch) -> Float[Tensor, "b t vocabulary"]:
    return lm.model(
        input_ids=batch.input_ids.to(lm.device),
        position_ids=batch.position_ids.to(lm.device),
        attention_mask=(batch.chunk >= 0).long().to(lm.device),
        use_cache=False,
    ).logits


def _summed_loss(
    lm: "LanguageModel",
    batch: TokenBatch,
    hook_point: str,
    way: Callable[[Tensor], Tensor] | None,
) -> float:
    """Sum of -log p(next token) over the predicted tokens of a batch, in nats."""
    context = nullcontext()
    if way is not None:
        spliced = _splice(batch.keep.to(lm.device), way)
        context = replace_activations(lm, hook_point, spliced)
    with context:
        logits = _logits(lm, batch)
    target = batch.input_ids[:, 1:].masked_fill(_predicted(batch) == 0, -100).to(lm.device)
    loss = 0.0
    for line, aim in zip(logits[:, :-1], target, strict=True):  # by line: float32 logits are large
        loss += float(F.cross_entropy(line.float(), aim, ignore_index=-100, reduction="sum"))
    return loss


def _splice(
    keep: Int64[Tensor, "n"], way: Callable[[Tensor], Tensor]
) -> Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]]:
    """The function that puts ``way(x)`` in place of the kept tokens and leaves the others alone."""

    def spliced(value: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        flat = value.flatten(0, 1)
        return flat.index_copy(0, keep, way(flat[keep]).to(flat.dtype)).view_as(value)

    return spliced
