"""Train an SAE on any iterable of activations; a generator of StepRecord.

    sae = SAE(SAEConfig(d_in=576, d_sae=4608))
    for record in train(sae, batches(x, 1024, seed=0), TrainConfig(steps=1000)):
        print(record.fvu, record.l0)

One step is a gradient step on {W_enc, W_dec, scale, ...} and, for kind="gba", now and then a bias
step of the controller (arXiv 2506.14002); the two never touch the same tensor. Under
torch.distributed each process passes its own part of every batch (`buffer.batches(part=...)`);
sums, maxima and rankings are those of all (parallel.py), so the result is that of one process with
the joined batch, to rounding. `sharded.py` splits the latents too.
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
from sae_core.parallel import Layout, world_layout
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
        self.n = 0
        # on the device until the record: a number asked for at every step would hold it up
        self.sums: dict[str, Tensor] = {}
        self.origin: Tensor | None = None

    def add(self, u: Tensor, u_hat: Tensor, codes: Codes, layout: Layout) -> None:
        if self.origin is None:
            self.origin = layout.average(u.mean(0), "tokens")
        error, offset = (u - u_hat).flatten(), u - self.origin
        new = {
            "residual": error.dot(error).double(),
            "square": offset.flatten().dot(offset.flatten()).double(),
            "total": offset.sum(0).double(),
            "active": torch.tensor(codes.col.shape[0]),
        }
        self.sums = {name: self.sums.get(name, 0) + value for name, value in new.items()}
        self.n += len(u)

    def record(self, state: TrainState, dead_after: int, lr: float) -> StepRecord:
        layout, device = state.layout, self.sums["total"].device
        own = self.sums | {"n": torch.tensor(self.n, device=device)}
        sums = {name: layout.add(s.to(device), "tokens") for name, s in own.items()}
        n = int(sums["n"])
        if n != self.n * layout.parts("tokens"):
            raise UserError(
                f"Expected batches of one size on all processes, got {self.n} tokens here and {n} "
                f"on {layout.parts('tokens')} processes together."
            )
        variation = float(sums["square"]) - float(sums["total"].square().sum()) / n
        fvu = float(sums["residual"]) / max(variation, 1e-30)
        l0 = float(layout.add(sums["active"], "latents")) / n
        dead = (state.tokens_since >= dead_after).double().mean()
        dead_fraction = float(layout.average(dead, "latents"))
        return StepRecord(state.step, state.tokens, fvu, l0, dead_fraction, lr)


def _tensors(batches: Iterable[Activations | Tensor], sae: SAE) -> Iterator[Tensor]:
    for batch in batches:
        x = batch.x if isinstance(batch, Activations) else batch
        if len(x) == 0:
            raise UserError("Expected batches of at least one token, got an empty one.")
        yield x.to(device=sae.W_enc.device, dtype=sae.W_enc.dtype)


def _peek(
    stream: Iterator[Tensor], n_tokens: int, layout: Layout
) -> tuple[Tensor, Iterator[Tensor]]:
    """The first n_tokens tokens of all parts (fewer where the stream is short), and the stream."""
    head: list[Tensor] = []
    own = -(-n_tokens // layout.parts("tokens"))
    while sum(map(len, head)) < own and (batch := next(stream, None)) is not None:
        head.append(batch)
    if not head:
        raise UserError("Expected activations to train on, got an empty stream.")
    sample = layout.all_tokens(torch.cat(head)[:own])
    return sample[:n_tokens], _again(deque(head), stream)


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
    if state.layout.mesh is None:
        state.layout = world_layout(device=sae.device.type)
        state.layout.copy_first(sae.parameters(), "tokens")  # or those of own seeds never meet
    layout = state.layout
    _keep_freed_memory()
    stream = _tensors(batches, sae)
    if not state.started:
        sample, stream = _peek(stream, config.init_tokens, layout)
        state.__dict__.update(start(sae, sample, config, layout).__dict__)
    d_sae = sae.d_sae * layout.parts("latents")
    peak = default_lr(sae.config.kind, d_sae) if config.lr is None else config.lr
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
        window.add(u, u_hat, codes, layout)
        if state.step == config.steps and sae.config.kind == "gba":
            if config.gba.calibrate_tokens:
                tokens = config.gba.calibrate_tokens
                calibrate(sae, _peek(chain([x], stream), tokens, layout)[0], state)
            sae.b_enc.clamp_(max=0)  # above 0 it served to wake a latent; acts must not be negative
        if state.step % config.log_every == 0 or state.step == config.steps:
            yield window.record(state, dead_after, lr)
            window = _Window()
    sae.eval()
