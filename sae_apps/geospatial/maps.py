"""Maps of features: values, LISA clusters, and the Moran scatter plot, as PNG or SVG.

Longitude and latitude are drawn as they are, with a degree of longitude shortened by the cosine of
the middle latitude. Colours of clusters are esda's. Figures are matplotlib Figure objects and never
touch pyplot, so nothing stays open and no display is needed; the same input writes the same bytes.
"""

import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sae_apps.geospatial import outlines
from sae_apps.geospatial.classes import Scheme
from sae_apps.geospatial.local_result import LocalMoran
from sae_apps.geospatial.map_panels import (
    Frame,
    Panel,
    draw_labels,
    draw_land,
    draw_scatter,
    draw_values,
)
from sae_apps.geospatial.places import Places
from sae_core.disk import disk_errors, owner_tag, remove_stale, replaced_file
from sae_core.errors import UserError
from sae_core.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#222222", "#6f6f6f"
MAP_AREA, MOST_INCHES = 26.0, 9.0  # square inches of a single map; its longest side
SHEET_AREA, SHEET_HEIGHT = 17.0, 4.8  # square inches of a map on a sheet of three, most inches
SCATTER = (3.6, 3.6)  # inches
TITLE_HEIGHT, LEGEND_HEIGHT, GAP, EDGE = 0.4, 0.42, 0.14, 0.14  # inches
AXIS = 0.45  # inches for the numbers at the left of the scatter plot
WIDE = 1.6  # width over height from which the two maps stand one above the other


@dataclass(frozen=True)
class _Column:
    """Panels one above the other, each with the strip for its legend."""

    sizes: tuple[tuple[float, float], ...]
    """Width and height of each drawing, inches."""
    indent: float = 0.0
    """Room at the left for the numbers of an axis, inches."""

    @property
    def width(self) -> float:
        return self.indent + max(w for w, _ in self.sizes)

    @property
    def height(self) -> float:
        return sum(h + LEGEND_HEIGHT + GAP for _, h in self.sizes)


def value_map(
    values: Float[np.ndarray, " n"],
    places: Places,
    *,
    title: str = "",
    scheme: Scheme = "natural",
    n_classes: int = 6,
    bounds: outlines.Bounds | None = None,
    detail: outlines.Detail = "auto",
) -> "Figure":
    """Points coloured by a value, light to dark viridis; zeros grey below, the largest on top.

    Args:
        values: [n], in the order of the places.
        places: n places.
        title: above the map.
        scheme: classes of the values that are not zero: "natural" breaks, "quantiles", or a
            "continuous" scale of colour.
        n_classes: at most so many classes.
        bounds: (west, south, east, north); None fits the places.
        detail: of the outlines.
    Raises:
        UserError: another number of values than of places, or values that are not finite.
        MissingExtraError: matplotlib is not installed.
    """
    values = _checked(values, places)
    frame = _frame(places, bounds)
    figure, (panel,) = _sheet([_Column((_map_size(frame),))], title, _facts(places))
    draw_land(panel, frame, detail)
    draw_values(panel, frame, places, values, scheme, n_classes)
    return figure


def lisa_map(
    local: LocalMoran,
    places: Places,
    *,
    title: str | None = None,
    bounds: outlines.Bounds | None = None,
    detail: outlines.Detail = "auto",
) -> "Figure":
    """Points coloured by the label of local Moran's I, insignificant ones below.

    Args:
        local: of one feature.
        places: those of the weights, in any order.
        title: above the map; None names the feature and its I.
        bounds, detail: as for ``value_map``.
    Raises:
        UserError: more than one feature, or a place that is missing.
        MissingExtraError: matplotlib is not installed.
    """
    local, places = _one(local), places.take(local.positions(places))
    frame = _frame(places, bounds)
    heading = headline(local) if title is None else title
    figure, (panel,) = _sheet(
        [_Column((_map_size(frame),))], heading, f"{_facts(places)}; {_test(local)}"
    )
    draw_land(panel, frame, detail)
    draw_labels(panel, frame, places, local)
    return figure


def moran_scatter(local: LocalMoran, *, title: str | None = None) -> "Figure":
    """Each place's value against its neighbours' mean, both standardised, with the slope.

    With row-standardised weights and no island the slope of the line is Moran's I.

    Raises:
        UserError: more than one feature.
        MissingExtraError: matplotlib is not installed.
    """
    local = _one(local)
    heading = headline(local) if title is None else title
    figure, (panel,) = _sheet([_Column((SCATTER,), AXIS)], heading, _test(local))
    draw_scatter(panel, local)
    return figure


