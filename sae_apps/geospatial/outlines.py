"""Coasts and borders for maps, from packaged files: no tile server, no network.

Natural Earth (public domain) and the US Census Bureau (public domain); ``data/SOURCES.md`` says how
the files were made. Lines live on a strip of longitudes without end: a window [west, west + width]
may cross the antimeridian, and every line is drawn in each copy, shifted by 360 degrees, that the
window shows. Clipping is that of Liang and Barsky (ACM Trans. Graphics 3(1), 1984), for all
segments at once.
"""

import gzip
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from sae_core.errors import UserError

Bounds = tuple[float, float, float, float]
Detail = Literal["auto", "110m", "50m"]
Lines = list[Float[np.ndarray, "m 2"]]

WORLD: Bounds = (-180.0, -90.0, 180.0, 90.0)
COARSE_ABOVE = 90.0  # degrees of longitude or latitude from which the coarse lines suffice
LEAST_MARGIN = 0.2  # degrees around a single place
CREDIT = "outlines Natural Earth"


@dataclass(frozen=True, eq=False)
class _Layer:
    """The arcs of one packaged file, one behind the other."""

    points: Float[np.ndarray, "n 2"]
    """Longitude and latitude in degrees, longitudes continuous within an arc."""
    starts: Int[np.ndarray, " n_arcs_plus_1"]
    """Arc a is points[starts[a] : starts[a + 1]]."""
    land: tuple[tuple[int, ...], ...]
    """Rings of land as arcs, in the order and direction in which they join."""


@lru_cache
def _layer(name: str) -> _Layer:
    file = resources.files("sae_apps.geospatial") / "data" / f"outlines-{name}.json.gz"
    document = json.loads(gzip.decompress(file.read_bytes()))
    starts = np.concatenate([[0], np.cumsum(document["points"])])
    total = np.cumsum(np.stack([document["x"], document["y"]], axis=1, dtype=np.int64), axis=0)
    # Each arc starts from its own absolute point, so what was summed before it is taken off.
    before = np.concatenate([np.zeros((1, 2), np.int64), total])[starts[:-1]]
    units = total - np.repeat(before, document["points"], axis=0)
    return _Layer(
        points=units * document["step"],
        starts=starts,
        land=tuple(tuple(ring) for ring in document.get("land", ())),
    )


def outlines(
    bounds: Bounds | None = None,
    detail: Detail = "auto",
    states: bool | Literal["auto"] | None = "auto",
) -> Lines:
    """Coasts and country borders in a window, each shared border once.

    Args:
        bounds: (west, south, east, north) in degrees; None is the whole world. An east beyond 180,
            or below west, goes through the antimeridian, and the lines come in the same frame:
            longitudes between west and west + width.
        detail: "110m" (1:110 million), "50m", or "auto": 110m where the window spans more than
            90 degrees either way.
        states: borders between the states of the USA too; "auto" adds them where 50m is drawn.
    Returns:
        polylines, each float32 [m, 2] of longitude and latitude, cut at the window's edges.
    Raises:
        UserError: the bounds are no window, or the detail is unknown.
    """
    window = check_bounds(bounds)
    level = _level(window, detail)
    lines = _clip(_layer(level), window)
    if states is True or (states == "auto" and level == "50m"):
        lines += _clip(_layer("us-states"), window)
    return lines


def state_borders(bounds: Bounds | None = None) -> Lines:
    """The borders between the states of the USA alone, as ``outlines`` returns its lines."""
    return _clip(_layer("us-states"), check_bounds(bounds))


def land(bounds: Bounds | None = None, detail: Detail = "auto") -> Lines:
    """Closed rings of land, cut at the window's edges, for filling by the nonzero rule.

    Lakes that are seas (the Caspian) run the other way round. A ring round the pole is closed along
    it. Where a ring leaves the window more than once, its parts stay joined along the edge (the
    algorithm of Sutherland and Hodgman), which a filled area does not show and a stroke would.
    Arguments, frame and errors as for ``outlines``.

    Returns:
        rings, each float32 [m, 2] with its first point again at its end.
    """
    window = check_bounds(bounds)
    west, south, east, north = window
    rings: Lines = []
    for ring in _rings(_level(window, detail)):
        low, high = ring.min(axis=0), ring.max(axis=0)
        if high[1] < south or low[1] > north:
            continue
        for shift in _shifts(low[0], high[0], west, east):
            part = _clip_ring(ring + [shift, 0.0], window)
            if len(part) > 3:
                rings.append(part.astype(np.float32))
    return rings


