"""Rows picked from a pool for their likeness to targets: scores, first picks, and their reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from sae_apps.report.charts import Series, line_chart
from sae_apps.report.distribution import histogram
from sae_apps.report.formats import DASH, clean, finite, number, percent
from sae_apps.report.overview import Fact
from sae_apps.report.page import Section, render
from sae_apps.report.parts import fixed, latent_name
from sae_core.errors import UserError

N_PICKS, N_EXAMPLES = 10, 5
CHARS = 360  # of a pick or an example; enough to judge likeness, and ten fit on two screens
N_OPEN = 3
N_NAMED = 6  # targets in the line of facts
GOOD_RECALL = 0.95
MANY_EMPTY = 0.01  # share of the pool
FEW_EXAMPLES = 3
CHECKS = {
    "without_text": ("Without text", "Records that were never scored."),
    "empty": ("No active latent", "Rows that the SAE is silent on; their score is 0."),
    "exact_duplicates": ("Exact duplicates", "Left out: their text occurred before."),
    "near_duplicates": ("Near duplicates", "Left out: nearly their text occurred before."),
    "contaminated": ("In the evaluation set", "Left out: they share text with it."),
}


@dataclass(frozen=True)
class SelectionReason:
    """A latent that makes a row similar to the target."""

    latent: int
    share: float
    """Part of the row's score, in [0, 1]."""
    tokens: Sequence[str] = ()
    """On which the latent fires most."""


@dataclass(frozen=True)
class SelectedRow:
    """One pick."""

    row_id: int | str
    score: float
    text: str
    """Whole or cut; the section shows its first characters."""
    reasons: Sequence[SelectionReason] = ()
    """Largest share first; none for a metric that does not decompose."""
    n_tokens: int | None = None


@dataclass(frozen=True)
class SelectionTarget:
    """What was asked for under one name, and what came."""

    name: str
    n_examples: int
    """Rows that describe the target."""
    examples: Sequence[str]
    """A few of their texts."""
    picks: Sequence[SelectedRow]
    """In the order of picking; the section shows the first ``N_PICKS``."""
    n_picked: int
    """All of them."""
    pool_scores: Sequence[float] = ()
    """Scores of the rows of the pool."""
    pick_scores: Sequence[float] = ()
    """Scores of all picks."""
    warnings: Sequence[str] = ()
    """Sentences about this target."""

    def __post_init__(self) -> None:
        if self.n_picked < len(self.picks) or self.n_examples < len(self.examples):
            raise UserError(
                f"Target {self.name!r}: expected at most {self.n_picked} picks and "
                f"{self.n_examples} examples, got {len(self.picks)} and {len(self.examples)}."
            )


@dataclass(frozen=True)
class SelectionView:
    """What the section shows."""

    targets: Sequence[SelectionTarget]
    n_pool: int
    """Rows of the pool."""
    budget: str
    """As a reader should see it: "5% of the rows"."""
    method: str
    """How rows are scored and picked, a phrase."""
    is_exact: bool = True
    """Every row was scored; False: an index proposed the rows."""
    recall: float | None = None
    """Of the index, against exact scores; None where nobody measured it."""
    counts: Mapping[str, int | None] = field(default_factory=dict)
    """As ``SelectionResult.counts``; a check that was not made is absent or None."""
    warnings: Sequence[str] = ()
    """Sentences about the whole selection."""
    anchors: Mapping[int, str] = field(default_factory=dict)
    """Latent -> id of its card on this page."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Name and sentence."""


def selection_section(view: SelectionView) -> Section:
    """What was asked, what was left out, and for each target scores, first picks and reasons.

    Args:
        view: plain values; each target is a fold of its own, the first one open.
    """
    html = render(
        "selection.html.j2",
        targets=[_target(one, view) for one in view.targets],
        asked=_asked(view),
        left_out=[_check(view, name, *words) for name, words in CHECKS.items()],
        warnings=[*_search_warnings(view), *view.warnings],
        facts=view.facts,
    )
    return Section("selection", "Selection", html)


def _asked(view: SelectionView) -> list[Fact]:
    n = sum(one.n_picked for one in view.targets)
    named = ", ".join(f"{one.name} ({number(one.n_examples)})" for one in view.targets[:N_NAMED])
    if (more := len(view.targets) - N_NAMED) > 0:
        named += f" and {number(more)} more"
    search = "Every row of the pool was scored."
    if not view.is_exact:
        search = f"An index proposed the rows. It finds {percent(view.recall)} of the exact best."
    return [
        Fact("Targets, with their examples", named or DASH, "What the picks should be like."),
        Fact("Pool", f"{number(view.n_pool)} rows", "What they were picked from."),
        Fact("Budget", view.budget or DASH, f"{number(n)} rows were picked."),
        Fact("Method", view.method or DASH, search),
    ]


