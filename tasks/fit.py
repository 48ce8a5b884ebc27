"""The training stage of a run, in one process or in several that torchrun has started."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sae_core.errors import UserError

from .common import EXIT_BAD_INPUT, StopSignal, plain
from .processes import PATIENCE, n_processes, own_device
from .progress import Progress
from .runs import RunFolder, truncate_metrics
from .sinks import open_sink

if TYPE_CHECKING:
    from sae_core.parallel import Layout
    from sae_core.sae import SAE
    from sae_core.shards import ShardedActivations
    from sae_core.state import TrainConfig, TrainState

    from .settings import TrainSettings

LOG = logging.getLogger(__name__)


def fit(
    settings: "TrainSettings",
    config: "TrainConfig",
    run: RunFolder,
    stored: "ShardedActivations",
    stop: StopSignal,
    *,
    quiet: bool,
) -> tuple["SAE", "TrainState"] | None:
    """Train from the last checkpoint, or from the start, to the end.

    All processes call it; the first one writes, and gets the result. Records reach metrics.jsonl
    before the checkpoint that contains them, so what a kill leaves is always at least as long as
    the checkpoint, and is cut back to it.
    """
    from sae_core.buffer import batches, prefetch
    from sae_core.parallel import world_layout
    from sae_core.sharded import shard_of, whole_of
    from sae_core.train import train

    device = settings.model.device
    layout = world_layout(settings.run.latent_parts, device.partition(":")[0], PATIENCE)
    sae, state = shard_of(
        *start_or_resume(settings, config, run, stored.d_in, layout), config, layout
    )
    part = (layout.part("tokens"), layout.parts("tokens"))
    stream = batches(stored, config.batch_size, seed=config.seed, start_step=state.step, part=part)
    shown = Progress("train", config.steps, "steps", initial=state.step, enabled=not quiet)
    every, saved = settings.run.checkpoint_every, state.step
    later = stop.deferred(patient=n_processes() > 1)
    with later, shown, _writing(settings, run, state.step, layout) as write:
        for record in train(sae, prefetch(stream, 2), config, state):
            write(asdict(record))
            shown.update_to(record.step)
            is_stopped = _heard(stop, layout)
            is_due = record.step // every > saved // every or record.step == config.steps
            if is_due or is_stopped:
                _save(run, sae, state, config)
                saved = record.step
            if is_stopped:  # not for a signal that the others have not heard of yet
                stop.check()
    whole = whole_of(sae.eval(), state, config)
    return None if whole is None else (whole[0].to(device), whole[1])


def start_or_resume(
    settings: "TrainSettings",
    config: "TrainConfig",
    run: RunFolder,
    d_in: int,
    layout: "Layout",
) -> tuple["SAE", "TrainState"]:
    """The whole SAE and state of the last checkpoint, or fresh ones, on each process.

    Raises:
        UserError: the processes do not find the same checkpoint.
    """
    import torch

    from sae_core.checkpoint import load_checkpoint
    from sae_core.sae import SAE
    from sae_core.state import TrainState

    # one card need not hold the whole of an SAE whose latents are split
    device = "cpu" if layout.parts("latents") > 1 else own_device(settings.model.device)
    if not layout.is_first:
        layout.wait()
    found = load_checkpoint(run.checkpoints, config, device)  # the first one also tidies up there
    if layout.is_first:
        layout.wait()
    _check_alike(found[1].step if found else 0, run, layout)
    if found:
        if layout.is_first:
            LOG.info("Continuing %s at step %d of %d.", run.path, found[1].step, config.steps)
        return found
    generator = torch.Generator().manual_seed(config.seed)
    sae = SAE(settings.sae_config(d_in), generator=generator)
    return sae.to(device), TrainState()


def _check_alike(step: int, run: RunFolder, layout: "Layout") -> None:
    """Check that all processes begin at this step, or they would wait for each other for ever."""
    import torch

    from sae_core.parallel import AXES

    least, most = (torch.tensor(step, device=layout.device) for _ in range(2))
    layout.smallest(least, *AXES)
    layout.largest(most, *AXES)
    if least < most:
        if not layout.is_first:
            raise SystemExit(EXIT_BAD_INPUT)
        raise UserError(
            f"Expected the same checkpoint on all processes, got those of step {int(least)} to "
            f"{int(most)}: {run.path} must lie on a disk that all of them share."
        )


@contextmanager
def _writing(
    settings: "TrainSettings", run: RunFolder, step: int, layout: "Layout"
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Where the records go: metrics.jsonl and the sink; nowhere on all processes but the first."""
    from sae_core.disk import append_jsonl

    if not layout.is_first:
        yield lambda record: None
        return
    truncate_metrics(run.metrics_file, step)
    with open_sink(settings.run.log, run.path) as send:

        def write(record: Mapping[str, Any]) -> None:
            append_jsonl(run.metrics_file, plain(record))
            send(record)

        yield write


def _heard(stop: StopSignal, layout: "Layout") -> bool:
    """Has a signal reached any process? They stop at the same step, or they would wait for ever."""
    import torch

    from sae_core.parallel import AXES

    signum = int(layout.largest(torch.tensor(stop.signum or 0, device=layout.device), *AXES))
    if signum:  # one that comes in the meantime stays for the next time
        stop.signum = signum
    return signum > 0


def _save(run: RunFolder, sae: "SAE", state: "TrainState", config: "TrainConfig") -> None:
    """A checkpoint of the whole, by the first process."""
    from sae_core.checkpoint import save_checkpoint
    from sae_core.sharded import whole_of

    if (whole := whole_of(sae, state, config)) is not None:
        save_checkpoint(run.checkpoints, *whole, config)
