"""``sae-apps train``: harvest activations, train an SAE on them, evaluate it on held-out text.

Every stage continues what an earlier process left in the run folder. The result does not depend
on how often and where the run was stopped. Under torchrun the first process harvests, evaluates and
writes, and all of them train (see processes.py).
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from sae_core.errors import UserError
from sae_core.provenance import package_versions

from .common import (
    EXIT_BAD_INPUT,
    PROG,
    StopSignal,
    catch_signals,
    first_difference,
    logging_to_stderr,
    plain,
    quiet_libraries,
    read_json,
    run_command,
    run_guarded,
)
from .evaluation import as_text, evaluate_run, finish, machine, peak_memory
from .fit import fit
from .inputs import Inputs, harvest, help_to_harvest, open_inputs, provenance, with_split_of
from .parsing import CommandParser, take
from .processes import Team, is_first, joined, shares
from .runs import RunFolder, check_free, claim
from .sinks import check_sink

if TYPE_CHECKING:
    from sae_core.state import TrainConfig

    from .settings import TrainSettings

LOG = logging.getLogger(__name__)
VERSIONS = ("sae-apps", "torch", "transformers")
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
}


def build_parser() -> CommandParser:
    parser = CommandParser(
        "train",
        "Train a sparse autoencoder on the activations of a language model and evaluate it on "
        "held-out text. A run that was stopped continues with the same command.",
        EXAMPLE,
        short=SHORT,
    )
    add_training_options(parser)
    return parser


def add_training_options(parser: CommandParser, skip: Iterable[str] = ()) -> None:
    """Everything that decides what a training gives, but for the fields in ``skip``.

    Args:
        skip: full keys, e.g. ``seed`` or ``sae.d_sae``.
    """
    from sae_core.sae import SAEConfig
    from sae_core.state import TrainConfig
    from sae_core.tokens import HarvestConfig

    from .recipes import GBA_PRESETS
    from .settings import ModelOptions, RunOptions, TextOptions

    of_sae = {key.removeprefix("sae.") for key in skip if key.startswith("sae.")}
    of_run = {key for key in skip if "." not in key}
    parser.add_argument(
        "--preset",
        choices=list(GBA_PRESETS),
        help="Defaults for --train.gba.*: a published setting (default: this program's own).",
    )
    parser.add_argument(
        "--accept_terms", action="store_true", help="Consent to the terms of a model that has some."
    )
    parser.add_options(RunOptions, skip=of_run)
    parser.add_options(ModelOptions, "model")
    parser.add_options(TextOptions, "text")
    parser.add_options(HarvestConfig, "harvest", skip={"max_tokens"})
    parser.add_options(SAEConfig, "sae", skip={"d_in", "d_sae"} | of_sae)
    if "d_sae" not in of_sae:
        parser.add_argument(
            "--sae.d_sae", type=int | None, help="Number of latents (null: 8 times d_in)."
        )
    parser.add_options(TrainConfig, "train", skip={"steps", "seed"})


def main(argv: Sequence[str]) -> int:
    if not is_first():
        return run_guarded(lambda: follow(argv))
    settings, options = parse(argv)

    def work(stop: StopSignal) -> tuple[Any, str]:
        if options.dry_run:
            from .estimate import estimate_text, estimate_training

            report = estimate_training(settings, accept_terms=options.accept_terms)
            return report, estimate_text(report)
        results = train_run(settings, stop, accept_terms=options.accept_terms, quiet=options.quiet)
        return results, as_text(results)

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)


def parse(argv: Sequence[str]) -> tuple["TrainSettings", Any]:
    """The flags as settings, and the flags themselves."""
    from .settings import TrainSettings

    options = parse_with(build_parser(), argv)
    return TrainSettings(**groups_of(options), sae=options.sae.as_dict()), options


def parse_with(parser: CommandParser, argv: Sequence[str]) -> Any:
    """The flags, on top of the defaults that ``--preset`` names."""
    from .recipes import GBA_PRESETS

    made = {name: asdict(preset()) for name, preset in GBA_PRESETS.items()}
    parser.use_preset(argv, "--preset", made, "train.gba")
    return parser.parse(argv)


def groups_of(options: Any) -> dict[str, Any]:
    """The flags as the groups of TrainSettings, without ``sae``."""
    from sae_core.state import TrainConfig
    from sae_core.tokens import HarvestConfig

    from .settings import ModelOptions, RunOptions, TextOptions

    return {
        "model": take(ModelOptions, options.model),
        "text": take(TextOptions, options.text),
        "run": take(RunOptions, options),
        "harvest": take(HarvestConfig, options.harvest),
        "train": take(TrainConfig, options.train),
    }


def train_run(
    settings: "TrainSettings",
    stop: StopSignal,
    *,
    inputs: Inputs | None = None,
    accept_terms: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Bring the run in ``settings.run.out`` to its end and return its results.

    Args:
        inputs: what ``open_inputs`` gives for these settings, where it is at hand.

    Raises:
        UserError: bad input, or the folder holds another run.
        Interrupted: SIGINT or SIGTERM came; the same call continues.
    """
    from sae_core.disk import only_writer

    from .settings import need_out

    with joined(settings.model.device) as team:
        shares(settings)
        settings = with_split_of(settings)
        run = check_free(need_out(settings.run.out), settings.identity())
        if run.is_finished:
            LOG.info("%s is finished: nothing to do.", run.path)
            team.tell(None)
            return read_json(run.results_file) | {"out": str(run.path)}
        check_sink(settings.run.log)
        start = time.monotonic()
        inputs = inputs or open_inputs(settings, accept_terms=accept_terms)
        shares(settings, inputs.lm.d_model)
        with only_writer(run.path):
            team.tell((settings, provenance(settings, inputs)), more=True)
            return _trained(settings, inputs, run, stop, start, team, quiet=quiet)


