"""How well an SAE reconstructs: streaming FVU, L0, firing, and the loss recovered in the model.

Every number is a ratio of sums over tokens, so the batches make no difference to it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from sae_core.activations import Activations, HarvestConfig, replace_activations, stream_activations
from sae_core.errors import UserError
from sae_core.firing import FiringStats
from sae_core.kernels.codes import Codes
from sae_core.sae import SAE
from sae_core.text import TextRow
from sae_core.tokens import TokenBatch, token_windows

if TYPE_CHECKING:
    from sae_core.models import LanguageModel

_LOGIT_BYTES = 1 << 28  # float32 logits of one batch: with 49,152 tokens to choose from, 1,365 rows


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Quality of a reconstruction over n_tokens tokens."""

    fvu: float
    """Residual sum of squares / total sum of squares about the global mean; 0 is perfect."""
    l0: float
    """Mean number of active latents a token."""
    freq: Float[np.ndarray, " d_sae"]
    """Fraction of tokens in which each latent is active, [d_sae] float64."""
    peak: Float[np.ndarray, " d_sae"]
    """Largest activation of each latent, 0 where it never fired, [d_sae]."""
    dead_fraction: float
    """Fraction of latents that fired in none of the n_tokens tokens."""
    n_tokens: int
    """Tokens evaluated; fewer tokens make more latents look dead."""


class ReconstructionStats:
    """Streaming sums for :class:`Reconstruction`; `update` and `merge` add up in any order.

        FVU = sum_t ||x_t - x_hat_t||^2 / sum_t ||x_t - mean||^2,   mean over all t

    The spread about the mean is merged pair by pair in float64 (Chan, Golub and LeVeque 1983,
    "Algorithms for computing the sample variance", eq. 2.1), so that an offset much larger than
    the spread costs no digits.
    """

    def __init__(self, d_in: int, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.n_tokens = 0
        self.mean = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.residual = torch.zeros((), dtype=torch.float64, device=device)
        self.firing = FiringStats(d_sae, device)

    @torch.no_grad()
    def update(
        self, x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"], codes: Codes
    ) -> None:
        """Add a batch.

        Args:
            x: [n, d_in] activations as they are in the model.
            x_hat: [n, d_in] reconstruction in the same units.
            codes: [n, d_sae] the latents that made it.
        """
        n = x.shape[0]
        if n == 0:
            return
        x64 = x.double()
        mean = x64.mean(dim=0)
        self._spread(n, mean, (x64 - mean).square().sum())
        self.residual += (x64 - x_hat.double()).square().sum()
        self.firing.update(codes)

    def merge(self, other: "ReconstructionStats") -> None:
        """Add the tokens of another process's or shard's statistics."""
        self._spread(other.n_tokens, other.mean, other.total)
        self.residual += other.residual
        self.firing.merge(other.firing)

    def compute(self) -> Reconstruction:
        """The metrics so far.

        Raises:
            UserError: no tokens, or activations that do not vary, whose FVU is not defined.
        """
        if self.n_tokens == 0:
            raise UserError("Expected at least one token to evaluate, got none.")
        for name, value in (("activations", self.total), ("reconstructions", self.residual)):
            if not torch.isfinite(value):
                raise UserError(f"Expected finite {name}, got a sum of squares of {float(value)}.")
        if float(self.total) == 0:
            raise UserError(
                f"The FVU needs activations that vary, got {self.n_tokens} tokens "
                "that are all the same."
            )
        firing = self.firing.compute()
        return Reconstruction(
            fvu=float(self.residual / self.total),
            l0=float(firing.count.sum()) / self.n_tokens,
            freq=firing.freq.cpu().numpy(),
            peak=firing.peak.cpu().numpy(),
            dead_fraction=float((firing.count == 0).double().mean()),
            n_tokens=self.n_tokens,
        )

    def _spread(self, n: int, mean: Float[Tensor, "d_in"], total: Float[Tensor, ""]) -> None:
        both = self.n_tokens + n
        if both:
            gap = mean - self.mean
            self.total = self.total + total + gap.square().sum() * (self.n_tokens * n / both)
            self.mean = self.mean + gap * (n / both)
        self.n_tokens = both


@contextmanager
def evaluating(sae: SAE) -> Iterator[SAE]:
    """The SAE in eval mode while the block runs: no token's code depends on its batch then."""
    was_training = sae.training
    sae.eval()
    try:
        yield sae
    finally:
        sae.train(was_training)


def check_width(sae: SAE, width: int, hook_point: str, model_id: str) -> None:
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
            stats.update(x, sae.reconstruct(x), sae.encode_sparse(x))
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
        for batch in _batches(lm, rows, config):
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


def _batches(
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
    keep = batch.keep.to(lm.device)

    def spliced(value: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        flat = value.flatten(0, 1)
        return flat.index_copy(0, keep, way(flat[keep]).to(flat.dtype)).view_as(value)

    with replace_activations(lm, hook_point, spliced) if way else nullcontext():
        logits = _logits(lm, batch)
    target = batch.input_ids[:, 1:].masked_fill(_predicted(batch) == 0, -100).to(lm.device)
    loss = 0.0
    for line, aim in zip(logits[:, :-1], target, strict=True):  # by line: float32 logits are large
        loss += float(F.cross_entropy(line.float(), aim, ignore_index=-100, reduction="sum"))
    return loss
