"""``sae-apps separability``: how far apart the units of a model are under different concepts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_core.errors import UserError

from .common import PROG, StopSignal, run_command
from .parsing import CommandParser, take

EXAMPLE = f"{PROG} separability --run runs/x --data labelled.jsonl --units latents,residual"
KINDS = ("latents", "residual", "neurons")


@dataclass(frozen=True)
class SeparabilityOptions:
    """What is measured, and where it goes."""

    run: str | None = None
    """Folder of a finished run: the SAE and its model."""
    units: str = "latents"
    """latents of the SAE, residual dimensions, MLP neurons of the same layer, joined by commas."""
    bins: int = 16
    """Bins beside the atom; 64 where there are many thousand tokens of each concept."""
    permutations: int = 20
    """Label permutations behind the debiased score and the p-values."""
    correction: str = "bh"
    """bh (Benjamini-Hochberg) or by (Benjamini-Yekutieli), over the live units."""
    context_size: int = 128
    """Tokens of a chunk of text."""
    out: str | None = None
    """Folder of the result (null: separability-DATA in the run)."""
    model: str | None = None
    """Where the run's model is now, if it has moved."""
    device: str | None = None
    """Where model and SAE run (null: as in training)."""
    seed: int = 0
    """Of the draw of texts, the bins and the permutations."""
    overwrite: bool = False
    """Replace what this command wrote there before."""

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.units.split(",") if kind not in KINDS]
        if wrong:
            raise UserError(f"Expected --units out of {', '.join(KINDS)}, got {wrong[0]!r}.")
        if self.correction not in ("bh", "by"):
            raise UserError(f"Expected --correction bh or by, got {self.correction!r}.")
        if self.permutations < 2 or self.bins < 1:
            raise UserError(
                "Expected at least 2 --permutations and 1 of --bins, got "
                f"{self.permutations} and {self.bins}."
            )


@dataclass(frozen=True)
class ConceptOptions:
    """The labelled texts."""

    data: str | None = None
    """jsonl, json, csv, tsv or parquet file."""
    text: str = "text"
    """Column of the texts."""
    label: str = "label"
    """Column of the concepts."""
    group: str | None = None
    """Column of the document or pair of a text: what is drawn and permuted together."""
    concepts: str | None = None
    """Only these labels, joined by commas (null: all)."""
    n_per_class: int | None = None
    """Texts of each concept (null: as many as the rarest has)."""


def build_parser() -> CommandParser:
    """The parser of this command."""
    parser = CommandParser(
        "separability",
        "Measure how far apart the values of every unit are under different concepts: the "
        "Jensen-Shannon distance, raw as published and with its bias taken off, with p-values, "
        "for SAE latents, residual dimensions and MLP neurons alike.",
        EXAMPLE,
    )
    parser.add_argument(
        "--accept_terms", action="store_true", help="Consent to the terms of a model that has some."
    )
    parser.add_options(SeparabilityOptions)
    parser.add_options(ConceptOptions)
    return parser


def main(argv: Sequence[str]) -> int:
    options = build_parser().parse(argv)

    def work(_stop: StopSignal) -> tuple[Any, str]:
        from . import separability_run
        from .finished import carry_out

        chosen = take(SeparabilityOptions, options)
        concept = take(ConceptOptions, options)
        plan = separability_run.make_plan(chosen, concept, accept_terms=options.accept_terms)
        return carry_out(
            separability_run, plan,
            dry_run=options.dry_run, overwrite=chosen.overwrite, quiet=options.quiet,
        )  # fmt: skip

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)