def _check(view: SelectionView, name: str, term: str, note: str) -> Fact:
    value = view.counts.get(name)
    return Fact(term, "not checked") if value is None else Fact(term, number(int(value)), note)


def _search_warnings(view: SelectionView) -> list[str]:
    found = []
    recall = finite(view.recall)
    if not view.is_exact and recall is None:
        found.append("How many of the best rows the index misses was not measured.")
    elif not view.is_exact and recall is not None and recall < GOOD_RECALL:
        found.append(f"The index finds only {percent(recall)} of the exact best rows.")
    n_empty = view.counts.get("empty") or 0
    if view.n_pool and n_empty > MANY_EMPTY * view.n_pool:
        found.append(
            f"{percent(n_empty / view.n_pool)} of the pool have no active latent and could not be "
            "compared."
        )
    return found


def _target(target: SelectionTarget, view: SelectionView) -> dict[str, Any]:
    shown = list(target.picks)[:N_PICKS]
    shares = [finite(one.share) or 0.0 for pick in shown for one in pick.reasons]
    top = max(shares, default=0.0)
    picks = [_pick(rank, one, view, top) for rank, one in enumerate(shown, 1)]
    lines = histogram({"pool": target.pool_scores, "picks": target.pick_scores})
    course = _course(target)
    return {
        "name": target.name,
        "n_examples": target.n_examples,
        "examples": [cut(one) for one in list(target.examples)[:N_EXAMPLES]],
        "n_picked": target.n_picked,
        "open": picks[:N_OPEN],
        "folded": picks[N_OPEN:],
        "course": course,
        "drawn": [one.name for one in lines],
        "chart": _chart(target, lines, course) if lines else None,
        "warnings": [*_target_warnings(target), *target.warnings],
    }


def _chart(target: SelectionTarget, lines: Sequence[Series], course: str) -> Markup:
    return line_chart(
        lines,
        title=f"Scores of the pool and of the picks for {target.name}",
        desc=course,
        x_label="score",
        y_label="share of the rows",
        y_floor=0.0,
        show_y=percent,
    )


def _course(target: SelectionTarget) -> str:
    """The scores in a sentence; empty where there are none."""
    pool, picks = (_scores(one) for one in (target.pool_scores, target.pick_scores))
    parts = []
    if len(picks):
        lo, mid, hi = (fixed(np.quantile(picks, q)) for q in (0, 0.5, 1))
        parts.append(f"The picks score {lo} to {hi}, their median is {mid}.")
    if len(pool):
        parts.append(f"The median of the pool is {fixed(np.median(pool))}.")
    if len(picks) and len(pool):
        below = float((pool < picks.min()).mean())
        parts.append(f"The lowest pick is above {percent(below)} of the pool.")
    return " ".join(parts)


def _scores(values: Sequence[float]) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    return found[np.isfinite(found)]


def _target_warnings(target: SelectionTarget) -> list[str]:
    found = []
    if len(picks := _scores(target.pick_scores)) and not picks.min() > 0:
        found.append(f"{number(int((picks <= 0).sum()))} picks share nothing with the examples.")
    if target.n_examples < FEW_EXAMPLES:
        found.append(
            f"{number(target.n_examples)} example{'s' * (target.n_examples != 1)} describe this "
            "target: what is peculiar to them weighs as much as what they stand for."
        )
    return found


def _pick(rank: int, pick: SelectedRow, view: SelectionView, top: float) -> dict[str, Any]:
    shares = [finite(one.share) for one in pick.reasons]
    known = [share for share in shares if share is not None]
    return {
        "rank": rank,
        "row_id": pick.row_id,
        "score": fixed(pick.score),
        "n_tokens": pick.n_tokens,
        "text": cut(pick.text),
        "rest": max(0.0, 1 - sum(known)) if len(known) == len(shares) else None,
        "reasons": [
            {
                "latent": latent_name(one.latent, view.anchors, one.tokens),
                "share": share,
                "width": min(1.0, max(0.0, (share or 0.0) / top)) if top > 0 else 0.0,
            }
            for one, share in zip(pick.reasons, shares, strict=True)
        ],
    }


def cut(text: str) -> str:
    """The first ``CHARS`` characters, with an ellipsis where something is left out."""
    text = clean(text).strip()
    return text if len(text) <= CHARS else text[:CHARS].rstrip() + "…"
