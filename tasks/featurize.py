"""``sae-apps featurize``: rows of text to sparse features, with the SAE of a finished run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_core.errors import UserError

from .common import PROG, StopSignal, run_command, token_count
from .parsing import CommandParser, take
from .runs import RunFolder
from .stored import stored_rows

if TYPE_CHECKING:
    from sae_core.features import SparseFeatures
    from sae_core.sae import SAE
    from sae_core.text import TextSource

    from .settings import TextOptions, TrainSettings

EXAMPLE = (
    f"{PROG} featurize --run runs/x --text demo --rows 2000 --pooling max --out runs/x/features"
)
SHORT = {"text": "text.source", "column": "text.column"}


@dataclass(frozen=True)
class FeaturizeOptions:
    """What is read and what becomes of it."""

    run: str | None = None
    """Folder of a finished run."""
    out: str | None = None
    """Folder of the features (null: the folder features in the run)."""
    rows: int | str = "all"
    """Rows of the text from its beginning, e.g. 2000 or 20k; all: every row."""
    pooling: Literal["max", "mean", "sum", "last", "none"] = "max"
    """How the tokens of a row become one row of features; none: one row a token."""
    stored: bool = False
    """Use the run's stored activations of its training rows: no text is read, no model runs."""
    model: str | None = None
    """Another model than the run's, of the same width, e.g. a fine-tuned one."""
    device: str | None = None
    """Where model and SAE run (null: as in training)."""
    shard_rows: int = 1024
    """Rows encoded at a time; a kill loses at most so many, the same command continues."""
    engine: Literal["local", "ray"] = "local"
    """ray: by the workers of a Ray cluster."""
    workers: int | None = None
    """Of the Ray cluster (null: as many as fit)."""
    address: str | None = None
    """Of a running Ray cluster, e.g. auto (null: RAY_ADDRESS, else one on this machine)."""

    def __post_init__(self) -> None:
        for name, value in (("--shard-rows", self.shard_rows), ("--workers", self.workers)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        if self.engine == "local" and (self.workers or self.address):
            raise UserError(
                "--workers and --address are of the engine ray: expected --engine ray, got "
                f"{self.engine} with workers {self.workers} and address {self.address}."
            )
        if self.rows != "all":
            token_count(self.rows, "--rows")
        if self.stored and (self.pooling == "none" or self.rows != "all" or self.model):
            raise UserError(
                "With stored activations expected a pooling, all rows and the run's model, got "
                f"pooling {self.pooling}, rows {self.rows} and model {self.model}."
            )
        if self.stored and self.engine == "ray":
            raise UserError(
                f"Stored activations need no workers: expected --engine local, got {self.engine}."
            )


@dataclass(frozen=True)
class FinishedRun:
    """A run with its settings and its SAE."""

    folder: RunFolder
    settings: "TrainSettings"
    sae: "SAE"
    extra: dict[str, Any]
    """What was saved with the SAE: hook_point, freq, peak, group, taf, model_id."""

    @property
    def hook_point(self) -> str:
        return self.extra["hook_point"]


def main(argv: Sequence[str]) -> int:
    from .settings import TextOptions

    parser = CommandParser(
        "featurize",
        "Turn rows of text into sparse features with the SAE of a finished run, and keep them "
        "with their texts and labels.",
        EXAMPLE,
        short=SHORT,
    )
    parser.add_argument(
        "--accept_terms", action="store_true", help="Consent to the terms of a model that has some."
    )
    parser.add_options(FeaturizeOptions)
    parser.add_options(TextOptions, "text", skip={"held_out_frac", "split_seed"})
    options = parser.parse(argv)
    chosen, text = take(FeaturizeOptions, options), take(TextOptions, options.text)

    def work(_stop: StopSignal) -> tuple[Any, str]:
        from .cached import is_text_cached
        from .estimate import estimate_features, estimate_text
        from .featurize_run import featurize_run

        run = open_run(chosen.run, device=chosen.device)
        source = stored_rows(run) if chosen.stored else limited(text, chosen.rows)
        out = Path(chosen.out) if chosen.out else run.folder.path / "features"
        if options.dry_run:
            report = estimate_features(run, source, chosen, accept_terms=options.accept_terms)
            return report, estimate_text(report)
        features = featurize_run(
            run,
            source,
            chosen,
            out,
            is_local=is_text_cached(text.source),
            accept_terms=options.accept_terms,
            quiet=options.quiet,
        )
        summary = summarise(features, out)
        return summary, as_text(summary)

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)


def open_run(path: str | None, *, device: str | None = None) -> FinishedRun:
    """Read a finished run.

    Raises:
        UserError: no run there, or it is not finished; CorruptFileError: a damaged file.
    """
    from sae_core.sae import load_sae

    from .settings import TrainSettings

    if not path:
        raise UserError("Expected the folder of a run, got none: add --run FOLDER.")
    folder = RunFolder(Path(path))
    settings = TrainSettings.of_identity(folder.read()["config"])
    if not folder.is_finished:
        raise UserError(
            f"Expected a finished run at {path}, got one without results.json: "
            "continue it with the train command that began it."
        )
    sae, extra = load_sae(folder.sae)
    device = device or settings.model.device
    settings = replace(settings, model=replace(settings.model, device=device))
    try:
        sae = sae.to(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        told = str(error).splitlines()[0]
        raise UserError(
            f"Expected a device that torch can use here, got {device!r}: {told}"
        ) from error
    return FinishedRun(folder, settings, sae, extra)


def limited(text: "TextOptions", rows: int | str) -> "TextSource":
    """The text, cut after ``rows`` rows; fewer than asked for are refused when they are read."""
    from sae_core.text import TextSource

    from .settings import open_source

    source = open_source(text)
    if rows == "all":
        return source
    n = token_count(rows, "--rows")
    available = sum(1 for _ in islice(source, n))
    if available < n:
        raise UserError(f"--rows asked for {n} rows, {source.id} has only {available}.")
    return TextSource(f"{source.id}[first {n} rows]", partial(_first, source, n))


def _first(source: "TextSource", n: int) -> Any:
    return islice(source, n)


def summarise(features: "SparseFeatures", out: Path) -> dict[str, Any]:
    """The numbers that describe a feature matrix."""
    return {
        "out": str(out),
        "n_rows": features.n_rows,
        "d_sae": features.d_sae,
        "n_entries": int(features.acts.nnz),
        "entries_per_row": features.acts.nnz / features.n_rows,
        "active_latents": int((features.freq > 0).sum()),
        "columns": features.rows.column_names,
        "provenance": features.provenance.to_dict(),
    }


def as_text(summary: dict[str, Any]) -> str:
    """The summary as lines for people."""
    return (
        f"{summary['n_rows']:,} rows x {summary['d_sae']:,} latents, "
        f"{summary['entries_per_row']:.1f} active latents a row, "
        f"{summary['active_latents']:,} latents active in at least one row\n"
        f"columns: {', '.join(summary['columns'])}\n"
        f"written to {summary['out']}"
    )
