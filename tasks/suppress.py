"""``sae-apps suppress``: suppress a concept, and measure what that removes and costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sae_core.errors import UserError

from .common import PROG, StopSignal, run_command
from .parsing import CommandParser, take
from .separability import ConceptOptions

EXAMPLE = f"{PROG} suppress --run runs/x --data labelled.jsonl --concept toxic --out runs/x/toxic"


@dataclass(frozen=True)
class SuppressOptions:
    """What is suppressed, and where it goes."""

    run: str | None = None
    """Folder of a finished run: the SAE and its model."""
    concept: str | None = None
    """The label to suppress."""
    units: Literal["latents", "residual", "neurons"] = "latents"
    """latents of the SAE, dimensions of the residual stream, or MLP neurons of the layer."""
    n_units: int = 64
    """Units at most."""
    mode: Literal["excess", "posterior"] = "excess"
    """excess: above the prior; posterior: as published."""
    gate: Literal["unit", "joint"] = "unit"
    """unit: every unit by its own posterior, as published; joint: one posterior for a token."""
    strength: float = 1.0
    """Of the generations."""
    neutral: str | None = None
    """Text file without the concept: the background of the fit and, held out, the text of
    perplexity and KL (null: the texts with other labels)."""
    prompts: str | None = None
    """Text file of prompts that are continued with and without the suppression."""
    show_texts: bool = False
    """Show them in the report as they are; else words of the concept are covered there."""
    out: str | None = None
    """Folder of the result (null: suppress-CONCEPT in the run)."""
    model: str | None = None
    """Where the run's model is now, if it has moved."""
    seed: int = 0
    """Of the split, the fit and the resamples."""
    overwrite: bool = False
    """Replace what this command wrote there before."""

    def __post_init__(self) -> None:
        if self.n_units < 1:
            raise UserError(f"Expected --n-units of at least 1, got {self.n_units}.")
        if self.strength < 0:
            raise UserError(f"Expected --strength of at least 0, got {self.strength}.")


@dataclass(frozen=True)
class JudgeOptions:
    """How it is measured."""

    evaluate: bool = False
    """Measure removal and damage over strengths, for this method and its rivals."""
    strengths: str = "0,0.5,1,2,3"
    """Ascending from 0, joined by commas."""
    test_frac: float = 0.3
    """Documents that are held out from the fit."""
    n_draws: int = 1000
    """Resamples of the documents behind the intervals."""
    new_tokens: int = 40
    """Tokens of each continuation."""
    context_size: int = 128
    """Tokens of a text at most."""


def build_parser() -> CommandParser:
    """The parser of this command."""
    parser = CommandParser(
        "suppress",
        "Fit the suppression of a concept from labelled texts. With --evaluate, measure on "
        "held-out documents how much of the concept it removes and what that costs, over "
        "strengths, beside a direction gated by the posterior, masking, range suppression, AurA, "
        "directions, LEACE (where concept-erasure is installed), random units of equal norm and "
        "an instruction.",
        EXAMPLE,
    )
    parser.add_argument(
        "--accept_terms", action="store_true", help="Consent to the terms of a model that has some."
    )
    parser.add_options(SuppressOptions)
    parser.add_options(ConceptOptions)
    parser.add_options(JudgeOptions)
    return parser


def main(argv: Sequence[str]) -> int:
    options = build_parser().parse(argv)

    def work(_stop: StopSignal) -> tuple[Any, str]:
        from . import suppress_run
        from .finished import carry_out

        chosen, judged = take(SuppressOptions, options), take(JudgeOptions, options)
        plan = suppress_run.make_plan(
            chosen, take(ConceptOptions, options), judged, accept_terms=options.accept_terms
        )
        return carry_out(
            suppress_run, plan, dry_run=options.dry_run, overwrite=chosen.overwrite
        )

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)