def fit_bounds(
    lon: Float[np.ndarray, " n"], lat: Float[np.ndarray, " n"], margin: float = 0.05
) -> Bounds:
    """The narrowest window that holds all places, with a margin.

    The longitudes are taken round the circle and the window is what the widest gap between
    neighbours leaves free, so places on both sides of the antimeridian stay together: east is then
    above 180.

    Args:
        lon, lat: [n] degrees.
        margin: share of the larger of width and height (as seen at the middle latitude) that is
            added on every side.
    Returns:
        (west, south, east, north) with west in [-180, 180) and east in (west, west + 360].
    Raises:
        UserError: no place, lengths that differ, or coordinates out of range.
    """
    lon, lat = np.asarray(lon, dtype=np.float64), np.asarray(lat, dtype=np.float64)
    _check_places(lon, lat)
    around = np.unique((lon + 180.0) % 360.0 - 180.0)
    gaps = np.diff(around, append=around[:1] + 360.0)
    widest = int(gaps.argmax())
    west, width = float(around[(widest + 1) % len(around)]), 360.0 - float(gaps[widest])
    south, north = float(lat.min()), float(lat.max())
    shrink = max(float(np.cos(np.deg2rad((south + north) / 2))), 0.05)  # of a degree of longitude
    pad = max(margin * max(width * shrink, north - south), LEAST_MARGIN)
    south, north = max(south - pad, -90.0), min(north + pad, 90.0)
    crosses = west + width > 180.0
    west, width = west - pad / shrink, width + 2 * pad / shrink
    if not crosses:  # the margin alone is no reason to go through the antimeridian
        east = min(west + width, 180.0)
        return max(west, -180.0), south, east, north
    if width >= 360.0:
        return WORLD[0], south, WORLD[2], north
    west = (west + 180.0) % 360.0 - 180.0
    return west, south, west + width, north


def wrap_lon(lon: Float[np.ndarray, " n"], west: float) -> Float[np.ndarray, " n"]:
    """Longitudes in the frame of a window: in [west, west + 360)."""
    return (np.asarray(lon, dtype=np.float64) - west) % 360.0 + west


def _check_places(lon: np.ndarray, lat: np.ndarray) -> None:
    if lon.shape != lat.shape or lon.ndim != 1 or lon.size == 0:
        raise UserError(
            f"Expected longitudes and latitudes of the same places, got the shapes {lon.shape} "
            f"and {lat.shape}."
        )
    bad = np.flatnonzero(~((np.abs(lat) <= 90.0) & (np.abs(lon) <= 360.0)))
    if bad.size:
        i = int(bad[0])
        raise UserError(
            f"Expected latitudes within 90 and longitudes within 360 degrees, got latitude "
            f"{lat[i]} and longitude {lon[i]} for place {i}."
        )


def check_bounds(bounds: Bounds | None) -> Bounds:
    """A window with west < east <= west + 360; None is the whole world.

    Raises:
        UserError: the latitudes are not in order or out of range, or so the longitudes.
    """
    west, south, east, north = (float(value) for value in (WORLD if bounds is None else bounds))
    if east <= west:
        east += 360.0
    if not (-90.0 <= south < north <= 90.0 and abs(west) <= 360.0 and west < east <= west + 360.0):
        raise UserError(
            "Expected bounds (west, south, east, north) in degrees with south < north and at most "
            f"360 degrees of longitude, got {bounds}."
        )
    return west, south, east, north


def _level(window: Bounds, detail: str) -> str:
    if detail not in ("auto", "110m", "50m"):
        raise UserError(f"Expected the detail 'auto', '110m' or '50m', got {detail!r}.")
    if detail != "auto":
        return detail
    west, south, east, north = window
    return "110m" if max(east - west, north - south) > COARSE_ABOVE else "50m"


