"""Cells of the suppression suite: a method on a concept, fitted and measured."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from benchmarks.suppression_goals import APPS, LEVELS
from sae_apps.suppression.concepts import LabelledTexts
from sae_apps.suppression.curves import Curve, interval
from sae_apps.suppression.evaluate import EvaluationConfig, Reader, erasure, evaluate
from sae_apps.suppression.plain_texts import ReadConfig
from sae_apps.suppression.trial import Trial, make_trial
from sae_apps.tasks.text import open_text
from sae_core.errors import UserError
from sae_core.models import LanguageModel

HOOK = "layers.15.out"
CONCEPTS = {
    "paradetox": "toxic",
    "hate_offensive": "hate",
    "goemotions": "anger",
    "reviews": "negative",
    "languages": "fra",
    "novels": "fra",
}
TOLD = "instruction"
GRID = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
MOST = GRID[-1]
MAX_TEXTS = 1000  # of all labels together: goemotions has eight
_HALVINGS = 5
_KEPT_DRAWS = 400  # of the perplexity increase, the same passages for all methods of a seed
OF_CURVE = (
    "erased_fixed", "erased_refitted", "perplexity", "perplexity_increase", "kl", "gap_change",
    "others_lost",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    n_per_class: int
    """Texts of each label at most, of which 40% are for testing."""
    n_neutral: int
    """Wikipedia passages, of which half are background."""
    context_size: int
    """Tokens of a text at most."""
    n_units: int = 64
    """Units that are edited."""
    n_draws: int = 1000
    """Resamples of the documents."""
    n_pairs: int | None = None
    """Pairs whose likelihood is read; None: all."""


SIZES = {
    "reduced": Size(100, 60, 48),
    "cpu": Size(250, 96, 48, n_pairs=40),
    "full": Size(1000, 400, 128),
}


class Cell(NamedTuple):
    """One method on one concept."""

    concept: str
    """Name of the data set."""
    units: str
    method: str
    seed: int


def wikipedia(n: int) -> list[str]:
    """Passages of the demo's text, Wikipedia only."""
    found = []
    for row in open_text("demo"):
        if "wikipedia" in str(row.meta.get("domain", "")).lower():
            found.append(row.text)
            if len(found) == n:
                return found
    raise UserError(f"Expected {n} Wikipedia passages in the demo's text, got {len(found)}.")


