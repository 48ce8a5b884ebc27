"""Train several SAEs on one stream of activations: seeds, kinds, widths and hook points at once.

    jobs = [
        TrainJob(f"seed {i}", SAE(SAEConfig(576, 4608), generator=...), "layers.15.out", config)
        for i in range(2)
    ]
    found = stream_activations(lm, rows, ["layers.6.out", "layers.15.out"], harvest)
    for name, record in train_together(jobs, shuffle_streams(found, 1024, 65536, seed=0)):
        print(name, record.fvu)

Each job is `train` itself, on an iterator over the shared stream, so its result is that of `train`
alone on the same batches, bit for bit. The job that has read least goes on, up to its next record,
so that nobody runs away.

Memory: a batch is let go when all jobs of its hook point have read it. No job is further behind
than another reads between two of its records: log_every batches; before the first record also
those of init_tokens; behind the last one, for kind="gba", those of gba.calibrate_tokens. So many
batches of each hook point are held at most, once for all jobs, beside what each `train` holds.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sae_core.activations import Activations
from sae_core.errors import UserError
from sae_core.sae import SAE
from sae_core.state import TrainConfig, TrainState
from sae_core.train import StepRecord, train

Batch = Activations | Tensor


@dataclass(frozen=True, eq=False)
class TrainJob:
    """One SAE to train on the batches of one hook point."""

    name: str
    """Comes with each of its records."""
    sae: SAE
    """Trained in place."""
    hook_point: str
    """Key of its batches in the stream."""
    config: TrainConfig
    """Each job takes as many steps as its own config says."""
    state: TrainState = field(default_factory=TrainState)
    """Where a checkpoint stopped; filled in place, so that it can be saved between records."""


class _Feed(Iterator[Batch]):
    """The batches of one job: those that others have fetched, else the next of the stream."""

    def __init__(self, job: TrainJob, source: "_Source") -> None:
        self.hook_point, self.place = job.hook_point, job.state.step
        self.waiting: deque[Batch] = deque()
        self.source = source

    def __next__(self) -> Batch:
        while not self.waiting:  # more than once where the stream begins before the job's state
            self.source.fetch()
        self.place += 1
        return self.waiting.popleft()


class _Source:
    """The stream, and who still reads it."""

    def __init__(self, stream: Iterator[Mapping[str, Batch]], place: int) -> None:
        self.stream, self.place = stream, place
        self.readers: list[_Feed] = []

    def fetch(self) -> None:
        """Hand the next batches out; StopIteration at the end of the stream."""
        found = next(self.stream)
        for feed in self.readers:
            if feed.hook_point not in found:
                raise UserError(
                    f"Expected batches of the hook point {feed.hook_point!r} in the stream, got "
                    f"those of {', '.join(found) or 'none'}."
                )
            if feed.place <= self.place:
                feed.waiting.append(found[feed.hook_point])
        self.place += 1


def train_together(
    jobs: Sequence[TrainJob], stream: Iterable[Mapping[str, Batch]], *, start_step: int = 0
) -> Iterator[tuple[str, StepRecord]]:
    """Train the SAEs of all jobs in place, each for its own number of steps.

    Args:
        jobs: at least one, of different names, no SAE and no state twice.
        stream: batches by hook point, e.g. of ``stream_activations`` or ``shuffle_streams``; it is
            read as far as the longest job needs it.
        start_step: number of the first batch. A job whose state has done more steps passes over
            those it has seen; resume all with a stream from the least of their steps on.
    Yields:
        The name of a job and its next StepRecord.
    Raises:
        UserError: at the call: jobs that cannot go together. While iterating: a hook point that
            the stream lacks, and what ``train`` raises.
    """
    _check(jobs, start_step)
    return _together(jobs, _Source(iter(stream), start_step))


def _together(jobs: Sequence[TrainJob], source: _Source) -> Iterator[tuple[str, StepRecord]]:
    source.readers = [_Feed(job, source) for job in jobs]
    running = [
        (job, feed, train(job.sae, feed, job.config, job.state))
        for job, feed in zip(jobs, source.readers, strict=True)
    ]
    while running:
        one = min(running, key=lambda one: one[1].place)
        job, feed, records = one
        record = next(records, None)
        if record is not None:
            yield job.name, record
        if record is None or record.step == job.config.steps:
            next(records, None)  # what train does behind its last record
            running.remove(one)
            source.readers.remove(feed)  # before others go on: what waits for it is let go


def _check(jobs: Sequence[TrainJob], start_step: int) -> None:
    if not jobs:
        raise UserError("Expected at least one job to train, got none.")
    for what, values in (
        ("names", [job.name for job in jobs]),
        ("SAEs", [id(job.sae) for job in jobs]),
        ("states", [id(job.state) for job in jobs]),
    ):
        if len(set(values)) < len(values):
            raise UserError(
                f"Expected jobs with different {what}, got one of them twice in "
                f"{', '.join(job.name for job in jobs)}."
            )
    for job in jobs:
        if job.state.step < start_step:
            raise UserError(
                f"Expected a stream from step {job.state.step} of {job.name!r} on or earlier, got "
                f"one from step {start_step} on."
            )