def follow(argv: Sequence[str]) -> None:
    """What a process of torchrun other than the first does: train with it, and say nothing.

    Raises:
        UserError: the model or the text is another one here than at the first process.
        SystemExit: the first process has failed, or gone.
    """
    from sae_core.shards import ShardedActivations

    from .settings import need_out

    try:
        settings, options = parse(argv)
    except UserError as error:  # of the flags: the first process has the same and says so
        raise SystemExit(EXIT_BAD_INPUT) from error
    if options.dry_run:
        return
    quiet_libraries()
    silent = logging_to_stderr(quiet=True)  # the first process warns of what all of them find
    with silent, joined(settings.model.device) as team, catch_signals() as stop:
        if (told := team.hear()) is None:
            return  # the run is finished
        settings, origin = told
        inputs = open_inputs(settings, accept_terms=options.accept_terms)
        if difference := first_difference(origin, provenance(settings, inputs)):
            raise UserError(
                f"Expected the model and the text of the first process in every one: {difference}."
            )
        help_to_harvest(settings, inputs, team)
        stored = ShardedActivations.open(*team.hear())
        config = training_config(settings, stored.n_tokens)
        fit(settings, config, RunFolder(need_out(settings.run.out)), stored, stop, quiet=True)


def _trained(
    settings: "TrainSettings",
    inputs: Inputs,
    run: RunFolder,
    stop: StopSignal,
    start: float,
    team: Team,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Harvest, train, evaluate, write the results; the caller holds the folder."""
    from sae_core.step import dead_after_tokens

    seconds: dict[str, float] = {}
    is_new = not run.run_file.exists()
    claim(run, settings.identity(), provenance(settings, inputs))
    try:
        with timed(seconds, "harvest"):
            stored, held_out = harvest(settings, inputs, run, team, quiet=quiet)
    except UserError:
        if is_new:
            run.discard_if_empty()
        raise
    team.tell((stored.folder, stored.hook_point))
    config = training_config(settings, stored.n_tokens)
    with timed(seconds, "train"):
        fitted = fit(settings, config, run, stored, stop, quiet=quiet)
        assert fitted is not None  # None is for the other processes
        sae, state = fitted
    with timed(seconds, "evaluate"):
        results = evaluate_run(settings, inputs, sae, state, held_out, quiet=quiet)
    seconds["total"] = time.monotonic() - start
    results |= {
        "steps": state.step,
        "n_tokens": state.tokens,
        "n_stored_tokens": stored.n_tokens,
        "dead_after_tokens": dead_after_tokens(config),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "wall_seconds": round(seconds["total"], 2),
        "peak_memory_bytes": peak_memory(),
        "machine": machine(),
        "out": str(run.path),
        "provenance": provenance(settings, inputs)
        | {"sae_hash": sae.hash(), "versions": package_versions(*VERSIONS)},
    }
    return plain(finish(run, sae, state, results))


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block took."""
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def training_config(settings: "TrainSettings", n_tokens: int) -> "TrainConfig":
    """``settings.train`` with the steps that the tokens and epochs make."""
    steps = max(1, int(n_tokens * settings.run.epochs) // settings.train.batch_size)
    return replace(settings.train, steps=steps, seed=settings.run.seed)
