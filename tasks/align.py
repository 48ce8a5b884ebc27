"""``sae-apps align``: do the latents keep the relations that a semantic space has between items?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sae_core.errors import UserError

from .common import PROG, StopSignal, run_command
from .parsing import CommandParser, take

EXAMPLE = f"{PROG} align --run runs/x --items cities.csv --text name --against lat,lon"


@dataclass(frozen=True)
class AlignOptions:
    """What is compared, and where it goes."""

    run: str | None = None
    """Folder of a finished run: the SAE and its model."""
    items: str | None = None
    """jsonl, json, csv, tsv or parquet file, one item a row."""
    text: str = "text"
    """Column of the text that the model reads."""
    against: str = "lat,lon"
    """Columns of the other space, joined by commas: lat,lon (great-circle distances), or numbers of
    an embedding; or a .npy file with a row for each item."""
    strata: str | None = None
    """Column of a group: permutations then move items within groups only."""
    template: str = "{}"
    """What the model reads, with the text in place of {}."""
    pooling: Literal["last", "mean"] = "last"
    """Token of an item that is taken, or the mean over its tokens."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """Distance of codes and of embeddings."""
    method: Literal["spearman", "tau-a"] = "spearman"
    """Rank correlation; tau-a for heavy ties, slow."""
    permutations: int = 9999
    """Of the labels of the items, for p."""
    n_boot: int = 1000
    """Resamples of the items behind the intervals."""
    out: str | None = None
    """Folder of the result (null: align-ITEMS in the run)."""
    model: str | None = None
    """Where the run's model is now, if it has moved."""
    seed: int = 0
    """Of permutations and resamples."""
    overwrite: bool = False
    """Replace what this command wrote there before."""

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise UserError(f"Expected one {{}} in --template, got {self.template!r}.")


def build_parser() -> CommandParser:
    """The parser of this command."""
    parser = CommandParser(
        "align",
        "Compare the distances between the codes of items with their distances in another space: "
        "rank correlation, a test by permuted labels, intervals over items, and the difference "
        "from the activations that the SAE reads. It measures agreement with that space, not "
        "meaning.",
        EXAMPLE,
    )
    parser.add_argument(
        "--accept_terms", action="store_true", help="Consent to the terms of a model that has some."
    )
    parser.add_options(AlignOptions)
    return parser


def main(argv: Sequence[str]) -> int:
    options = build_parser().parse(argv)

    def work(_stop: StopSignal) -> tuple[Any, str]:
        from . import align_run
        from .finished import carry_out

        chosen = take(AlignOptions, options)
        plan = align_run.make_plan(chosen, accept_terms=options.accept_terms)
        return carry_out(
            align_run, plan, dry_run=options.dry_run, overwrite=chosen.overwrite
        )

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)
