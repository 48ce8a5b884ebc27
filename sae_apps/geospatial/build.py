"""The links of ``spatial_weights``: options checked, coordinates made, groups taken one by one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_apps.geospatial.neighbours import (
    Links,
    Sites,
    band_links,
    joined,
    knn_links,
    nearest_links,
    sites,
)
from sae_apps.geospatial.places import Places, default_crs
from sae_apps.geospatial.sphere import (
    EARTH_RADIUS_KM,
    chord_of_km,
    jittered,
    locations,
    unit_vectors,
)
from sae_core.errors import UserError
from sae_core.extras import require

CHOICES = {
    "method": ("knn", "band"),
    "metric": ("great_circle", "planar"),
    "coincident": ("keep", "jitter", "raise", "merge"),
    "islands": ("keep", "nearest", "raise"),
}
JITTER_METRES = 1.0
DEGREES = "degrees"


def build_links(
    lon: Float[np.ndarray, "n"],
    lat: Float[np.ndarray, "n"],
    *,
    k: int,
    method: str,
    metric: str,
    band_km: float | None,
    crs: Any,
    groups: Sequence[Any] | np.ndarray | None,
    coincident: str,
    islands: str,
    seed: int,
    places: Places | None,
) -> tuple[Links, str]:
    """Links between all places, and how they were made in words.

    Args:
        lon: degrees, checked; the other options are those of ``spatial_weights``.
        lat: degrees, checked.
        k: neighbours.
        method: knn or band.
        metric: great_circle or planar.
        band_km: length of the band in km.
        crs: projection of planar.
        groups: labels.
        coincident: what to do with places at one location.
        islands: what to do with places without neighbours.
        seed: of the jitter.
        places: where the coordinates are from; names the projection where ``crs`` is None.
    Raises:
        UserError: as ``spatial_weights``.
    """
    chosen = {"method": method, "metric": metric, "coincident": coincident, "islands": islands}
    _check_options(chosen, k, band_km, crs)
    first, of_place = locations(lon, lat)
    if len(first) < 2:
        raise UserError(
            f"Expected places at two locations or more, got {len(lon)} at the same coordinates."
        )
    _check_coincident(coincident, first, of_place)
    if coincident == "jitter":
        move = np.setdiff1d(np.flatnonzero(np.bincount(of_place)[of_place] > 1), first)
        lon, lat = jittered(lon, lat, move, JITTER_METRES, seed)
        first, of_place = locations(lon, lat)
    merge = coincident == "merge"
    blocks = []
    for label, members in _groups(groups, len(lon)):
        points, per_km = _coordinates(lon, lat, members, metric, crs, places)
        _, start, local = np.unique(of_place[members], return_index=True, return_inverse=True)
        group = sites(points, start, local.reshape(-1))
        try:
            if method == "knn":
                links = knn_links(group, k, merge=merge)
            else:
                assert band_km is not None  # _check_options
                radius = chord_of_km(band_km) if metric == "great_circle" else band_km * per_km
                links = _banded(group, radius, islands, merge)
        except UserError as error:
            if label is None:
                raise
            raise UserError(f"{str(error).rstrip('.')} in the group {label!r}.") from error
        blocks.append(Links(members[links.focal], members[links.neighbour], links.weight))
    return joined(blocks), _sentence(chosen, k, band_km, crs, groups, places)


def _check_options(chosen: dict[str, str], k: int, band_km: float | None, crs: Any) -> None:
    for option, value in chosen.items():
        if value not in CHOICES[option]:
            raise UserError(f"Expected {option} out of {CHOICES[option]}, got {value!r}.")
    if chosen["method"] == "knn" and (isinstance(k, bool) or int(k) != k or k < 1):
        raise UserError(f"Expected at least 1 neighbour, got {k}.")
    if (chosen["method"] == "band") != (band_km is not None):
        raise UserError(
            f"Expected band_km with method 'band' and only there, got {band_km} "
            f"with {chosen['method']!r}."
        )
    if band_km is not None and not 0 < band_km < np.inf:
        raise UserError(f"Expected a band_km above 0, got {band_km}.")
    if crs is not None and chosen["metric"] != "planar":
        raise UserError(f"Expected crs with metric 'planar' only, got {crs!r} with great_circle.")
    if isinstance(crs, str) and crs == DEGREES and band_km is not None:
        raise UserError(f"Expected a projection for a band in km, got crs={DEGREES!r}.")


def _check_coincident(choice: str, first: np.ndarray, of_place: np.ndarray) -> None:
    shared = np.bincount(of_place)
    if choice != "raise" or shared.max() == 1:
        return
    a, b = np.flatnonzero(of_place == shared.argmax())[:2]
    raise UserError(
        f"Expected every place at coordinates of its own, got {int(shared[shared > 1].sum())} "
        f"that share theirs, as the places {a} and {b} do."
    )


def _groups(groups: Any, n: int) -> list[tuple[Any, np.ndarray]]:
    """(label, indices ascending) of every group in the order of their first place."""
    if groups is None:
        return [(None, np.arange(n))]
    labels = groups.tolist() if isinstance(groups, np.ndarray) else list(groups)
    if len(labels) != n:
        raise UserError(f"Expected a group for each of {n} places, got {len(labels)}.")
    found: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        if label is None or label != label:
            raise UserError(f"Expected a group for every place, got none for place {i}.")
        found.setdefault(label, []).append(i)
    return [(label, np.array(members)) for label, members in found.items()]


def _coordinates(
    lon: np.ndarray,
    lat: np.ndarray,
    members: np.ndarray,
    metric: str,
    crs: Any,
    places: Places | None,
) -> tuple[np.ndarray, float]:
    """Coordinates of a group in units of the earth's radius (so that one tie fits all); 1 km."""
    lon, lat = lon[members], lat[members]
    if metric == "great_circle":
        return unit_vectors(lon, lat), 1 / EARTH_RADIUS_KM
    if isinstance(crs, str) and crs == DEGREES:
        return np.radians(np.stack([lon, lat], axis=1)), np.nan
    if crs is None:
        if places is None:
            raise UserError(
                "Expected a crs for metric 'planar', got none: an EPSG code, or crs='degrees' to "
                "take longitude and latitude as a plane, which distorts distances."
            )
        crs = default_crs(places.take(members))
    return _projected(lon, lat, crs) / (1000 * EARTH_RADIUS_KM), 1 / EARTH_RADIUS_KM


