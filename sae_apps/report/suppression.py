"""Suppression of a concept: removal against damage as curves and a table, and continuations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_apps.report.charts import Series, line_chart
from sae_apps.report.formats import number, percent
from sae_apps.report.page import Section, render
from sae_core.errors import UserError

N_LINES = 4  # as many dashes as the charts have


@dataclass(frozen=True)
class RemovalCurve:
    """One method over its strengths."""

    method: str
    """As a reader should see it."""
    erased: Sequence[float]
    """Part of the concept removed, by strength."""
    perplexity: Sequence[float]
    """On neutral text, by strength."""

    def __post_init__(self) -> None:
        if len(self.erased) != len(self.perplexity):
            raise UserError(
                f"{self.method}: expected as many perplexities as parts removed, got "
                f"{len(self.perplexity)} and {len(self.erased)}."
            )


@dataclass(frozen=True)
class SuppressionView:
    """What the section shows."""

    concept: str
    """What is suppressed."""
    curves: Sequence[RemovalCurve] = ()
    """The method itself first; the next three of the table are drawn as well."""
    matched: Sequence[Mapping[str, Any]] = ()
    """Records of ``curves.Matched``: method, at, strength, reason, values with _low and _high."""
    continuations: Sequence[Mapping[str, str]] = ()
    """prompt, plain and suppressed, covered where they should be."""
    is_covered: bool = True
    """Whether words of the concept are covered in them."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Name and sentence."""


def suppression_section(view: SuppressionView) -> Section:
    """Curves of up to four methods, all methods at equal removal, and continuations."""
    drawn = _drawn(view)
    chart = None
    if drawn:
        chart = line_chart(
            [Series(one.method, one.erased, one.perplexity) for one in drawn],
            title=f"Perplexity against the part of {view.concept} removed",
            desc=_course(drawn),
            x_label="part removed, by a fixed probe",
            y_label="perplexity on neutral text",
            show_y=lambda value: number(value, 2),
        )
    left = len(view.curves) - len(drawn)
    note = (
        "Each mark is a strength; a line that runs far to the right before it rises removes much "
        f"at little cost.{f' {left} more methods are in the table.' if left else ''}"
    )
    html = render(
        "suppression.html.j2",
        concept=view.concept,
        chart=chart,
        drawn=[one.method for one in drawn],
        note=note,
        rows=[_row(one) for one in view.matched],
        continuations=view.continuations,
        is_covered=view.is_covered,
        facts=view.facts,
    )
    return Section("suppression", "Suppression", html)


def _drawn(view: SuppressionView) -> list[RemovalCurve]:
    """The first curve, then those that cost least where they have removed most."""

    def cost(one: RemovalCurve) -> tuple[bool, float]:
        rows = [row for row in view.matched if row["method"] == one.method]
        reached = [row for row in rows if row["strength"] is not None]
        return (not reached, reached[-1]["perplexity_increase"] if reached else 0.0)

    usable = [one for one in view.curves if len(one.erased) > 2]
    return usable[:1] + sorted(usable[1:], key=cost)[: N_LINES - 1]


def _course(drawn: Sequence[RemovalCurve]) -> str:
    ends = (
        f"{one.method} removes up to {percent(max(one.erased))} at perplexity "
        f"{number(one.perplexity[-1], 1)}"
        for one in drawn
    )
    return f"Without any edit perplexity is {number(drawn[0].perplexity[0], 1)}; {'; '.join(ends)}."


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    flat = {"method": row["method"], "at": percent(row["at"], 2), "reason": row["reason"]}
    if row["strength"] is None:
        return flat
    low, high = row.get("perplexity_increase_low"), row.get("perplexity_increase_high")
    return flat | {
        "strength": number(row["strength"], 2),
        "increase": f"{row['perplexity_increase']:+.2f}",
        "interval": "\u2013" if low is None else f"{low:+.2f} to {high:+.2f}",
        "kl": number(row["kl"], 3),
        "left": percent(1 - row["erased_refitted"]),
    }
