"""Line charts as inline SVG: pure functions from numbers to markup, coloured by the page's CSS."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sae_apps.report.formats import clean, finite, number, short
from sae_core.errors import UserError

WIDTH, HEIGHT = 300.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 10.0, 20.0, 36.0
N_MARKS = 24


@dataclass(frozen=True)
class Series:
    """One line. A point with a value that cannot be drawn (NaN, or <= 0 on a log axis) is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise UserError(
                f"Series {self.name!r}: expected as many y as x, "
                f"got {len(self.x)} x and {len(self.y)} y."
            )


@dataclass(frozen=True)
class Scale:
    """v -> a + (b - a) (v - lo) / (hi - lo), on logarithms where ``is_log``."""

    lo: float
    hi: float
    a: float
    b: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        lo, hi = self.lo, self.hi
        if self.is_log:
            value, lo, hi = math.log10(value), math.log10(lo), math.log10(hi)
        return self.a + (self.b - self.a) * (value - lo) / (hi - lo)

    def ticks(self) -> list[float]:
        return log_ticks(self.lo, self.hi) if self.is_log else nice_ticks(self.lo, self.hi)


def nice_ticks(lo: float, hi: float, n: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [lo, hi], about ``n`` of them."""
    raw = (hi - lo) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(lo / step - 1e-9)
    last = math.floor(hi / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(lo: float, hi: float, n: int = 6) -> list[float]:
    """Powers of ten in [lo, hi], thinned to ``n``; with 2 and 5 between them in a short range."""
    first = math.ceil(math.log10(lo) - 1e-9)
    last = math.floor(math.log10(hi) + 1e-9)
    if last - first >= 2:
        return [10.0**i for i in range(first, last + 1, math.ceil((last - first + 1) / n))]
    values = [m * 10.0**i for i in range(first - 1, last + 1) for m in (1, 2, 5)]
    inside = [v for v in values if lo * (1 - 1e-9) <= v <= hi * (1 + 1e-9)]
    return inside if len(inside) >= 2 else [lo, hi]


def domain(
    values: Iterable[float | None], is_log: bool = False, floor: float | None = None
) -> tuple[float, float]:
    """[lo, hi] of the values that can be drawn, down to ``floor`` where given; never empty.

    Values that all lie on the floor get the axis from there to twice it, from 0 to 1.
    """
    usable = [v for v in map(finite, values) if v is not None and (v > 0 or not is_log)]
    if floor is not None and usable:
        usable.append(floor)
    if not usable:
        return (1.0, 10.0) if is_log else (0.0, 1.0)
    lo, hi = min(usable), max(usable)
    if hi > lo:
        return lo, hi
    if is_log:
        return lo / 2, lo * 2
    if floor is not None:  # nothing lies below it
        return floor, floor + (abs(floor) or 1.0)
    pad = abs(lo) / 2 or 0.5
    return lo - pad, lo + pad


def polylines(series: Series, x: Scale, y: Scale) -> list[list[tuple[float, float]]]:
    """Screen points of the line, cut at its gaps; per x pixel only the lowest and highest stay."""
    runs: list[list[tuple[float, float]]] = [[]]
    for px, py in _screen(series, x, y):
        if px is None or py is None:
            runs.append([])
            continue
        run = runs[-1]
        column = [i for i in range(max(0, len(run) - 2), len(run)) if int(run[i][0]) == int(px)]
        if len(column) == 2:  # a third point: the one in the middle height goes
            trio = [*run[-2:], (px, py)]
            trio.remove(sorted(trio, key=lambda point: point[1])[1])
            run[-2:] = trio
        else:
            run.append((px, py))
    return [run for run in runs if run]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    desc: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    y_floor: float | None = None,
    show_y: Callable[[float], str] = number,
) -> Markup:
    """Lines over common axes, with marks that tell their value to a pointer and to the keyboard.

    Args:
        series: lines, told apart by colour and dash; none at all gives empty axes.
        title: the chart's accessible name; desc: what it shows, in a sentence.
        x_label: axis title with its unit; y_label likewise.
        y_floor: the y axis reaches down to here (0 for fractions).
        show_y: how a mark prints its value.
    """
    x = Scale(*domain((v for s in series for v in s.x), log_x), LEFT, WIDTH - RIGHT, log_x)
    y_domain = domain((v for s in series for v in s.y), log_y, None if log_y else y_floor)
    y = Scale(*y_domain, HEIGHT - BOTTOM, TOP, log_y)
    parts = [axes(x, y, x_label, y_label, HEIGHT)]
    for i, one in enumerate(series):
        for run in polylines(one, x, y):
            path = "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in run)
            parts.append(Markup('<path class="line s{}" d="{}"/>').format(i % 4, path))
    for i, one in enumerate(series):
        name = f"{one.name} " if len(series) > 1 else ""
        parts += _marks(one, i, name, x, y, show_y)
    if not any(polylines(one, x, y) for one in series):
        parts.append(
            Markup('<text class="empty" x="{:.1f}" y="{:.1f}">no values</text>').format(
                (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
            )
        )
    return svg(parts, WIDTH, HEIGHT, title, desc)


def axes(x: Scale, y: Scale, x_label: str, y_label: str, height: float) -> Markup:
    """Grid lines, tick labels and axis titles of two scales."""
    left, right = min(x.a, x.b), max(x.a, x.b)
    base = max(y.a, y.b)
    parts = []
    for tick in y.ticks():
        parts.append(
            Markup(
                '<path class="grid" d="M{:.1f},{:.1f}H{:.1f}"/>'
                '<text class="tick end" x="{:.1f}" y="{:.1f}">{}</text>'
            ).format(left, y(tick), right, left - 5, y(tick) + 3.2, short(tick))
        )
    for tick in x.ticks():
        parts.append(
            Markup(
                '<path class="axis" d="M{:.1f},{:.1f}v4"/>'
                '<text class="tick mid" x="{:.1f}" y="{:.1f}">{}</text>'
            ).format(x(tick), base, x(tick), base + 14, short(tick))
        )
    parts.append(Markup('<path class="axis" d="M{:.1f},{:.1f}H{:.1f}"/>').format(left, base, right))
    parts.append(
        Markup('<text class="label end" x="{:.1f}" y="{:.1f}">{}</text>').format(
            right, height - 5, clean(x_label)
        )
    )
    parts.append(Markup('<text class="label of-y" x="0" y="10">{}</text>').format(clean(y_label)))
    return Markup("").join(parts)


def svg(parts: Iterable[Markup], width: float, height: float, title: str, desc: str) -> Markup:
    """Wrap parts in a drawing that scales with the page and names itself to a screen reader."""
    return Markup(
        '<svg class="chart" viewBox="0 0 {:g} {:g}"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(width, height, clean(title), clean(desc), Markup("").join(parts))


def _screen(series: Series, x: Scale, y: Scale) -> Iterable[tuple[float | None, float | None]]:
    for vx, vy in zip(series.x, series.y, strict=True):
        fx, fy = finite(vx), finite(vy)
        if fx is None or fy is None or (x.is_log and fx <= 0) or (y.is_log and fy <= 0):
            yield None, None
        else:
            yield x(fx), y(fy)


def _marks(
    series: Series, style: int, name: str, x: Scale, y: Scale, show_y: Callable[[float], str]
) -> list[Markup]:
    """About ``N_MARKS`` real points, evenly spread on the screen, each with a band to point at."""
    points = [
        (px, py, vx, vy)
        for (px, py), vx, vy in zip(_screen(series, x, y), series.x, series.y, strict=True)
        if px is not None and py is not None
    ]
    if not points:
        return []
    wanted = [x.a + (x.b - x.a) * i / (N_MARKS - 1) for i in range(N_MARKS)]
    nearest = {min(range(len(points)), key=lambda i: abs(points[i][0] - w)) for w in wanted}
    chosen = [points[i] for i in sorted(nearest)]
    edges = [x.a, *((p[0] + q[0]) / 2 for p, q in zip(chosen, chosen[1:], strict=False)), x.b]
    marks = []
    for i, (px, py, vx, vy) in enumerate(chosen):
        text = f"{clean(name)}{show_y(vy)} at {short(float(f'{vx:.3g}'))}"
        marks.append(
            Markup(
                '<g class="mark s{}" tabindex="0" role="img"><title>{}</title>'
                '<rect class="band" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
                '<circle cx="{:.1f}" cy="{:.1f}" r="3.2"/>'
                '<text class="tip end" x="{:.1f}" y="10">{}</text></g>'
            ).format(
                style % 4,
                text,
                edges[i],
                TOP,
                max(0.0, edges[i + 1] - edges[i]),
                HEIGHT - BOTTOM - TOP,
                px,
                py,
                WIDTH - RIGHT,
                text,
            )
        )
    return marks