def _projected(lon: np.ndarray, lat: np.ndarray, crs: Any) -> np.ndarray:
    """Metres in the plane of a projection."""
    pyproj = require("pyproj", "geo")
    try:
        target = pyproj.CRS.from_user_input(crs)
    except pyproj.exceptions.CRSError as error:
        raise UserError(
            f"Expected an EPSG code or a CRS that pyproj knows, got {crs!r}."
        ) from error
    if not target.is_projected:
        raise UserError(f"Expected a projected crs, got {target.name!r}, which is in degrees.")
    transformer = pyproj.Transformer.from_crs(4326, target, always_xy=True)
    xy = np.stack(transformer.transform(lon, lat), axis=1)
    if not np.isfinite(xy).all():
        i = int(np.flatnonzero(~np.isfinite(xy).all(axis=1))[0])
        raise UserError(
            f"Expected places where {target.name!r} is defined, got lon {lon[i]}, lat {lat[i]}."
        )
    return xy * target.axis_info[0].unit_conversion_factor


def _banded(group: Sites, radius: float, islands: str, merge: bool) -> Links:
    links = band_links(group, radius, merge=merge)
    alone = np.setdiff1d(np.arange(len(group.of_place)), links.focal)
    if not alone.size or islands == "keep":
        return links
    if islands == "raise":
        raise UserError(
            f"Expected a neighbour for every place, got {alone.size} without, the first of them "
            f"place {alone[0]}."
        )
    return joined([links, nearest_links(group, alone, merge=merge)])


def _sentence(
    chosen: dict[str, str],
    k: int,
    band_km: float | None,
    crs: Any,
    groups: Any,
    places: Places | None,
) -> str:
    merged = chosen["coincident"] == "merge"
    if chosen["method"] == "knn":
        what = f"{k} nearest {'locations' if merged else 'neighbours'}"
    else:
        what = f"all {'locations' if merged else 'places'} within {band_km:g} km"
    metric = "great circle" if chosen["metric"] == "great_circle" else _plane(crs, places)
    parts = [what, metric]
    if groups is not None:
        parts.append("within groups")
    if chosen["coincident"] in ("jitter", "merge"):
        parts.append(f"coincident places {chosen['coincident'].removesuffix('e')}ed")
    if chosen["method"] == "band" and chosen["islands"] == "nearest":
        parts.append("islands linked to their nearest")
    return ", ".join(parts)


def _plane(crs: Any, places: Places | None) -> str:
    if crs is None:
        return "planar, published projections"
    if isinstance(crs, str) and crs == DEGREES:
        return "longitude and latitude taken as a plane"
    return f"planar, EPSG:{crs}" if isinstance(crs, int) else f"planar, {crs}"
