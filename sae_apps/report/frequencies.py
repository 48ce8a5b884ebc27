"""Requested against achieved firing frequency of each group: you ask for a rate, you get it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sae_apps.report.charts import Scale, axes, svg
from sae_apps.report.formats import finite, percent, required
from sae_apps.report.page import Section, render

SLACK = 1.1  # a latent counts as above its ceiling beyond this multiple, as in GroupFrequency
WIDTH, HEIGHT = 460.0, 330.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 16.0, 26.0, 38.0


@dataclass(frozen=True)
class _Group:
    """GroupFrequency with plain, checked numbers; None where a frequency is undefined."""

    group: int
    taf: float | None
    n_latents: int
    mean: float | None
    median: float | None
    max: float | None
    n_above: int
    n_dead: int

    @property
    def is_above(self) -> bool:
        return self.n_above > 0


def frequencies_section(groups: Sequence[Any], *, n_tokens: int | None = None) -> Section:
    """A chart on log axes (ceiling, median to maximum, mean) and a table, one row per group.

    Args:
        groups: GroupFrequency or mappings with group, taf, mean_freq, median_freq, max_freq
            [fractions of tokens], n_latents, n_above (freq > 1.1 taf) and n_dead.
        n_tokens: tokens on which the frequencies were measured, told to the reader.
    Raises:
        UserError: a group lacks one of these fields.
    """
    rows = [_read(group) for group in groups]
    total = sum(row.n_latents for row in rows)
    above, dead = sum(row.n_above for row in rows), sum(row.n_dead for row in rows)
    html = render(
        "frequencies.html.j2",
        rows=rows,
        chart=frequency_chart(rows),
        total=total,
        above=above,
        dead=dead,
        above_share=above / total if total else None,
        dead_share=dead / total if total else None,
        slack=SLACK,
        n_tokens=n_tokens,
    )
    return Section("frequencies", "Firing frequencies", html)


def frequency_chart(rows: Sequence[_Group]) -> Markup:
    """x: the ceiling that was asked for; y: the frequency that came; the diagonal is the ceiling.

    A median of 0 cannot stand on a log axis: its bar runs down to the floor of the chart.
    """
    x, y = _scales(rows)
    parts = [axes(x, y, "requested ceiling", "achieved frequency (share of tokens)", HEIGHT)]
    lo, hi = max(x.lo, y.lo), min(x.hi, y.hi)
    if lo < hi:
        parts.append(
            Markup('<path class="ceiling-line" d="M{:.1f},{:.1f}L{:.1f},{:.1f}"/>').format(
                x(lo), y(lo), x(hi), y(hi)
            )
        )
    parts += [_group_mark(row, x, y) for row in rows if row.taf is not None and row.taf > 0]
    desc = (
        "For each group of latents: a tick at its ceiling, a bar from the median to the largest "
        "frequency in the group, a dot at the mean. Bars should end at or below the tick."
    )
    return svg(parts, WIDTH, HEIGHT, "Requested against achieved firing frequency", desc)


def _scales(rows: Sequence[_Group]) -> tuple[Scale, Scale]:
    """Log scales with room around the outermost values; y spans a factor of 30 at least."""
    ceilings = [row.taf for row in rows if row.taf is not None and row.taf > 0]
    lo, hi = (min(ceilings), max(ceilings)) if ceilings else (0.001, 0.1)
    pad = max(1.3, (hi / lo) ** 0.06)
    x = Scale(lo / pad, hi * pad, LEFT, WIDTH - RIGHT, True)
    values = [v for row in rows for v in (row.mean, row.median, row.max) if v is not None and v > 0]
    bottom = max(min([lo, *values]), 1e-3 * lo) / 1.6
    top = max([hi, *values]) * 1.6
    return x, Scale(min(bottom, top / 30), top, HEIGHT - BOTTOM, TOP, True)


def _group_mark(row: _Group, x: Scale, y: Scale) -> Markup:
    assert row.taf is not None
    px, ceiling = x(row.taf), y(row.taf)

    def place(value: float | None) -> float | None:
        return None if value is None else y(min(max(value, y.lo), y.hi))

    low, high, mean = place(row.median), place(row.max), place(row.mean)
    parts = []
    if low is not None and high is not None and row.max:
        parts.append(
            Markup('<path class="range" d="M{:.1f},{:.1f}V{:.1f}"/>').format(px, low, high)
        )
    parts.append(Markup('<path class="ceiling" d="M{:.1f},{:.1f}h18"/>').format(px - 9, ceiling))
    if mean is not None and row.mean:
        parts.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3"/>').format(px, mean))
    tip = (
        f"Group {row.group}: asked at most {percent(row.taf)}; median {percent(row.median)}, "
        f"largest {percent(row.max)}"
    )
    return Markup(
        '<g class="mark group{}" tabindex="0" role="img"><title>{}</title>'
        '<rect class="band" x="{:.1f}" y="{:.1f}" width="20" height="{:.1f}"/>{}'
        '<text class="tip end" x="{:.1f}" y="10">{}</text></g>'
    ).format(
        Markup(" above") if row.is_above else Markup(""), tip, px - 10, TOP,
        HEIGHT - BOTTOM - TOP, Markup("").join(parts), WIDTH - RIGHT, tip,
    )  # fmt: skip


def _read(group: Any) -> _Group:
    return _Group(
        group=int(required(group, "group")),
        taf=finite(required(group, "taf")),
        n_latents=int(required(group, "n_latents")),
        mean=finite(required(group, "mean_freq")),
        median=finite(required(group, "median_freq")),
        max=finite(required(group, "max_freq")),
        n_above=int(required(group, "n_above")),
        n_dead=int(required(group, "n_dead")),
    )
