"""``sae-apps train``: harvest activations, train an SAE on them, evaluate it on held-out text.

Every stage continues what an earlier process left in the run folder. The result does not depend
on how often and where the run was stopped.
"""

import logging
import platform
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_core.errors import MissingExtraError, UserError

from .common import PROG, Interrupted, StopSignal, first_difference, plain, run_command, size, to_json
from .parsing import CommandParser, take
from .progress import Progress, duration, progress
from .runs import RunFolder, check_free, claim, read_metrics, truncate_metrics

if TYPE_CHECKING:
    from sae_core.models import LanguageModel
    from sae_core.sae import SAE
    from sae_core.shards import ShardedActivations
    from sae_core.state import TrainConfig, TrainState
    from sae_core.text import TextSource

    from .settings import TrainSettings

LOG = logging.getLogger(__name__)
EXAMPLE = (
    f"{PROG} train --model smollm2-135m --text demo --hook layers.15.out --tokens 1M "
    "--kind gba --d-sae 4608 --out runs/x"
)
SHORT = {
    "model": "model.name",
    "dtype": "model.dtype",
    "device": "model.device",
    "text": "text.source",
    "column": "text.column",
    "context_size": "harvest.context_size",
    "kind": "sae.kind",
    "d_sae": "sae.d_sae",
    "k": "sae.k",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "precision": "train.precision",
    "htf": "train.gba.htf",
    "ltf": "train.gba.ltf",
    "groups": "train.gba.n_groups",
    "l0": "train.sparsity.target_l0",
}
EVAL_BATCH = 2048


def build_parser() -> CommandParser:
    from sae_core.sae import SAEConfig
    from sae_core.state import TrainConfig
    from sae_core.tokens import HarvestConfig

    from .settings import ModelOptions, RunOptions, TextOptions

    parser = CommandParser(
        "train",
        "Train a sparse autoencoder on the activations of a language model and evaluate it on "
        "held-out text. A run that was stopped continues with the same command.",
        EXAMPLE,
        short=SHORT,
    )
    parser.add_argument(
        "--preset",
        choices=list(presets()),
        help="Defaults for --train.gba.*: a published setting (default: this program's own).",
    )
    parser.add_argument(
        "--accept_terms", action="store_true", help="Consent to the terms of a model that has some."
    )
    parser.add_options(RunOptions)
    parser.add_options(ModelOptions, "model")
    parser.add_options(TextOptions, "text")
    parser.add_options(HarvestConfig, "harvest", skip={"max_tokens"})
    parser.add_options(SAEConfig, "sae", skip={"d_in", "d_sae"})
    parser.add_argument(
        "--sae.d_sae", type=int | None, help="Number of latents (null: 8 times d_in)."
    )
    parser.add_options(TrainConfig, "train", skip={"steps", "seed"})
    return parser


def presets() -> dict[str, Callable[[], Any]]:
    from sae_core import gba

    return {
        "paper_main": gba.paper_main,
        "paper_recommended": gba.paper_recommended,
        "ba": gba.ba,
    }


def main(argv: Sequence[str]) -> int:
    parser = build_parser()
    parser.use_preset(argv, "--preset", {n: asdict(f()) for n, f in presets().items()}, "train.gba")
    options = parser.parse(argv)
    settings = settings_from(options)

    def work(stop: StopSignal) -> tuple[Any, str]:
        if options.dry_run:
            from .estimate import estimate_training

            report = estimate_training(settings, accept_terms=options.accept_terms)
            return report, report["text"]
        results = train_run(
            settings, stop, accept_terms=options.accept_terms, quiet=options.quiet
        )
        return results, as_text(results)

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)


def settings_from(options: Any) -> "TrainSettings":
    """The parsed flags as settings."""
    from sae_core.state import TrainConfig
    from sae_core.tokens import HarvestConfig

    from .settings import ModelOptions, RunOptions, TextOptions, TrainSettings

    return TrainSettings(
        model=take(ModelOptions, options.model),
        text=take(TextOptions, options.text),
        run=take(RunOptions, options),
        harvest=take(HarvestConfig, options.harvest),
        sae=options.sae.as_dict(),
        train=take(TrainConfig, options.train),
    )


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked."""

    lm: "LanguageModel"
    hook_point: str
    train_rows: "TextSource"
    held_out_rows: "TextSource"
    data_id: str


def open_inputs(settings: "TrainSettings", *, accept_terms: bool = False) -> Inputs:
    """Open the text and the model, and find the hook point; writes nothing into the run.

    Raises:
        UserError: any of them does not exist or cannot be used.
    """
    from sae_core.hooks import resolve_hook_point
    from sae_core.text import split_rows

    from .settings import open_model, open_source

    source = open_source(settings.text)
    rows, held_out = split_rows(source, settings.text.held_out_frac, settings.run.seed)
    for part, name in ((rows, "training"), (held_out, "held-out")):
        if next(iter(part), None) is None:
            raise UserError(
                f"Expected {name} rows in {source.id}, got none at text.held_out_frac "
                f"{settings.text.held_out_frac}."
            )
    lm = open_model(settings.model, accept_terms=accept_terms)
    hook_point = settings.hook_point(lm)
    resolve_hook_point(lm.model, hook_point)
    return Inputs(lm, hook_point, rows, held_out, source.id)


def train_run(
    settings: "TrainSettings",
    stop: StopSignal,
    *,
    accept_terms: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Bring the run in ``settings.run.out`` to its end and return its results.

    Raises:
        UserError: bad input, or the folder holds another run.
        Interrupted: SIGINT or SIGTERM came; the same call continues.
    """
    from .settings import need_out

    start = time.monotonic()
    run = check_free(need_out(settings.run.out), settings.identity())
    if run.is_finished:
        LOG.info("%s is finished; nothing to do.", run.path)
        return read_results(run)
    inputs = open_inputs(settings, accept_terms=accept_terms)
    is_new = not run.run_file.exists()
    seconds: dict[str, float] = {}
    try:
        claim(run, settings.identity(), provenance(settings, inputs))
        with timed(seconds, "harvest"):
            stored, held_out = harvest(settings, inputs, run, stop, quiet=quiet)
    except UserError:
        if is_new:
            run.discard_if_empty()
        raise
    with timed(seconds, "train"):
        sae, state, config = fit(settings, run, stored, stop, quiet=quiet)
    with timed(seconds, "evaluate"):
        results = evaluate_run(settings, inputs, sae, state, held_out, stop, quiet=quiet)
    seconds["total"] = time.monotonic() - start
    results |= {
        "n_tokens": state.tokens,
        "n_stored_tokens": stored.n_tokens,
        "steps": config.steps,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "wall_seconds": round(seconds["total"], 2),
        "peak_memory_bytes": peak_memory(),
        "machine": machine(),
        "out": str(run.path),
        "provenance": provenance(settings, inputs) | {"sae_hash": sae.hash()},
    }
    finish(run, sae, state, results)
    return read_results(run)


