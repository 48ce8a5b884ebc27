"""``sae-apps monet``: the experts that serve a domain, and what deleting them does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_core.errors import UserError

from .common import PROG, StopSignal, run_command
from .parsing import CommandParser, take

EXAMPLE = f"{PROG} monet --model MonetLLM/monet-vd-850M-100BT-hf --data docs.jsonl --out runs/monet"

# Least and most: beyond the second is no experiment but a slip, which would run for weeks.
BOUNDS = (
    ("random_draws", 1, 1000),
    ("permutations", 0, 1_000_000),
    ("n_boot", 1, 1_000_000),
    ("seed", 0, (1 << 32) - 1),
)


@dataclass(frozen=True)
class MonetOptions:
    """What is read and deleted, and where the masks go."""

    model: str | None = None
    """Folder or hub id of a Monet model; code of its own is never run."""
    data: str | None = None
    """jsonl, json, csv, tsv or parquet file of documents with a domain each."""
    text: str = "text"
    """Column of the document."""
    label: str = "domain"
    """Column of its domain."""
    score: str | None = None
    """Column of a number, e.g. toxicity: experts that correlate with it make one more mask."""
    correlation: float = 0.1
    """Least correlation with the score, over documents."""
    threshold: float = 0.01
    """Smallest routing weight of a token that counts as use of an expert."""
    ratio: float = 2.0
    """An expert belongs to a domain where its weight is so many times that of any other."""
    min_tokens: int = 20
    """Fewest tokens an expert was active in."""
    eval_frac: float = 0.5
    """Part of the documents that perplexities are measured on; experts are chosen on the rest."""
    random_draws: int = 3
    """Draws of random experts of equal routing weight beside each mask."""
    permutations: int = 99
    """Of the domains of the documents: how many experts chance assigns."""
    n_boot: int = 1000
    """Resamples of the documents behind the intervals."""
    device: str = "cpu"
    """As torch names it."""
    out: str | None = None
    """Folder of the result."""
    seed: int = 0
    """Of the split, the permutations, the random experts and the resamples."""
    overwrite: bool = False
    """Replace what this command wrote there before."""

    def __post_init__(self) -> None:
        if not 0 < self.eval_frac < 1:
            raise UserError(f"Expected --eval-frac between 0 and 1, got {self.eval_frac}.")
        for name, least, most in BOUNDS:
            flag, value = name.replace("_", "-"), getattr(self, name)
            if value < least:
                raise UserError(f"Expected --{flag} of at least {least}, got {value}.")
            if value > most:
                raise UserError(f"Expected --{flag} of at most {most:,}, got {value:,}.")


def build_parser() -> CommandParser:
    """The parser of this command."""
    parser = CommandParser(
        "monet",
        "Assign the experts of a Monet model to domains of text, save a mask for each domain, and "
        "measure what deleting its experts does to the perplexity of every domain, beside random "
        "experts of equal routing weight.",
        EXAMPLE,
    )
    parser.add_options(MonetOptions)
    return parser


def main(argv: Sequence[str]) -> int:
    options = build_parser().parse(argv)

    def work(_stop: StopSignal) -> tuple[Any, str]:
        from . import monet_plan, monet_run
        from .finished import carry_out

        chosen = take(MonetOptions, options)
        plan = monet_plan.make_plan(chosen)
        return carry_out(
            monet_run, plan, dry_run=options.dry_run, overwrite=chosen.overwrite
        )

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)
