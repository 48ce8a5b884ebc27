"""Longitude and latitude to a plane that a small map can be drawn on, and lines cut to its window.

Both projections keep areas, so that no region looks denser with places than it is. Places within
``NEAR_DEG`` of their centre: Lambert's azimuthal projection about that centre,

    (x, y) = sqrt(2 / (1 + cos c)) (cos phi sin dl, cos phi0 sin phi - sin phi0 cos phi cos dl),

c the angle to the centre (phi0, l0), dl = l - l0 (Snyder, USGS Professional Paper 1395, p. 185).
Wider: Equal Earth (Savric, Patterson, Jenny 2018, doi 10.1080/13658816.2018.1504949).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

NEAR_DEG = 60.0  # beyond, Lambert's shapes are stretched by more than 1 / cos(30 deg) = 1.15
MARGIN = 0.03  # of the longer side, around the outermost places
FLOOR = 1e-4  # width of a window around places that all coincide: about 600 m
_A = (1.340264, -0.081106, 0.000893, 0.003796)

Points = Float[np.ndarray, "n 2"]


@dataclass(frozen=True)
class Projection:
    """The plane of one map; lengths in radii of the Earth."""

    lon0: float
    """Centre [degrees east]; of Equal Earth only the meridian is used."""
    lat0: float
    """Centre [degrees north]."""
    is_world: bool
    """Equal Earth; else Lambert's azimuthal."""
    reach_deg: float = 180.0
    """Angle from the centre beyond which lines are left out."""

    def __call__(self, lon: Float[np.ndarray, " n"], lat: Float[np.ndarray, " n"]) -> Points:
        """Plane coordinates of points, x to the east and y to the north."""
        lam = np.radians(np.asarray(lon, dtype=np.float64) - self.lon0)
        phi = np.radians(np.asarray(lat, dtype=np.float64))
        return _equal_earth(lam, phi) if self.is_world else self._lambert(lam, phi)

    def _lambert(self, lam: Float[np.ndarray, " n"], phi: Float[np.ndarray, " n"]) -> Points:
        phi0 = math.radians(self.lat0)
        across = np.cos(phi) * np.cos(lam)
        cos_c = math.sin(phi0) * np.sin(phi) + math.cos(phi0) * across
        k = np.sqrt(2 / np.maximum(1 + cos_c, 1e-9))
        north = math.cos(phi0) * np.sin(phi) - math.sin(phi0) * across
        return np.stack([k * np.cos(phi) * np.sin(lam), k * north], axis=1)

    def angle_deg(
        self, lon: Float[np.ndarray, " n"], lat: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Angle of points from the centre."""
        centre = unit_vectors(np.array([self.lon0]), np.array([self.lat0]))[0]
        return np.degrees(np.arccos(np.clip(unit_vectors(lon, lat) @ centre, -1, 1)))


@dataclass(frozen=True)
class Window:
    """The part of the plane that a map shows."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def aspect(self) -> float:
        """Height over width."""
        return (self.top - self.bottom) / (self.right - self.left)

    def grown(self, share: float) -> "Window":
        """The window with ``share`` of its longer side more on every side."""
        more = share * max(self.right - self.left, self.top - self.bottom)
        return Window(self.left - more, self.bottom - more, self.right + more, self.top + more)

    def holds(self, points: Points) -> Bool[np.ndarray, " n"]:
        x, y = points[:, 0], points[:, 1]
        across = (self.left <= x) & (x <= self.right)
        return across & (self.bottom <= y) & (y <= self.top)


def unit_vectors(
    lon: Float[np.ndarray, " n"], lat: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n 3"]:
    """Points of the unit sphere."""
    lam, phi = np.radians(lon), np.radians(lat)
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=1)


def choose_projection(
    lon: Float[np.ndarray, " n"], lat: Float[np.ndarray, " n"]
) -> tuple[Projection, Window]:
    """The projection for a set of places, and the window that holds them.

    Args:
        lon: [degrees east]; lat: [degrees north]; at least one place.
    """
    vectors = unit_vectors(lon, lat)
    middle = vectors.mean(axis=0)
    length = float(np.linalg.norm(middle))
    if length > 1e-6:
        middle = middle / length
        lon0, lat0 = math.degrees(math.atan2(middle[1], middle[0])), float(middle[2])
        near = Projection(lon0, math.degrees(math.asin(np.clip(lat0, -1, 1))), False)
        widest = float(near.angle_deg(lon, lat).max())
        if widest <= NEAR_DEG:
            reach = min(90.0, 1.6 * widest + 3)
            near = Projection(near.lon0, near.lat0, False, reach)
            return near, _window(near(lon, lat))
    world = Projection(0.0, 0.0, True)
    return world, _window(world(lon, lat))


def cut_lines(lines: Sequence[Points], projection: Projection, window: Window) -> Iterator[Points]:
    """Lines of longitude and latitude in the plane, cut where they leave the window.

    One point outside is kept at either end, so that a line reaches the edge.
    """
    for line in lines:
        line = np.asarray(line, dtype=np.float64)
        if len(line) < 2:
            continue
        points = projection(line[:, 0], line[:, 1])
        is_seen = projection.angle_deg(line[:, 0], line[:, 1]) <= projection.reach_deg
        held = window.holds(points) & is_seen
        keep = held.copy()
        keep[1:] |= held[:-1]
        keep[:-1] |= held[1:]
        keep &= is_seen
        edges = np.flatnonzero(np.diff(keep.astype(np.int8), prepend=0, append=0))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            if stop - start >= 2:
                yield points[start:stop]


def cut_rings(rings: Sequence[Points], projection: Projection, window: Window) -> Iterator[Points]:
    """The parts of closed rings inside the window, closed along its edge (Sutherland-Hodgman).

    A ring that is wholly beyond the reach of the projection is left out: about the point opposite
    the centre its inside would become its outside.
    """
    globe = Window(-180.0, -90.0, 180.0, 90.0)
    for ring in rings:
        ring = np.asarray(ring, dtype=np.float64)
        if projection.is_world:
            ring = _clip_ring(ring, globe)
        elif not (projection.angle_deg(ring[:, 0], ring[:, 1]) <= projection.reach_deg).any():
            continue
        if len(ring) < 3:
            continue
        clipped = _clip_ring(projection(ring[:, 0], ring[:, 1]), window)
        if len(clipped) >= 3:
            yield clipped


def _clip_ring(ring: Points, window: Window) -> Points:
    """One pass for each side; where an edge crosses the side, the crossing is put in."""
    sides = ((0, window.left, 1), (0, window.right, -1), (1, window.bottom, 1), (1, window.top, -1))
    for axis, limit, sign in sides:
        if not len(ring):
            break
        depth = sign * (ring[:, axis] - limit)  # positive inside
        after, deep = np.roll(ring, -1, axis=0), np.roll(depth, -1)
        crosses = (depth >= 0) != (deep >= 0)
        share = np.where(crosses, depth / np.where(crosses, depth - deep, 1.0), 0.0)
        both = np.stack([ring, ring + share[:, None] * (after - ring)], axis=1)
        kept = np.stack([depth >= 0, crosses], axis=1)
        ring = both.reshape(-1, 2)[kept.reshape(-1)]
    return ring


def _window(points: Points) -> Window:
    (left, bottom), (right, top) = points.min(axis=0), points.max(axis=0)
    short = FLOOR / 2
    if right - left < FLOOR:
        left, right = left - short, right + short
    if top - bottom < FLOOR:
        bottom, top = bottom - short, top + short
    return Window(float(left), float(bottom), float(right), float(top)).grown(MARGIN)


def _equal_earth(lam: Float[np.ndarray, " n"], phi: Float[np.ndarray, " n"]) -> Points:
    theta = np.arcsin(math.sqrt(3) / 2 * np.sin(phi))
    t2 = theta * theta
    t6 = t2 * t2 * t2
    slope = _A[0] + 3 * _A[1] * t2 + t6 * (7 * _A[2] + 9 * _A[3] * t2)
    x = 2 * math.sqrt(3) / 3 * lam * np.cos(theta) / slope
    y = theta * (_A[0] + _A[1] * t2 + t6 * (_A[2] + _A[3] * t2))
    return np.stack([x, y], axis=1)