def feature_map(
    local: LocalMoran,
    places: Places,
    *,
    title: str | None = None,
    scheme: Scheme = "natural",
    n_classes: int = 6,
    bounds: outlines.Bounds | None = None,
    detail: outlines.Detail = "auto",
) -> "Figure":
    """The value map, the LISA map and the scatter plot of one feature on one sheet.

    Side by side, or the maps one above the other where the window is wide. Arguments and errors as
    for ``value_map`` and ``lisa_map``.
    """
    local, places = _one(local), places.take(local.positions(places))
    frame = _frame(places, bounds)
    size = _map_size(frame, SHEET_AREA, SHEET_HEIGHT)
    maps = [_Column((size, size))] if frame.aspect > WIDE else [_Column((size,))] * 2
    columns = [*maps, _Column((SCATTER,), AXIS)]
    heading = headline(local) if title is None else title
    note = f"{_facts(places)}; {_test(local)}"
    figure, (value, lisa, scatter) = _sheet(columns, heading, note)
    for panel in (value, lisa):
        draw_land(panel, frame, detail)
    draw_values(value, frame, places, local.values, scheme, n_classes)
    draw_labels(lisa, frame, places, local)
    draw_scatter(scatter, local)
    return figure


def headline(local: LocalMoran) -> str:
    """Such as "Latent 123, I = 0.61"; names that are no numbers stand as they are."""
    (name,) = local.names
    return f"{f'Latent {name}' if name.isdigit() else name}, I = {local.global_i[0]:.2f}"


def save_figure(figure: "Figure", path: str | os.PathLike[str], dpi: int = 200) -> Path:
    """Write a figure as .png or .svg: whole or not at all, and the same bytes each time.

    Raises:
        UserError: another ending, a full disk, or a folder that may not be written.
    """
    from matplotlib import rc_context

    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise UserError(f"Expected a file that ends in .png or .svg, got {path.name!r}.")
    # Dates and versions would differ from run to run, and ids in an SVG are random without a salt.
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    temp = path.with_name(f".{path.name}.{owner_tag('tmp')}")
    with disk_errors(path), rc_context({"svg.hashsalt": "sae-apps", "svg.fonttype": "path"}):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        with replaced_file(path, temp) as file:
            figure.savefig(file, format=kind, dpi=dpi, metadata=metadata)
    return path


def _one(local: LocalMoran) -> LocalMoran:
    if local.n_features != 1:
        raise UserError(
            f"Expected local Moran's I of one feature, got {local.n_features}: choose one by "
            "feature(name)."
        )
    return local.feature(0)


def _checked(values: Float[np.ndarray, " n"], places: Places) -> Float[np.ndarray, " n"]:
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (places.n,):
        raise UserError(f"Expected {places.n} values, one per place, got the shape {values.shape}.")
    if not np.isfinite(values).all():
        raise UserError(f"Expected finite values, got {values[~np.isfinite(values)][0]}.")
    return values


def _frame(places: Places, bounds: outlines.Bounds | None) -> Frame:
    if bounds is None:
        return Frame(outlines.fit_bounds(places.lon, places.lat))
    return Frame(outlines.check_bounds(bounds))


def _map_size(
    frame: Frame, area: float = MAP_AREA, highest: float = MOST_INCHES
) -> tuple[float, float]:
    """Width and height in inches, of the window's shape."""
    aspect = frame.aspect
    width = min((area * aspect) ** 0.5, MOST_INCHES, highest * aspect)
    return width, width / aspect


def _facts(places: Places) -> str:
    return f"{places.n:,} places. {places.source.rstrip('.')}; {outlines.CREDIT}"


def _test(local: LocalMoran) -> str:
    correction = local.how["correction"]
    adjusted = "" if correction == "none" else f", {correction.upper()} over places"
    return (
        f"{local.n_permutations:,} conditional permutations, {local.how['alternative']}{adjusted}, "
        f"level {local.how['alpha']:g}"
    )


def _sheet(columns: list[_Column], title: str, note: str) -> tuple["Figure", list[Panel]]:
    """A figure of columns of panels, each column centred; title above, note below."""
    Figure = require("matplotlib.figure", "geo").Figure
    width = sum(column.width + GAP for column in columns) - GAP + 2 * EDGE
    body = max(column.height for column in columns)
    lines = textwrap.wrap(note, max(int(width * 19), 20), break_on_hyphens=False)
    top, foot = TITLE_HEIGHT if title else EDGE, EDGE + 0.115 * len(lines)
    height = top + body + foot
    figure = Figure(figsize=(width, height), facecolor="white")
    left, above, below = EDGE / width, 1 - 0.12 / height, 0.07 / height
    figure.text(left, above, title, va="top", size=11, weight="bold", color=INK)
    small: dict[str, Any] = {"size": 6, "color": FAINT, "linespacing": 1.25}
    figure.text(left, below, "\n".join(lines), va="bottom", **small)

    def add(x: float, y: float, w: float, h: float, **options: Any) -> "Axes":
        return figure.add_axes((x / width, y / height, w / width, h / height), **options)

    panels, x = [], EDGE
    for column in columns:
        x += column.indent
        y = height - top - (body - column.height) / 2
        for w, h in column.sizes:
            y -= h + LEGEND_HEIGHT + GAP
            legend = add(x, y + GAP / 2, w, LEGEND_HEIGHT, frameon=False, xticks=[], yticks=[])
            legend.set(xlim=(0, w), ylim=(LEGEND_HEIGHT, 0))
            panels.append(Panel(add(x, y + LEGEND_HEIGHT + GAP, w, h), legend, w, h))
        x += column.width - column.indent + GAP
    return figure, panels
