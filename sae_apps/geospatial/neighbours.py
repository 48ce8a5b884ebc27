"""Nearest neighbours and distance bands with ties and coincident places decided, not left to luck.

The tree holds every distinct location once, so any number of places may share one. Distances that
differ by less than TIE are one distance; among places at one distance the lower index is nearer.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from sae_core.errors import UserError

if TYPE_CHECKING:
    from scipy.spatial import KDTree

TIE = 1e-12
"""In units of the coordinates' extent; on the earth 6 micrometres, far above float64's rounding
(1e-16) and far below what any gazetteer resolves (1e-5 degrees, a metre)."""
MAX_LINKS = 200_000_000
"""More links than this are refused: 2.4 GB as a sparse matrix, and several times that to build."""
_BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class Links:
    """Weighted directed links between places."""

    focal: Int[np.ndarray, "m"]
    """Index of the place that has the neighbour."""
    neighbour: Int[np.ndarray, "m"]
    """Index of the neighbour, never the place itself."""
    weight: Float[np.ndarray, "m"]
    """1, or a share of 1 where coincident places are merged."""


@dataclass(frozen=True, eq=False)
class Sites:
    """Distinct locations and the places at each, in ascending order."""

    points: Float[np.ndarray, "u d"]
    """Coordinates of the locations, scaled so that TIE applies."""
    of_place: Int[np.ndarray, "n"]
    """Which location each place is at."""
    start: Int[np.ndarray, "u"]
    """Where the places of a location begin in ``members``."""
    count: Int[np.ndarray, "u"]
    """How many places are at a location."""
    members: Int[np.ndarray, "n"]
    """Places by location, ascending within one."""


def sites(
    coordinates: Float[np.ndarray, "n d"],
    first: Int[np.ndarray, "u"],
    of_place: Int[np.ndarray, "n"],
) -> Sites:
    """Group places by location.

    Args:
        coordinates: of every place.
        first: a place at each location.
        of_place: the location of each place.
    """
    points = coordinates[first]
    count = np.bincount(of_place, minlength=len(first))
    start = np.cumsum(count) - count
    return Sites(points, of_place, start, count, np.argsort(of_place, kind="stable"))


def knn_links(places: Sites, k: int, *, merge: bool) -> Links:
    """The k nearest places of each, or the places at the k nearest other locations (``merge``).

    Raises:
        UserError: there are fewer than k + 1 places, or locations where they are merged.
    """
    u = len(places.points)
    n, what = (u, "locations") if merge else (len(places.of_place), "places")
    if n < k + 1:
        plural = "s" if k > 1 else ""
        raise UserError(f"Expected at least {k + 1} {what} for {k} neighbour{plural}, got {n}.")
    from scipy.spatial import KDTree

    tree = KDTree(places.points)
    blocks = []
    step = max(1, _BLOCK // (k + 2) ** 2)
    for low in range(0, u, step):
        blocks.append(_knn_block(places, tree, np.arange(low, min(low + step, u)), k, merge))
    return joined(blocks)


def _knn_block(
    places: Sites, tree: "KDTree", block: Int[np.ndarray, "b"], k: int, merge: bool
) -> Links:
    """Links of all places at some locations."""
    near, level = _nearest_locations(tree, places.points[block], k)
    if merge:
        by_location = _first_locations(near, level, block, k)
        focal = np.concatenate([_members(places, u) for u in block])
        row = np.repeat(np.arange(len(block)), places.count[block])
        return _expanded(places, focal, by_location[row])
    # A location brings at most its k + 1 lowest places into a list of k + 1.
    count = np.where(level >= 0, np.minimum(places.count[near], k + 1), 0)
    candidate, of_row = _ranges(places, near.ravel(), count.ravel(), near.shape[1])
    order = np.lexsort((candidate, np.repeat(level.ravel(), count.ravel()), of_row))
    candidate, of_row = candidate[order], of_row[order]
    starts = np.searchsorted(of_row, np.arange(len(block)))
    ranked = candidate[starts[:, None] + np.arange(k + 1)]
    focal = np.concatenate([_members(places, u) for u in block])
    listed = ranked[np.repeat(np.arange(len(block)), places.count[block])]
    # The place itself leaves its list, by index; where it is not among the first, the last leaves.
    keep = listed != focal[:, None]
    keep[keep.all(axis=1), -1] = False
    neighbour = listed[keep]
    return Links(np.repeat(focal, k), neighbour, np.ones(len(neighbour)))


def _nearest_locations(
    tree: "KDTree", points: Float[np.ndarray, "b d"], k: int
) -> tuple[Int[np.ndarray, "b c"], Int[np.ndarray, "b c"]]:
    """At least the k + 1 nearest locations with all that tie, and the rank of each distance.

    Locations beyond the tie with the last are marked by the rank -1.
    """
    n = tree.n
    width = min(k + 2, n)
    distance, near = _query(tree, points, width)
    while width < n and not _is_complete(distance, k).all():
        width = min(2 * width, n)
        if len(points) > 1 and len(points) * width > _BLOCK:
            half = len(points) // 2
            parts = [_nearest_locations(tree, p, k) for p in (points[:half], points[half:])]
            return _stacked(parts)
        distance, near = _query(tree, points, width)
    level = np.zeros(distance.shape, dtype=np.int64)
    np.cumsum(np.diff(distance, axis=1) > TIE, axis=1, out=level[:, 1:])
    last = level[:, min(k, width - 1)]
    return near, np.where(level <= last[:, None], level, -1)


def _query(tree: "KDTree", points: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and locations [b, width], also where the width is 1."""
    distance, near = tree.query(points, width)
    return np.reshape(distance, (-1, width)), np.reshape(near, (-1, width))