def provenance(settings: "TrainSettings", inputs: Inputs) -> dict[str, str]:
    """Where the run comes from; the versions are those of the process that began it."""
    return {
        "model_id": inputs.lm.model_id,
        "model_revision": inputs.lm.revision,
        "hook_point": inputs.hook_point,
        "data_id": inputs.data_id,
        "seed": str(settings.run.seed),
    }


def harvest(
    settings: "TrainSettings", inputs: Inputs, run: RunFolder, stop: StopSignal, *, quiet: bool
) -> tuple["ShardedActivations", "ShardedActivations"]:
    """Activations of the training and the held-out tokens on disk."""
    from sae_core.shards import harvest_shards
    from sae_core.tokens import count_tokens

    from .common import token_count

    wanted = token_count(settings.run.eval_tokens)
    n_held_out = count_tokens(
        inputs.lm.tokenizer, inputs.held_out_rows, settings.harvest, wanted
    )
    parts = (
        ("train", inputs.train_rows, settings.max_tokens),
        ("held_out", inputs.held_out_rows, n_held_out),
    )
    stored = []
    for name, rows, max_tokens in parts:
        shown = Progress(f"harvest {name}", max_tokens, "tokens", enabled=not quiet)

        def update(done: int, shown: Progress = shown) -> None:
            shown.update_to(done)
            stop.check()

        with shown:
            folders = harvest_shards(
                inputs.lm,
                rows,
                [inputs.hook_point],
                run.activations / name,
                replace(settings.harvest, max_tokens=max_tokens),
                dtype=settings.store_dtype(),
                shard_tokens=settings.shard_tokens(),
                progress=update,
            )
        stored.append(folders[inputs.hook_point])
    return stored[0], stored[1]


def training_config(settings: "TrainSettings", n_tokens: int) -> "TrainConfig":
    """``settings.train`` with the steps that the tokens and epochs make."""
    steps = max(1, int(n_tokens * settings.run.epochs) // settings.train.batch_size)
    return replace(settings.train, steps=steps, seed=settings.run.seed)


def fit(
    settings: "TrainSettings",
    run: RunFolder,
    stored: "ShardedActivations",
    stop: StopSignal,
    *,
    quiet: bool,
) -> tuple["SAE", "TrainState", "TrainConfig"]:
    """Train from the last checkpoint, or from the start, to the end.

    Records reach metrics.jsonl before the checkpoint that contains them, so what a kill leaves is
    always at least as long as the checkpoint, and is cut back to it.
    """
    import torch

    from sae_core.buffer import batches, prefetch
    from sae_core.checkpoint import load_checkpoint, save_checkpoint
    from sae_core.disk import append_jsonl
    from sae_core.sae import SAE
    from sae_core.state import TrainState
    from sae_core.train import train

    config = training_config(settings, stored.n_tokens)
    found = load_checkpoint(run.checkpoints, config, settings.model.device)
    if found:
        sae, state = found
    else:
        generator = torch.Generator().manual_seed(config.seed)
        sae = SAE(settings.sae_config(stored.d_in), generator=generator)
        sae, state = sae.to(settings.model.device), TrainState()
    truncate_metrics(run.metrics_file, state.step)
    stream = prefetch(
        batches(stored, config.batch_size, seed=config.seed, start_step=state.step), 2
    )
    shown = Progress("train", config.steps, "steps", initial=state.step, enabled=not quiet)
    saved = state.step
    with shown, metric_log(settings, run) as send:
        for record in train(sae, stream, config, state):
            append_jsonl(run.metrics_file, plain(asdict(record)))
            send(asdict(record))
            shown.update_to(record.step)
            is_due = record.step // settings.run.checkpoint_every > saved // settings.run.checkpoint_every
            if is_due or stop.signum is not None or record.step == config.steps:
                save_checkpoint(run.checkpoints, sae, state, config)
                saved = record.step
            stop.check()
    return sae.eval(), state, config
