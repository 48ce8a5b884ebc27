"""Spatial weights: who is whose neighbour, as a sparse matrix on the ids of the places.

w_ij > 0 where j is a neighbour of i; row-standardised, sum_j w_ij = 1. Neighbours are found by
unit vectors in a k-d tree, whose chord grows with the great-circle distance, so they are exact
through the poles and across the antimeridian. ``metric="planar"`` projects first, as the published
study did (arXiv 2505.03368: k = 8, row-standardised, EPSG:27700, 25832 and 32618, block-diagonal).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from sae_apps.geospatial.build import build_links
from sae_apps.geospatial.places import Places
from sae_apps.geospatial.sphere import check_degrees
from sae_apps.geospatial.weights_checks import check_matrix, check_row_id, foreign_matrix
from sae_apps.geospatial.weights_facts import WeightsFacts, weights_facts
from sae_core.errors import UserError
from sae_core.extras import require
from sae_core.features import shape_of

if TYPE_CHECKING:
    import libpysal

Ids = Int[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class SpatialWeights:
    """Weights of neighbours, ready for ``moran`` and ``moran_local``."""

    matrix: sparse.csr_array
    """[n, n] float64 in canonical CSR: non-negative, zero diagonal, no stored zero."""
    row_id: Ids
    """The place of each row and column."""
    method: str
    """How the weights were made, readable."""
    facts: WeightsFacts
    """Counts and lengths."""

    def __post_init__(self) -> None:
        check_matrix(self.matrix)
        check_row_id(self.row_id, self.n)

    @property
    def n(self) -> int:
        """How many places."""
        return self.facts.n

    @cached_property
    def s0(self) -> float:
        """sum_ij w_ij."""
        return float(self.matrix.sum())

    @cached_property
    def s1(self) -> float:
        """1/2 sum_ij (w_ij + w_ji)^2."""
        both = self.matrix + self.matrix.T
        return float((both.data**2).sum()) / 2

    @cached_property
    def s2(self) -> float:
        """sum_i (sum_j w_ij + sum_j w_ji)^2."""
        return float(((self.matrix.sum(axis=1) + self.matrix.sum(axis=0)) ** 2).sum())

    def lag(self, y: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
        """W y: the weighted sum over the neighbours, for one variable [n] or several [n, F].

        Raises:
            UserError: y has another number of rows.
        """
        y = np.asarray(y)
        if y.ndim not in (1, 2) or len(y) != self.n:
            raise UserError(f"Expected a variable of {self.n} places, got the shape {y.shape}.")
        return self.matrix @ y

    def to_graph(self) -> "libpysal.graph.Graph":
        """The same weights as a libpysal Graph with row_id as its ids.

        Raises:
            MissingExtraError: libpysal is not installed.
        """
        graph = require("libpysal.graph", "geo")
        coo = self.matrix.tocoo()
        islands = np.flatnonzero(np.diff(self.matrix.indptr) == 0)  # a self-link of 0 in a Graph
        focal = np.concatenate([coo.row, islands])
        order = np.argsort(focal, kind="stable")
        neighbour = np.concatenate([coo.col, islands])[order]
        weight = np.concatenate([coo.data, np.zeros(len(islands))])[order]
        return graph.Graph.from_arrays(self.row_id[focal[order]], self.row_id[neighbour], weight)

    def to_w(self) -> "libpysal.weights.W":
        """The same weights as libpysal's older W with row_id as its ids.

        Raises:
            MissingExtraError: libpysal is not installed.
        """
        weights = require("libpysal.weights", "geo")
        ids = self.row_id.tolist()
        ptr, cols, data = self.matrix.indptr, self.matrix.indices, self.matrix.data
        spans = [slice(ptr[i], ptr[i + 1]) for i in range(self.n)]
        return weights.W(
            {ids[i]: self.row_id[cols[span]].tolist() for i, span in enumerate(spans)},
            {ids[i]: data[span].tolist() for i, span in enumerate(spans)},
            id_order=ids,
            silence_warnings=True,
        )


def spatial_weights(
    lon: Any,
    lat: Any = None,
    *,
    k: int = 8,
    method: str = "knn",
    metric: str = "great_circle",
    band_km: float | None = None,
    crs: Any = None,
    groups: Sequence[Any] | np.ndarray | None = None,
    coincident: str = "keep",
    islands: str = "keep",
    transform: str = "R",
    row_id: Ids | None = None,
    seed: int = 0,
) -> SpatialWeights:
    """Neighbours of places, by nearness or within a distance.

    Ties are broken by distance, then by index, so the same places give the same weights.

    Args:
        lon: longitudes in degrees, or Places (then without ``lat``).
        lat: latitudes in degrees.
        k: neighbours of each place, for ``knn``.
        method: ``knn``, or ``band`` for all within ``band_km``, its end included.
        metric: ``great_circle``, or ``planar`` for distances between projected coordinates.
        band_km: the distance of ``band`` in km.
        crs: what ``planar`` projects to: an EPSG code or anything pyproj reads, or ``"degrees"``
            for longitude and latitude taken as a plane. None: the published projection of the
            Places (of each group), see ``default_crs``.
        groups: a label for every place; neighbours are of the same label only.
        coincident: places that share their coordinates are ``keep``: at distance 0 of each other;
            ``jitter``: as keep, after all but the first at a location moved by up to a metre;
            ``merge``: no neighbours of each other, and neighbours are *locations* (the k nearest
            others, or those within the band), each with the weight 1 shared by the places there;
            ``raise``: refused.
        islands: places without another in the band stay so (``keep``), get their nearest as only
            neighbour (``nearest``), or are refused (``raise``).
        transform: ``R`` divides every row by its sum, ``B`` leaves the weights 1 (or shares).
        row_id: ids of the places; None for those of the Places, else 0 to n - 1.
        seed: of ``jitter``.
    Raises:
        UserError: an option is unknown, a coordinate is out of range, ids come twice, there are
            fewer than k + 1 places (in a group), all are at one location, or no link is left.
        MissingExtraError: pyproj is needed and absent.
    """
    if transform not in ("R", "B"):
        raise UserError(f"Expected a transform R or B, got {transform!r}.")
    source = lon if isinstance(lon, Places) else None
    x, y, ids = _arguments(lon, lat, row_id)
    links, sentence = build_links(
        x,
        y,
        k=k,
        method=method,
        metric=metric,
        band_km=band_km,
        crs=crs,
        groups=groups,
        coincident=coincident,
        islands=islands,
        seed=seed,
        places=source,
    )
    n = len(x)
    matrix = sparse.csr_array((links.weight, (links.focal, links.neighbour)), shape=(n, n))
    matrix.sort_indices()
    if transform == "R":
        matrix, sentence = _row_standardised(matrix), f"{sentence}, row-standardised"
    return SpatialWeights(matrix, ids, sentence, weights_facts(matrix, x, y))


def as_weights(w: Any, row_id: Ids | None = None) -> SpatialWeights:
    """Weights of any kind as SpatialWeights, their values as they are, in the order of ``row_id``.

    esda standardises the rows of what it is given by default; this does not.

    Args:
        w: SpatialWeights, libpysal Graph or W, or a square scipy sparse matrix (which has no ids).
        row_id: the places in the order that is needed; None leaves the order of ``w``.
    Raises:
        UserError: w is of another kind, of another size than row_id, or has other ids; has a
            negative or non-finite weight, a weight of a place with itself, or no weight at all.
    """
    wanted = None if row_id is None else np.asarray(row_id)
    if wanted is not None:
        check_row_id(wanted, len(wanted))
    if isinstance(w, SpatialWeights):
        given, ids = w, w.row_id
    else:
        matrix, ids, kind = foreign_matrix(w)
        given_id = np.arange(shape_of(matrix)[0])
        if ids is not None and ids.dtype == np.int64:
            given_id = ids
        given = SpatialWeights(matrix, given_id, kind, weights_facts(matrix))
    if wanted is None:
        return given
    if given.n != len(wanted):
        raise UserError(f"Expected weights of {len(wanted)} places, got weights of {given.n}.")
    if ids is None:
        return replace(given, row_id=wanted)
    if np.array_equal(ids, wanted):
        return given
    order = _matched(ids, wanted)
    matrix = given.matrix[order][:, order]
    matrix.sort_indices()
    return replace(given, matrix=matrix, row_id=wanted)


def _matched(ids: np.ndarray, wanted: Ids) -> Ids:
    """Where each wanted id is among ids."""
    place = {key: i for i, key in enumerate(ids.tolist())}
    missing = [key for key in wanted.tolist() if key not in place]
    if missing:
        other = sorted(set(place) - set(wanted.tolist()), key=str)
        raise UserError(
            f"Expected weights with the ids of the places, got none for row_id {missing[0]} and "
            f"{len(missing) - 1} more, but one for {other[0]!r}: build them with row_id as the "
            "ids, as Places.to_geodataframe() has in its index."
        )
    return np.array([place[key] for key in wanted.tolist()])


def _arguments(lon: Any, lat: Any, row_id: Ids | None) -> tuple[np.ndarray, np.ndarray, Ids]:
    if isinstance(lon, Places):
        if lat is not None or row_id is not None:
            raise UserError("Expected Places alone, got lat or row_id beside them.")
        return lon.lon, lon.lat, lon.row_id
    if lat is None:
        raise UserError("Expected longitudes and latitudes, or Places, got no latitudes.")
    x, y = np.asarray(lon, dtype=np.float64), np.asarray(lat, dtype=np.float64)
    ids = np.arange(len(x)) if row_id is None else np.asarray(row_id)
    check_degrees(x, y, [f"row_id {i}" for i in ids] if len(ids) == len(x) else None)
    check_row_id(ids, len(x))
    return x, y, ids


def _row_standardised(matrix: sparse.csr_array) -> sparse.csr_array:
    sums = np.asarray(matrix.sum(axis=1))
    per_link = np.repeat(sums, np.diff(matrix.indptr))
    return sparse.csr_array((matrix.data / per_link, matrix.indices, matrix.indptr), matrix.shape)
