"""Points on the sphere: unit vectors, great-circle distances, checks of longitude and latitude.

u = (cos lat cos lon, cos lat sin lon, sin lat);  angle(u, v) = 2 atan2(|u - v|, |u + v|) (W. Kahan,
"How Futile are Mindless Assessments of Roundoff"), which is exact to rounding at every distance,
where the haversine loses half its digits near antipodes and the arc cosine near zero.
The chord |u - v| = 2 sin(angle / 2) grows with the angle, so nearest by chord is nearest on the
sphere, through the poles and across the antimeridian, without a projection.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from sae_core.errors import UserError

EARTH_RADIUS_KM = 6371.0088
"""Mean radius (2a + b) / 3 of the ellipsoid GRS 80."""

Degrees = Float[np.ndarray, "n"]
Vectors = Float[np.ndarray, "n 3"]


def unit_vectors(lon: Degrees, lat: Degrees) -> Vectors:
    """Points on the unit sphere from longitude and latitude in degrees."""
    lon, lat = np.radians(lon), np.radians(lat)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


def lon_lat(vectors: Vectors) -> tuple[Degrees, Degrees]:
    """Longitude in (-180, 180] and latitude in degrees of vectors of any length above 0."""
    x, y, z = vectors[:, 0], vectors[:, 1], vectors[:, 2]
    return np.degrees(np.arctan2(y, x)), np.degrees(np.arctan2(z, np.hypot(x, y)))


def angle_km(u: Vectors, v: Vectors) -> Float[np.ndarray, "n"]:
    """Great-circle distance in km between unit vectors, row by row."""
    apart = np.linalg.norm(u - v, axis=1)
    return 2 * EARTH_RADIUS_KM * np.arctan2(apart, np.linalg.norm(u + v, axis=1))


def great_circle_km(
    lon_a: Degrees, lat_a: Degrees, lon_b: Degrees, lat_b: Degrees
) -> Float[np.ndarray, "n"]:
    """Great-circle distance in km between two lists of points in degrees, pair by pair."""
    return angle_km(unit_vectors(lon_a, lat_a), unit_vectors(lon_b, lat_b))


def chord_of_km(km: float) -> float:
    """Chord on the unit sphere that belongs to a great-circle distance; 2 from half a circle on."""
    return 2.0 * float(np.sin(min(km / (2 * EARTH_RADIUS_KM), np.pi / 2)))


def locations(lon: Degrees, lat: Degrees) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "n"]]:
    """Distinct points: the first place at each, and which of them every place is at.

    Longitudes -180 and 180 are one meridian, and at a pole every longitude is the same point.
    """
    lon = np.where(np.abs(lat) == 90.0, 0.0, np.where(lon == -180.0, 180.0, lon))
    both = np.stack([lat, lon], axis=1) + 0.0  # -0.0 becomes 0.0
    _, first, of_place = np.unique(both, axis=0, return_index=True, return_inverse=True)
    return first, of_place.reshape(-1)


def jittered(
    lon: Degrees, lat: Degrees, move: Int[np.ndarray, "m"], metres: float, seed: int
) -> tuple[Degrees, Degrees]:
    """Displace some places in a random direction, evenly over a disc of a radius in metres."""
    generator = np.random.default_rng(seed)
    centre = unit_vectors(lon[move], lat[move])
    radius = np.sqrt(generator.random(len(move))) * metres / (1000 * EARTH_RADIUS_KM)
    bearing = generator.random(len(move)) * 2 * np.pi
    # Any axis not along the centre gives two tangents, so that the poles are no exception.
    axis = np.eye(3)[np.abs(centre).argmin(axis=1)]
    one = np.cross(centre, axis)
    one /= np.linalg.norm(one, axis=1, keepdims=True)
    two = np.cross(centre, one)
    step = np.cos(bearing)[:, None] * one + np.sin(bearing)[:, None] * two
    lon, lat = lon.copy(), lat.copy()
    moved = np.cos(radius)[:, None] * centre + np.sin(radius)[:, None] * step
    lon[move], lat[move] = lon_lat(moved)
    return lon, lat


def check_degrees(
    lon: Degrees, lat: Degrees, who: Sequence[str] | None = None, *, noun: str = "place"
) -> None:
    """Refuse longitudes and latitudes that are not finite or out of range.

    Args:
        lon: degrees, in [-180, 180].
        lat: degrees, in [-90, 90].
        who: how to call each point in a message; None for its number from 0.
        noun: what a point without name is called.
    Raises:
        UserError: the lengths differ, or a value is not finite or out of range; names the first.
    """
    if lon.shape != lat.shape or lon.ndim != 1:
        raise UserError(
            f"Expected longitudes and latitudes of one length, got {lon.shape} and {lat.shape}."
        )
    for what, values, limit in (("latitude", lat, 90.0), ("longitude", lon, 180.0)):
        bad = np.flatnonzero(~(np.abs(values) <= limit))  # NaN is bad too
        if not bad.size:
            continue
        i = int(bad[0])
        name = who[i] if who is not None else f"{noun} {i}"
        swapped = (
            what == "latitude"
            and bool((np.abs(lon) <= 90).all())
            and bool((np.abs(lat) <= 180).all())
        )
        hint = "; are lat and lon swapped?" if swapped else "."
        raise UserError(
            f"Expected every {what} in [-{limit:g}, {limit:g}] degrees, "
            f"got {values[i]} for {name}{hint}"
        )
