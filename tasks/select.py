"""``sae-apps select``: the rows of a pool that are most like given targets, and why."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_core.errors import UserError

from .common import PROG, StopSignal, run_command
from .parsing import CommandParser, take
from .select_data import PoolOptions, TargetOptions
from .select_files import Output, check_free
from .select_text import as_text, estimate, estimate_text

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from sae_apps.selection.config import SelectConfig
    from sae_apps.selection.embed import EmbedConfig

LOG = logging.getLogger(__name__)
EXAMPLE = (
    f"{PROG} select --pool P.jsonl --target T.jsonl --budget 5% --run runs/x --out picks.jsonl"
)
SHORT = {"pool": "pool.source+", "target": "target.source+"}
APART = {"embed", "prototypes", "strategy"}  # fields of SelectConfig that are not --select.*


@dataclass(frozen=True)
class SelectOptions:
    """What is picked, and where it goes."""

    run: str | None = None
    """Folder of a finished run: the SAE and its model."""
    budget: int | float | str = "5%"
    """Share of the rows (5% or 0.05), rows (1000) or tokens ("200k tokens")."""
    out: str | None = None
    """The picks: NAME.jsonl; NAME.meta.json beside it says where they come from."""
    scores: str | None = None
    """Also write the scores of all rows: NAME.parquet."""
    evaluation: str | None = None
    """Rows that share text with this file or dataset, e.g. a test set, are not picked."""
    prototypes: str = "auto"
    """one: the mean code of all targets; group: of each group; each: every target is one; auto: as
    the method has it."""
    strategy: str = "auto"
    """topk with one prototype; with several nearest, max or round_robin, in which they take turns;
    auto: as the method has it, else topk with one, nearest with each, round_robin with group."""
    overwrite: bool = False
    """Replace files of the same names."""


@dataclass(frozen=True)
class EncodeOptions:
    """How the pool is encoded."""

    model: str | None = None
    """Where the run's model is now, if it has moved."""
    device: str | None = None
    """Where model and SAE run (null: as in training)."""
    features: str | None = None
    """Folder of the pool's features (null: in the run, under a name that follows from the pool and
    the settings, so that a second call with other targets finds them)."""
    shard_rows: int = 4096
    """Rows encoded at a time; a kill loses at most so many."""
    engine: Literal["local", "ray"] = "local"
    """ray: by the workers of a Ray cluster."""
    workers: int | None = None
    """Of the Ray cluster (null: as many as fit)."""
    address: str | None = None
    """Of a running Ray cluster, e.g. auto (null: RAY_ADDRESS, else one on this machine)."""


def build_parser(method: str) -> CommandParser:
    """The parser with the defaults of a method."""
    from sae_apps.selection.config import PRESETS, SelectConfig
    from sae_apps.selection.embed import EmbedConfig

    groups = {"select": SelectConfig, "embed": EmbedConfig}
    short = {f.name: f"{key}.{f.name}" for key, cls in groups.items() for f in fields(cls)}
    parser = CommandParser(
        "select",
        "Pick from a pool of instruction data the rows that are most like given targets, by the "
        "features of a sparse autoencoder, and say which latents make each of them similar. What "
        "was encoded before is not encoded again: a command that was stopped continues, and one "
        "with other targets needs no model pass over the pool.",
        EXAMPLE,
        short=SHORT | {name: key for name, key in short.items() if name not in APART},
    )
    parser.add_argument(
        "--method",
        choices=list(PRESETS),
        default=method,
        help="mona: as published. It sets the defaults of --select.* and --embed.*",
    )
    parser.add_argument(
        "--accept_terms", action="store_true", help="Consent to the terms of a model that has some."
    )
    parser.add_options(SelectOptions)
    parser.add_options(EncodeOptions)
    parser.add_options(PoolOptions, "pool")
    parser.add_options(TargetOptions, "target")
    parser.add_options(SelectConfig, "select", skip=APART)
    parser.add_options(EmbedConfig, "embed")
    config, embed = preset(method)
    parser.set_defaults(
        {f"select.{name}": value for name, value in asdict(config).items() if name not in APART}
        | {f"embed.{name}": value for name, value in asdict(embed).items()}
    )
    return parser


def preset(method: str) -> "tuple[SelectConfig, EmbedConfig]":
    """The settings of a method, those of the encoding apart."""
    from sae_apps.selection.config import SelectConfig
    from sae_apps.selection.embed import EmbedConfig

    config = SelectConfig.preset(method)
    return config, config.embed or EmbedConfig()


def parse(argv: Sequence[str]) -> "Namespace":
    """The options. A method, also one in a configuration file, changes the defaults of others."""
    from sae_apps.selection.config import PRESETS

    named = [arg.removeprefix("--method=") for arg in argv if arg.startswith("--method=")]
    named += [after for arg, after in zip(argv, argv[1:], strict=False) if arg == "--method"]
    method = named[-1] if named and named[-1] in PRESETS else "recommended"
    options = build_parser(method).parse(argv)
    return options if options.method == method else build_parser(options.method).parse(argv)


def open_output(chosen: SelectOptions) -> Output | None:
    """Raises:
    UserError: a name that does not end as it must.
    """
    if not chosen.out:
        return None
    return Output(Path(chosen.out), Path(chosen.scores) if chosen.scores else None)


def main(argv: Sequence[str]) -> int:
    from sae_apps.selection.config import SelectConfig
    from sae_apps.selection.embed import EmbedConfig

    options = parse(argv)
    chosen, encoding = take(SelectOptions, options), take(EncodeOptions, options)

    def work(_stop: StopSignal) -> tuple[Any, str]:
        from .select_run import Asked, absent, make_plan, run

        asked = Asked(
            chosen,
            encoding,
            take(PoolOptions, options.pool),
            take(TargetOptions, options.target),
            options.method,
            take(SelectConfig, options.select),
            take(EmbedConfig, options.embed),
            options.accept_terms,
        )
        output = open_output(chosen)
        if output is None and not options.dry_run:
            raise UserError("Expected a file for the picks, got none: add --out FILE.jsonl.")
        if options.dry_run and (missing := absent(asked)):
            report = {"missing": missing}
            return report, estimate_text(report)
        plan = make_plan(asked)
        found = output and check_free(output, plan.identity, overwrite=chosen.overwrite)
        if options.dry_run or output is None:
            report = estimate(plan.encoder, plan.pool, plan.folder, encoding.shard_rows)
            return report, estimate_text(report)
        if found:
            LOG.info("%s holds these picks already: nothing to do.", output.picks)
            return found["summary"], as_text(found["summary"])
        summary = run(asked, plan, output, quiet=options.quiet)
        return summary, as_text(summary)

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)