def _shifts(low: float, high: float, west: float, east: float) -> list[float]:
    """The multiples of 360 that bring some of [low, high] into the open interval (west, east)."""
    first, last = np.floor((west - high) / 360.0) + 1, np.ceil((east - low) / 360.0) - 1
    return [360.0 * k for k in np.arange(first, last + 1)]


def _clip(layer: _Layer, window: Bounds) -> Lines:
    """The arcs within a window, in its frame."""
    points = layer.points
    inner = np.ones(len(points) - 1, dtype=bool)
    inner[layer.starts[1:-1] - 1] = False  # from the end of one arc to the start of the next
    on_seam = (points[:, 0] + 180.0) % 360.0 == 0.0
    inner &= ~(on_seam[:-1] & on_seam[1:])  # a cut in the source, not a coast
    west, _, east, _ = window
    lines: Lines = []
    for shift in _shifts(points[:, 0].min(), points[:, 0].max(), west, east):
        lines += _inside(points + [shift, 0.0], inner, window)
    return lines


def _inside(points: Float[np.ndarray, "n 2"], inner: np.ndarray, window: Bounds) -> Lines:
    """Liang-Barsky for the segments points[i] -> points[i + 1] where ``inner[i]``, then joined."""
    west, south, east, north = window
    step = np.diff(points, axis=0)
    enter, leave = np.zeros(len(step)), np.ones(len(step))
    for axis, low, high in ((0, west, east), (1, south, north)):
        start, delta = points[:-1, axis], step[:, axis]
        with np.errstate(divide="ignore", invalid="ignore"):
            to_low, to_high = (low - start) / delta, (high - start) / delta
        level = delta == 0
        outside = (start < low) | (start > high)
        first = np.where(level, np.where(outside, np.inf, -np.inf), np.minimum(to_low, to_high))
        last = np.where(level, np.inf, np.maximum(to_low, to_high))
        enter, leave = np.maximum(enter, first), np.minimum(leave, last)
    kept = np.flatnonzero(inner & (enter < leave))
    if kept.size == 0:
        return []
    heads = points[kept] + enter[kept, None] * step[kept]
    tails = points[kept] + leave[kept, None] * step[kept]
    joined = (np.diff(kept) == 1) & (leave[kept[:-1]] == 1.0) & (enter[kept[1:]] == 0.0)
    pieces = np.split(np.arange(kept.size), np.flatnonzero(~joined) + 1)
    return [np.concatenate([heads[piece[:1]], tails[piece]]).astype(np.float32) for piece in pieces]


def _clip_ring(ring: Float[np.ndarray, "m 2"], window: Bounds) -> Float[np.ndarray, "k 2"]:
    """Sutherland-Hodgman: what is left of a closed ring within the window, closed."""
    west, south, east, north = window
    points = ring[:-1]
    for axis, limit, sign in ((0, west, 1), (0, east, -1), (1, south, 1), (1, north, -1)):
        if len(points) == 0:
            return points
        after = np.roll(points, -1, axis=0)
        here, there = sign * (points[:, axis] - limit), sign * (after[:, axis] - limit)
        crosses = (here >= 0) != (there >= 0)
        share = np.divide(here, here - there, out=np.zeros_like(here), where=crosses)
        both = np.stack([points, points + share[:, None] * (after - points)], axis=1)
        points = both[np.stack([here >= 0, crosses], axis=1)]
    return np.concatenate([points, points[:1]])


@lru_cache
def _rings(name: str) -> tuple[Float[np.ndarray, "m 2"], ...]:
    """Closed rings of land with continuous longitudes."""
    layer = _layer(name)
    rings = []
    for arcs in layer.land:
        parts: list[np.ndarray] = []
        for arc in arcs:
            part = layer.points[layer.starts[arc] : layer.starts[arc + 1]]
            if parts:
                turn = np.round((part[0, 0] - parts[-1][-1, 0]) / 360.0) * 360.0
                part = (part - [turn, 0.0])[1:]
            parts.append(part)
        ring = np.concatenate(parts)
        if abs(ring[-1, 0] - ring[0, 0]) > 180.0:  # round the pole
            pole = np.copysign(90.0, ring[:, 1].mean())
            ring = np.concatenate([ring, [[ring[-1, 0], pole], [ring[0, 0], pole]]])
        rings.append(np.concatenate([ring, ring[:1]]))
    return tuple(rings)
