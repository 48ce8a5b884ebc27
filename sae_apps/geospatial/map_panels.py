"""What is drawn into the panels of a map: land, points, legends, the scatter plot.

Only methods of the Axes that come in are used; ``maps`` makes the figures.
"""

from dataclasses import dataclass
from math import floor, log10
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from sae_apps.geospatial import outlines
from sae_apps.geospatial.classes import Scheme, class_breaks, classify
from sae_apps.geospatial.local_result import COLOURS, INSIGNIFICANT, LocalMoran
from sae_apps.geospatial.places import Places

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEA, LAND, COAST, STATE, RIM = "#ffffff", "#eeede8", "#9a9a9a", "#cfcfcf", "#bdbdbd"
INACTIVE, INK, FAINT = "#c6c6c6", "#222222", "#6f6f6f"
COLOUR_MAP = "viridis_r"  # reversed: on light land the largest values are the darkest
TEXT = 7.0  # points
LINE = 0.17  # inches from one line of a legend to the next
GROWTH = 0.7, 0.9  # size of the least point that is not zero, and what the largest has more
INK_SHARE = 0.30  # of the map that all points together would cover, were they not to overlap
POINT_AREA = (1.6, 40.0)  # least and largest area of a point, in square points
MANY_POINTS = 4000  # above, points are drawn as an image inside an SVG
SHORT = {"High-High": "HH", "Low-High": "LH", "Low-Low": "LL", "High-Low": "HL"}


@dataclass(frozen=True)
class Frame:
    """The window of a map."""

    bounds: outlines.Bounds
    """(west, south, east, north) in degrees."""

    @property
    def aspect(self) -> float:
        """Width over height, a degree of longitude shortened as at the middle latitude."""
        west, south, east, north = self.bounds
        shrink = max(float(np.cos(np.deg2rad((south + north) / 2))), 0.05)
        return (east - west) * shrink / (north - south)


@dataclass(frozen=True, eq=False)
class Panel:
    """One drawing with a strip for its legend below."""

    axes: "Axes"
    """Where the map or plot goes."""
    legend: "Axes"
    """The strip, in inches, y downwards."""
    width: float
    """Inches."""
    height: float
    """Inches, without the strip."""


def draw_land(panel: Panel, frame: Frame, detail: outlines.Detail) -> None:
    """Land, coasts, borders and, on maps of a region, the states of the USA; no ticks."""
    west, south, east, north = frame.bounds
    axes = panel.axes
    axes.set(xlim=(west, east), ylim=(south, north), xticks=[], yticks=[], facecolor=SEA)
    for spine in axes.spines.values():
        spine.set(color=RIM, linewidth=0.5)
    rings = outlines.land(frame.bounds, detail)
    for ring in sorted(rings, key=_is_hole):  # inland seas after the land round them
        axes.fill(*ring.T, color=SEA if _is_hole(ring) else LAND, linewidth=0, zorder=0)
    _lines(axes, outlines.outlines(frame.bounds, detail, states=None), COAST)
    if max(east - west, north - south) <= outlines.COARSE_ABOVE:
        _lines(axes, outlines.state_borders(frame.bounds), STATE)


def draw_values(
    panel: Panel,
    frame: Frame,
    places: Places,
    values: Float[np.ndarray, " n"],
    scheme: Scheme,
    n_classes: int,
) -> None:
    """Zeros grey, the rest from light to dark; the legend is a strip of classes."""
    zeros, active = np.flatnonzero(values == 0), np.flatnonzero(values)
    if zeros.size:
        _points(panel, frame, places, zeros, color=INACTIVE, zorder=2)
    if active.size == 0:
        return _strip(panel, np.empty((1, 0)), [], zeros.size)
    order = active[np.argsort(values[active], kind="stable")]
    breaks = class_breaks(values[active], n_classes, scheme)
    if scheme == "continuous":
        shade, top = values[order] - breaks[0], max(breaks[-1] - breaks[0], 1e-300)
        cells = np.linspace(0, top, 128)
    else:
        shade, top = classify(values[order], breaks).astype(float), max(len(breaks) - 2, 1)
        cells = np.arange(len(breaks) - 1.0)
    _points(panel, frame, places, order, c=shade, cmap=COLOUR_MAP, vmin=0, vmax=top, zorder=3)
    return _strip(panel, cells[None, :] / top, [float(b) for b in breaks], zeros.size)


def draw_labels(panel: Panel, frame: Frame, places: Places, local: LocalMoran) -> None:
    """Points in the colours of their labels, the insignificant ones first."""
    label = local.label
    names = [INSIGNIFICANT, *(name for name in COLOURS if name != INSIGNIFICANT)]
    for rank, name in enumerate(names):
        at = np.flatnonzero(label == name)
        if at.size:
            _points(panel, frame, places, at, color=COLOURS[name], zorder=2 + rank, label=name)
    counts = local.counts()[0]
    entries = [(COLOURS[name], f"{name} {counts[name]:,}") for name in COLOURS]
    _swatches(panel, entries)


