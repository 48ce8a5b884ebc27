"""Train an SAE on any iterable of activations; a generator of StepRecord.

    sae = SAE(SAEConfig(d_in=576, d_sae=4608))
    for record in train(sae, batches(x, 1024, seed=0), TrainConfig(steps=1000)):
        print(record.fvu, record.l0)

One step is a gradient step on {W_enc, W_dec, scale, ...} and, for kind="gba", now and then a bias
step of the controller (arXiv 2506.14002); the two never touch the same tensor. Under
torch.distributed each rank passes its own batches; gradients are averaged and firing counts
merged, so the result is that of one process with the joined batch.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from sae_core.activations import Activations
from sae_core.demand import asks, follow_demand
from sae_core.errors import UserError
from sae_core.kernels.codes import Codes
from sae_core.sae import SAE
from sae_core.start import calibrate, start
from sae_core.state import TrainConfig, TrainState, default_lr, learning_rate
from sae_core.step import bias_step, count_firing, dead_after_tokens, gradient_step

__all__ = ["StepRecord", "TrainConfig", "TrainState", "train"]


@dataclass(frozen=True)
class StepRecord:
    """Means over the steps since the last record."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens trained on."""
    fvu: float
    """Fraction of variance unexplained, of normalised tokens where the SAE normalises."""
    l0: float
    """Active latents a token."""
    dead_fraction: float
    """Share of latents silent for `dead_after_tokens` tokens."""
    lr: float
    """Learning rate of the last step."""


class _Window:
    """Sums behind one StepRecord; FVU is the ratio of sums about the window's mean.

    Tokens are counted from the first batch's mean: sums of squares about a point near the mean lose
    nothing to cancellation in float32, which reads them in a tenth of the time of float64.
    """

    def __init__(self) -> None:
        self.active = self.n = 0.0
        # on the device until the record: a number asked for at every step would hold it up
        self.residual: Tensor | float = 0.0
        self.square: Tensor | float = 0.0
        self.total: Tensor | float = 0.0
        self.origin: Tensor | None = None

    def add(self, u: Tensor, u_hat: Tensor, codes: Codes) -> None:
        self.origin = u.mean(0) if self.origin is None else self.origin
        error, offset = (u - u_hat).flatten(), u - self.origin
        self.residual = self.residual + error.dot(error).double()
        self.square = self.square + offset.flatten().dot(offset.flatten()).double()
        self.total = self.total + offset.sum(0).double()
        self.active += codes.col.shape[0]
        self.n += u.shape[0]

    def record(self, state: TrainState, dead_after: int, lr: float) -> StepRecord:
        assert isinstance(self.total, Tensor)
        variation = float(self.square) - float(self.total.square().sum()) / self.n
        dead = float((state.tokens_since >= dead_after).double().mean())
        fvu = float(self.residual) / max(variation, 1e-30)
        return StepRecord(state.step, state.tokens, fvu, self.active / self.n, dead, lr)


def _tensors(batches: Iterable[Activations | Tensor], sae: SAE) -> Iterator[Tensor]:
    for batch in batches:
        x = batch.x if isinstance(batch, Activations) else batch
        if len(x) == 0:
            raise UserError("Expected batches of at least one token, got an empty one.")
        yield x.to(device=sae.W_enc.device, dtype=sae.W_enc.dtype)


def _peek(stream: Iterator[Tensor], n_tokens: int) -> tuple[Tensor, Iterator[Tensor]]:
    """The first n_tokens tokens (fewer where the stream is short) and the stream unharmed."""
    head: list[Tensor] = []
    while sum(map(len, head)) < n_tokens and (batch := next(stream, None)) is not None:
        head.append(batch)
    if not head:
        raise UserError("Expected activations to train on, got an empty stream.")
    return torch.cat(head)[:n_tokens], _again(deque(head), stream)


def _keep_freed_memory() -> None:
    """Let the C library keep freed blocks of a few MB for the next step.

    glibc returns blocks above a limit to the system, and a step that gets them back new pays for
    every page: 4% of its time at 4,608 latents. The limit follows the largest block ever freed, up
    to 32 MiB; this one is never touched and costs nothing.
    """
    torch.empty((32 << 20) - 8192, dtype=torch.uint8)


def _again(head: deque[Tensor], stream: Iterator[Tensor]) -> Iterator[Tensor]:
    """The head, of which nothing is held that was taken, and the stream."""
    while head:
        yield head.popleft()
    yield from stream


def train(
    sae: SAE,
    batches: Iterable[Activations | Tensor],
    config: TrainConfig,
    state: TrainState | None = None,
) -> Iterator[StepRecord]:
    """Train `sae` in place for config.steps steps.

    Args:
        batches: Activations or tensors [n, d_in]; on resuming, those after state.step. After the
            last step kind="gba" reads calibrate_tokens more tokens (fewer where the stream ends).
        state: where a checkpoint stopped; a fresh one is filled in place, so that the caller can
            save it between records.
    Yields:
        A StepRecord every `log_every` steps and at the end.
    Raises:
        UserError: width that does not fit, or fewer batches than steps.
    """
    state = TrainState() if state is None else state
    _keep_freed_memory()
    stream = _tensors(batches, sae)
    if not state.started:
        sample, stream = _peek(stream, config.init_tokens)
        state.__dict__.update(start(sae, sample, config).__dict__)
    peak = default_lr(sae.config.kind, sae.d_sae) if config.lr is None else config.lr
    window, dead_after = _Window(), dead_after_tokens(config)
    sae.train()
    while state.step < config.steps:
        x = next(stream, None)
        if x is None:
            raise UserError(f"Expected batches for {config.steps} steps, got {state.step}.")
        lr = learning_rate(state.step, peak, config)
        u, _ = sae.normalise(x)
        codes, u_hat = gradient_step(sae, u, state, config, lr)
        count_firing(sae, codes, state, config)
        if sae.config.kind == "gba" and asks(state, config):
            follow_demand(sae, u, state, config)
        if sae.config.kind == "gba" and state.step % config.gba.period == 0:
            bias_step(sae, state, config.gba)
        window.add(u, u_hat, codes)
        if state.step == config.steps and sae.config.kind == "gba":
            if config.gba.calibrate_tokens:
                calibrate(sae, _peek(chain([x], stream), config.gba.calibrate_tokens)[0], state)
            sae.b_enc.clamp_(max=0)  # above 0 it served to wake a latent; acts must not be negative
        if state.step % config.log_every == 0 or state.step == config.steps:
            yield window.record(state, dead_after, lr)
            window = _Window()
    sae.eval()