def parts(name: str, size: Size, seed: int) -> tuple[LabelledTexts, LabelledTexts]:
    """Balanced texts of a data set: for fitting and for judging, no document in both."""
    from benchmarks.concept_data import load

    data = load(name)
    n = min(size.n_per_class, MAX_TEXTS // len(data.classes), min(data.counts.values()))
    return data.balanced(n, seed).split(0.4, seed)


def least_strength(
    reader: Reader, edit: Any, trial: Trial, level: float, reached: dict[float, float]
) -> float | None:
    """The least strength that erases so much: first on the grid, then between two of its points.

    Args:
        reached: strength -> erasure of this edit, known ones; those of the search are added.
    """

    def erased(strength: float) -> float:
        if strength not in reached:
            reached[strength] = float(erasure(reader, edit, trial, [strength])[0])
        return reached[strength]

    below = 0.0
    for above in GRID:
        if erased(above) >= level:
            break
        below = above
    else:
        return None
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        below, above = (below, middle) if erased(middle) >= level else (middle, above)
    return above


class Bench:
    """Model, SAEs and passages, opened once; texts and fits of a concept and seed kept."""

    def __init__(self, lm: LanguageModel, size: Size, saes: dict[str, Any]) -> None:
        self.lm, self.size, self.saes = lm, size, saes
        self.passages = wikipedia(size.n_neutral)
        self._about: tuple[Any, ...] = ()
        self._kept: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, from the second time on without making it."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def open(self, cell: Cell) -> tuple[Trial, Reader]:
        """The trial of a concept and seed, and its texts as the plain model reads them."""
        if self._about != (cell.concept, cell.seed):
            self._about, self._kept = (cell.concept, cell.seed), {}
            train, test = parts(cell.concept, self.size, cell.seed)
            half = len(self.passages) // 2
            self._kept["train"] = train
            trial = make_trial(train, test, CONCEPTS[cell.concept], self.passages[half:])
            self._kept["trial"] = replace(trial, pairs=trial.pairs[: self.size.n_pairs])
            self._kept["reader"] = Reader(self.lm, HOOK, ReadConfig(self.size.context_size))
        return self._kept["trial"], self._kept["reader"]

    def fit(self, cell: Cell) -> Any:
        """The edit of a cell."""
        from sae_apps.suppression.gated import fit_gated
        from sae_apps.suppression.lineup import fit_rivals, instruction
        from sae_apps.suppression.units import open_units

        if cell.method == TOLD:
            return instruction(CONCEPTS[cell.concept])
        if cell.method in ("app", "app_joint"):
            app = self.app(cell.units, cell.seed)
            return replace(app, gate="joint" if cell.method == "app_joint" else "unit")
        sae = self.saes.get(cell.units)
        units = open_units(self.lm, sae, HOOK, "residual" if sae is None else "latents")
        sample, background = self.once("tokens", self.tokens)
        name = "direction" if cell.method == "app_direction" else cell.method
        n = self.size.n_units
        made = fit_rivals(units, sample, n_units=n, seed=cell.seed, names=[name])[name]
        if cell.method == "app_direction":
            return fit_gated(made, sample.x, sample.is_concept, background)
        return made

    def tokens(self) -> tuple[Any, np.ndarray]:
        """Labelled tokens of the texts for fitting, and tokens of the background."""
        from sae_apps.suppression.lineup import background_tokens, token_sample

        train, n = self._kept["trial"].train, self.size.context_size
        mine = token_sample(self.lm, HOOK, train.texts, train.is_concept, context_size=n)
        passages = self.passages[: len(self.passages) // 2]
        return mine, background_tokens(self.lm, HOOK, passages, context_size=n)

    def app(self, kind: str, seed: int) -> Any:
        """APP on the latents of one SAE, with held-out texts for the joint gate."""
        from sae_apps.suppression.fit import FitConfig, fit_app
        from sae_core.activations import HarvestConfig

        train, half = self._kept["train"], len(self.passages) // 2
        harvest = HarvestConfig(context_size=self.size.context_size)
        config = FitConfig(n_units=self.size.n_units, seed=seed, harvest=harvest)
        concept = CONCEPTS[self._about[0]]
        return self.once(
            f"app {kind}",
            lambda: fit_app(
                self.lm, self.saes[kind], train.texts, train.labels, concept, self.passages[:half],
                groups=train.group, hook_point=HOOK, config=config,
            ),
        )  # fmt: skip

    def run(self, cell: Cell) -> list[dict[str, Any]]:
        """Rows of one cell: at each level of erasure, and at strength 1."""
        trial, reader = self.open(cell)
        edit = self.fit(cell)
        reached: dict[float, float] = {}
        is_shown = cell.method in (*APPS, TOLD)
        found: dict[str, float | None] = {"strength 1": 1.0} if is_shown else {}
        if cell.method != TOLD:
            for at in LEVELS:
                found[f"{at:.0%}"] = least_strength(reader, edit, trial, at, reached)
        # a method that reaches no level has its plain values measured beside strength 1
        reached_at = {one for one in found.values() if one is not None} or {1.0}
        strengths = sorted({0.0} | reached_at)
        config = EvaluationConfig(tuple(strengths), HOOK, self.size.n_draws, cell.seed)
        curve = evaluate(self.lm, edit, trial, config, method=cell.method, reader=reader)
        if cell.method == TOLD:  # it has one strength: a level is reached by it or is not
            erased = float(curve.columns["erased_fixed"][1])
            reached[1.0] = erased
            found |= {f"{at:.0%}": 1.0 if erased >= at else None for at in LEVELS}
        return [cell_row(cell, curve, at, strength, reached) for at, strength in found.items()]


def cell_row(
    cell: Cell, curve: Curve, at: str, strength: float | None, reached: dict[float, float]
) -> dict[str, Any]:
    """One flat record: the columns of the curve at a strength, with intervals."""
    row: dict[str, Any] = {
        "name": f"{cell.concept} {cell.units} {cell.method} seed {cell.seed} at {at}",
        "concept": cell.concept, "units": cell.units, "method": cell.method, "seed": cell.seed,
        "at": at, "strength": strength, "n_test": curve.how["n_test"],
        "n_neutral": curve.how["n_neutral"],
        "plain_perplexity": float(curve.columns["perplexity"][0]),
        "plain_accuracy": float(curve.columns["accuracy_fixed"][0]), "reason": "", "draws": [],
    }  # fmt: skip
    for name in OF_CURVE:
        row |= dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    if strength is None:
        most = max(reached, key=reached.__getitem__)
        row["reason"] = f"erases at most {reached[most]:.1%}, at strength {most:g} of {MOST:g}"
        return row
    place = int(np.flatnonzero(curve.strength == strength)[0])
    drawn = curve.draws["perplexity_increase"][:_KEPT_DRAWS, place]
    row["draws"] = [round(float(one), 5) for one in drawn]
    for name in OF_CURVE:
        if name in curve.columns:
            low, high = interval(curve.draws[name])[:, place]
            row |= {name: float(curve.columns[name][place])}
            row |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return row