def draw_scatter(panel: Panel, local: LocalMoran) -> None:
    """z against the lag in the colours of the labels, the line through the origin of slope I."""
    axes, label = panel.axes, local.label
    area = float(np.clip(0.12 * panel.width * panel.height * 72**2 / len(label), 2.0, 16.0))
    for rank, name in enumerate([INSIGNIFICANT, *SHORT]):
        at = label == name
        axes.scatter(
            local.z[at],
            local.lag[at],
            s=area,
            color=COLOURS[name],
            linewidths=0,
            zorder=2 + rank,
            rasterized=len(label) > MANY_POINTS,
        )
    axes.axhline(0, color=RIM, linewidth=0.6, zorder=1)
    axes.axvline(0, color=RIM, linewidth=0.6, zorder=1)
    slope = float(local.z @ local.lag) / max(float(local.z @ local.z), 1e-300)
    ends = np.array([local.z.min(), local.z.max()])
    axes.plot(ends, slope * ends, color=INK, linewidth=1.0, zorder=9)
    axes.set_xlabel("standardised value z", size=TEXT, color=INK, labelpad=2)
    axes.set_ylabel("lag: weighted mean of the neighbours' z", size=TEXT, color=INK, labelpad=2)
    axes.tick_params(labelsize=TEXT - 1, width=0.5, length=2, color=RIM, labelcolor=FAINT)
    for side, spine in axes.spines.items():
        spine.set(color=RIM, linewidth=0.5, visible=side in ("left", "bottom"))
    axes.margins(0.06)
    corners = {"HH": (0.99, 0.99), "LH": (0.01, 0.99), "LL": (0.01, 0.01), "HL": (0.99, 0.01)}
    for quadrant, (name, (x, y)) in zip((1, 2, 3, 4), corners.items(), strict=True):
        text = f"{name} {int((local.q == quadrant).sum()):,}"
        sides: dict[str, Any] = {
            "ha": "right" if x > 0.5 else "left",
            "va": "top" if y > 0.5 else "bottom",
        }
        axes.text(x, y, text, size=TEXT, color=FAINT, transform=axes.transAxes, zorder=10, **sides)


def edge_texts(edges: list[float]) -> list[str]:
    """Edges with the same number of decimals, such that the narrowest class shows two digits.

    Exponents where more than five decimals or digits before the point would be needed.
    """
    widths = [b - a for a, b in zip(edges, edges[1:], strict=False) if b > a]
    decimals = max(0, 1 - floor(log10(min(widths)))) if widths else 2
    if decimals > 5 or max(abs(edge) for edge in edges) >= 1e6:
        return [f"{edge:.2g}" for edge in edges]
    return [f"{edge:,.{decimals}f}" for edge in edges]


def _is_hole(ring: Float[np.ndarray, "m 2"]) -> bool:
    """Whether a closed ring runs against the clock, as those of inland seas do."""
    x, y = ring.astype(np.float64).T
    return float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) > 0


def _lines(axes: "Axes", polylines: outlines.Lines, colour: str) -> None:
    """All lines as one, broken by NaN."""
    if not polylines:
        return
    gap = np.full((1, 2), np.nan, np.float32)
    joined = np.concatenate([part for line in polylines for part in (line, gap)])
    axes.plot(*joined.T, color=colour, linewidth=0.45, zorder=1, solid_joinstyle="round")


def _points(
    panel: Panel,
    frame: Frame,
    places: Places,
    at: Int[np.ndarray, " k"],
    scale: Float[np.ndarray, " k"] | float = 1.0,
    **style: Any,
) -> None:
    """Some places in their order, sized by how many there are on the map, times ``scale``."""
    share = INK_SHARE * panel.width * panel.height * 72**2 / places.n
    area = float(np.clip(share, *POINT_AREA))
    panel.axes.scatter(
        outlines.wrap_lon(places.lon, frame.bounds[0])[at],
        places.lat[at],
        s=area * scale,
        linewidths=0.15 if area > 4 else 0,
        edgecolors="white",
        rasterized=places.n > MANY_POINTS,
        **style,
    )


def _strip(panel: Panel, cells: Float[np.ndarray, "1 k"], edges: list[float], n_zeros: int) -> None:
    """A row of coloured cells with their edges below, and what grey means at its left."""
    legend, left, high = panel.legend, 0.0, 0.13
    if n_zeros:
        _swatch(legend, 0.05, high / 2, INACTIVE, f"0 ({n_zeros:,})")
        left = 0.3 + 0.07 * len(f"0 ({n_zeros:,})")
    if not edges:
        return
    right = min(panel.width - 0.15, left + 4.5)
    legend.imshow(
        cells,
        cmap=COLOUR_MAP,
        vmin=0,
        vmax=1,
        extent=(left, right, high, 0),
        aspect="auto",
        interpolation="nearest",
    )
    legend.set(xlim=(0, panel.width), ylim=(legend.get_ylim()))
    spots = np.linspace(left, right, len(edges))
    for x, text in zip(spots, edge_texts(edges), strict=True):
        legend.text(x, high + 0.04, text, size=TEXT - 1, color=INK, ha="center", va="top")


def _swatches(panel: Panel, entries: list[tuple[str, str]]) -> None:
    """Coloured dots with their texts, in as many rows as the width needs."""
    x, y = 0.0, LINE / 2
    for colour, text in entries:
        wide = 0.22 + 0.062 * len(text)
        if x and x + wide > panel.width:
            x, y = 0.0, y + LINE
        _swatch(panel.legend, x + 0.05, y, colour, text)
        x += wide


def _swatch(legend: "Axes", x: float, y: float, colour: str, text: str) -> None:
    legend.scatter([x], [y], s=22, color=colour, linewidths=0, clip_on=False)
    legend.text(x + 0.09, y, text, size=TEXT, color=INK, ha="left", va="center_baseline")