def _is_complete(distance: Float[np.ndarray, "b c"], k: int) -> np.ndarray:
    """Whether a farther location follows the (k + 1)-th, so that no tie is cut."""
    return np.any(np.diff(distance, axis=1)[:, k:] > TIE, axis=1)


def _stacked(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(near.shape[1] for near, _ in parts)
    near, level = zip(
        *(
            (
                np.pad(near, ((0, 0), (0, width - near.shape[1]))),
                np.pad(level, ((0, 0), (0, width - level.shape[1])), constant_values=-1),
            )
            for near, level in parts
        ),
        strict=True,
    )
    return np.concatenate(near), np.concatenate(level)


def _first_locations(
    near: Int[np.ndarray, "b c"], level: Int[np.ndarray, "b c"], own: Int[np.ndarray, "b"], k: int
) -> Int[np.ndarray, "b k"]:
    """The k nearest other locations of each, those at one distance by index."""
    rank = np.where(level < 0, near.shape[1], level)
    rank = np.where(near == own[:, None], near.shape[1] + 1, rank)
    order = np.lexsort((near, rank), axis=1)
    return np.take_along_axis(near, order, axis=1)[:, :k]


def band_links(places: Sites, radius: float, *, merge: bool) -> Links:
    """All places within a distance, its end included; without those at the same place if merged.

    Raises:
        UserError: there are more than MAX_LINKS links.
    """
    from scipy.spatial import KDTree

    tree = KDTree(places.points)
    reach = radius + TIE
    weights = places.count.astype(np.float64)
    n_links = float(tree.count_neighbors(tree, reach, weights=(weights, weights)))
    if n_links > MAX_LINKS:
        raise UserError(
            f"Expected at most {MAX_LINKS:,} links, got {n_links:,.0f}: take a shorter band."
        )
    pairs = tree.query_pairs(reach, output_type="ndarray")
    a = np.concatenate([pairs[:, 0], pairs[:, 1]])
    b = np.concatenate([pairs[:, 1], pairs[:, 0]])
    if not merge:
        own = np.arange(len(places.points))
        a, b = np.concatenate([a, own]), np.concatenate([b, own])
    # Every place at a with every place at b.
    focal, pair = _ranges(places, a, places.count[a], 1)
    links = _expanded(places, focal, b[pair][:, None])
    keep = links.focal != links.neighbour
    weight = links.weight if merge else np.ones(len(links.focal))
    return Links(links.focal[keep], links.neighbour[keep], weight[keep])


def nearest_links(places: Sites, who: Int[np.ndarray, "m"], *, merge: bool) -> Links:
    """The nearest place of some places, for those that a band leaves alone."""
    links = knn_links(places, 1, merge=merge)
    keep = np.isin(links.focal, who)
    return Links(links.focal[keep], links.neighbour[keep], links.weight[keep])


def _members(places: Sites, location: int) -> Int[np.ndarray, "m"]:
    return places.members[places.start[location] : places.start[location] + places.count[location]]


def _ranges(
    places: Sites, location: Int[np.ndarray, "m"], count: Int[np.ndarray, "m"], width: int
) -> tuple[Int[np.ndarray, "t"], Int[np.ndarray, "t"]]:
    """The first ``count`` places of each location, and which row of ``width`` locations it was."""
    total = int(count.sum())
    of = np.repeat(np.arange(len(location)), count)
    within = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
    return places.members[places.start[location[of]] + within], of // width


def _expanded(
    places: Sites, focal: Int[np.ndarray, "m"], locations: Int[np.ndarray, "m k"]
) -> Links:
    """Each focal place with all places at its locations; a location's weight of 1 is shared."""
    flat = locations.ravel()
    count = places.count[flat]
    neighbour, of = _ranges(places, flat, count, 1)
    return Links(np.repeat(focal, locations.shape[1])[of], neighbour, (1.0 / count)[of])


def joined(blocks: list[Links]) -> Links:
    """All links of several lists."""
    return Links(
        np.concatenate([b.focal for b in blocks]),
        np.concatenate([b.neighbour for b in blocks]),
        np.concatenate([b.weight for b in blocks]),
    )
