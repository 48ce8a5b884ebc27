"""How well features tell where a place is: a ridge probe of its point on the sphere.

The targets are the three coordinates of the unit vector u, so that nothing breaks at the
antimeridian or at a pole; a prediction is read as the direction of its vector. Blocks of places are
left out in turn, and the penalty for each is chosen by leaving out the others in turn, so that no
place helps to predict itself or its neighbours. Neighbours resemble each other in name and place:
with ``blocks="random"`` the same probe looks better than it is (Roberts et al. 2017, "Cross-
validation strategies for data with temporal, spatial, hierarchical, or phylogenetic structure").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from sae_apps.geospatial.places import Places
from sae_apps.geospatial.ridge import Matrix, left_out, size_of, total_variance
from sae_apps.geospatial.sphere import angle_km, check_degrees, lon_lat, unit_vectors
from sae_core.errors import UserError
from sae_core.features import SparseFeatures

ALPHAS = tuple(float(f"{alpha:.3g}") for alpha in 10 ** np.arange(-7, 1.01, 0.5))
"""Penalties as shares of the features' total variance: from almost none to all but the mean."""
RANDOM = "random"
_STEPS, _NEAR = 200, 1e-12  # of Weiszfeld's iteration: the most steps, and what counts as still
_STARTS: Any = 10  # of k-means; scikit-learn's annotation knows only "auto"


@dataclass(frozen=True, eq=False)
class CoordinateProbe:
    """Where a linear probe puts the places, each predicted by a fit without its block."""

    median_km: float
    """Median great-circle distance between a place and its prediction."""
    chance_km: float
    """The same for the one point nearest to all other blocks' places (their spherical median)."""
    r2_lat: float
    """1 - sum of squared northward errors / the same of the mean direction of all other blocks,
    which is the prediction without features; below 0 is worse than that. An error is the arc from
    the place to its prediction, split into north and east at the place."""
    r2_lon: float
    """The same eastward."""
    predictions: Float[np.ndarray, "n 2"]
    """Longitude and latitude in degrees."""
    error_km: Float[np.ndarray, "n"]
    """Great-circle distance between each place and its prediction."""
    block: Int[np.ndarray, "n"]
    """Which block each place was left out with."""
    alpha: Float[np.ndarray, "n_blocks"]
    """The penalty chosen for each block, as a share of the features' total variance."""
    how: dict[str, Any]
    """n, n_features, n_blocks, how the blocks were made, the penalties tried, seed."""


def probe_coordinates(
    features: SparseFeatures | sparse.sparray | Float[np.ndarray, "n F"],
    places: Places | tuple[Any, Any],
    *,
    blocks: Sequence[Any] | np.ndarray | str | None = None,
    n_blocks: int = 10,
    alphas: Sequence[float] = ALPHAS,
    seed: int = 0,
) -> CoordinateProbe:
    """Predict longitude and latitude from features by ridge regression, blocks left out.

    Args:
        features: [n, F] dense or sparse, or SparseFeatures, which are joined on row_id.
        places: Places, or longitudes and latitudes in degrees.
        blocks: None for blocks that lie together (k-means of the unit vectors); a label for every
            place, of which none is split (more than ``n_blocks`` are dealt out, the largest first,
            each to the smallest block); ``"random"`` to show how much random folds leak.
        n_blocks: blocks, at least 3. The work grows with its square where n > 2 F.
        alphas: penalties as shares of the total variance of the features, sum (x - mean)^2.
        seed: of k-means and of the random folds.
    Raises:
        UserError: sizes or ids do not match, a value is not finite, no feature varies, there are
            fewer than 3 blocks, or a penalty is not above 0.
    """
    x, lon, lat = _inputs(features, places)
    u = unit_vectors(lon, lat)
    block, made = _blocks(blocks, u, n_blocks, seed)
    rows_of = [np.flatnonzero(block == b) for b in range(block.max() + 1)]
    shares = np.sort(np.asarray(alphas, dtype=np.float64))[::-1]  # of equals the strongest
    if not shares.size or not (np.isfinite(shares) & (shares > 0)).all():
        raise UserError(f"Expected penalties above 0, got {list(alphas)}.")
    variance = total_variance(x)
    if not variance > 0:
        raise UserError(f"Expected features that vary, got none among {size_of(x)[1]}.")
    predicted, chosen = nested(x, u, rows_of, shares * variance)
    predicted = directions(predicted)
    chance, mean = np.empty_like(u), np.empty_like(u)
    for b, rows in enumerate(rows_of):
        others = u[block != b]
        chance[rows], mean[rows] = spherical_median(others), others.mean(axis=0)
    error, from_mean = (north_east_km(u, v) for v in (predicted, directions(mean)))
    r2 = 1 - (error**2).sum(axis=0) / (from_mean**2).sum(axis=0)
    km = angle_km(u, predicted)
    return CoordinateProbe(
        median_km=float(np.median(km)),
        chance_km=float(np.median(angle_km(u, chance))),
        r2_lat=float(r2[0]),
        r2_lon=float(r2[1]),
        predictions=np.stack(lon_lat(predicted), axis=1),
        error_km=km,
        block=block,
        alpha=shares[chosen],
        how={
            "n": len(u),
            "n_features": size_of(x)[1],
            "n_blocks": len(rows_of),
            "blocks": made,
            "alphas": shares[::-1].tolist(),
            "seed": seed,
        },
    )


def nested(
    x: Matrix, u: Float[np.ndarray, "n t"], rows_of: list[np.ndarray], alphas: np.ndarray
) -> tuple[Float[np.ndarray, "n t"], Int[np.ndarray, "n_blocks"]]:
    """Targets predicted without each block, and the penalty the other blocks chose for it.

    Args:
        x: features.
        u: targets.
        rows_of: rows of each block, at least 3 blocks.
        alphas: penalties, above 0.
    Returns:
        predictions, and the position of each block's penalty: the one with the least squared error
        on the other blocks, each left out together with it in turn.
    """
    count = len(rows_of)
    # inner[b, a]: squared errors on the blocks other than b, each left out together with b
    inner = np.zeros((count, len(alphas)))
    outer = np.empty((len(alphas), *u.shape))
    sets = [*((b,) for b in range(count)), *combinations(range(count), 2)]
    for blocks, a, predicted in left_out(x, u, rows_of, sets, alphas):
        if len(blocks) == 1:
            outer[a, rows_of[blocks[0]]] = predicted
            continue
        first, second = blocks
        n_first = len(rows_of[first])
        inner[second, a] += ((predicted[:n_first] - u[rows_of[first]]) ** 2).sum()
        inner[first, a] += ((predicted[n_first:] - u[rows_of[second]]) ** 2).sum()
    chosen = inner.argmin(axis=1)
    best = np.empty_like(u)
    for b, rows in enumerate(rows_of):
        best[rows] = outer[chosen[b], rows]
    return best, chosen


def spherical_median(u: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "3"]:
    """The point whose chords to the points have the smallest sum, by Weiszfeld's iteration.

    Every step is brought back to the sphere. For points that lie evenly about the sphere there is
    no single such point, and some point is returned.
    """
    centre = u.mean(axis=0)
    if np.linalg.norm(centre) < _NEAR:
        return u[0]
    centre /= np.linalg.norm(centre)
    new = centre
    for _ in range(_STEPS):
        weight = 1 / np.maximum(np.linalg.norm(u - centre, axis=1), _NEAR)
        new = weight @ u
        new /= np.linalg.norm(new)
        if np.linalg.norm(new - centre) < _NEAR:
            break
        centre = new
    return new


def north_east_km(
    u: Float[np.ndarray, "n 3"], v: Float[np.ndarray, "n 3"]
) -> Float[np.ndarray, "n 2"]:
    """The arc from u to v in km, split into its northward and eastward part at u."""
    lon, lat = np.radians(lon_lat(u))
    north = np.stack([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)], axis=1)
    east = np.stack([-np.sin(lon), np.cos(lon), np.zeros_like(lon)], axis=1)
    parts = np.stack([(v * north).sum(axis=1), (v * east).sum(axis=1)], axis=1)
    return angle_km(u, v)[:, None] * directions(parts)


def directions(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """The vectors at length 1; those of length 0 stay."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def _inputs(features: Any, places: Any) -> tuple[Matrix, np.ndarray, np.ndarray]:
    if isinstance(places, Places):
        lon, lat = places.lon, places.lat
    else:
        lon, lat = (np.asarray(values, dtype=np.float64) for values in places)
        check_degrees(lon, lat)
    if isinstance(features, SparseFeatures):
        x = features.acts
        if isinstance(places, Places):
            x = x[features.row_index(places.row_id)]
    else:
        x = features
    if sparse.issparse(x):
        x = sparse.csr_array(x, dtype=np.float64)
        values = x.data
    else:
        x = values = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or size_of(x)[0] != len(lon):
        raise UserError(f"Expected features of {len(lon)} places, got the shape {x.shape}.")
    if not np.isfinite(values).all():
        raise UserError("Expected finite features, got NaN or infinity.")
    return x, lon, lat


def _blocks(
    blocks: Any, u: Float[np.ndarray, "n 3"], n_blocks: int, seed: int
) -> tuple[Int[np.ndarray, "n"], str]:
    """Block of each place from 0, none empty, and how they were made."""
    n = len(u)
    if not 3 <= n_blocks <= n:
        raise UserError(f"Expected between 3 and {n} blocks for {n} places, got {n_blocks}.")
    if blocks is None:
        from sklearn.cluster import KMeans

        labels = KMeans(n_blocks, n_init=_STARTS, random_state=seed).fit_predict(u)
        made = f"{n_blocks} blocks of places that lie together, by k-means"
    elif isinstance(blocks, str):
        if blocks != RANDOM:
            raise UserError(f"Expected blocks as labels, None or {RANDOM!r}, got {blocks!r}.")
        labels = np.random.default_rng(seed).permutation(n) % n_blocks
        made = f"{n_blocks} random folds, in which neighbours leak"
    else:
        listed = blocks.tolist() if isinstance(blocks, np.ndarray) else list(blocks)
        if len(listed) != n or None in listed:
            raise UserError(f"Expected a block for each of {n} places, got {len(listed)} or None.")
        labels, n_labels = _dealt(listed, n_blocks)
        made = f"{n_labels} labels in {len(set(labels.tolist()))} blocks"
    _, block = np.unique(labels, return_inverse=True)
    if block.max() < 2:
        raise UserError(f"Expected at least 3 blocks, got {block.max() + 1}.")
    return block.reshape(-1), made


def _dealt(labels: list[Any], n_blocks: int) -> tuple[Int[np.ndarray, "n"], int]:
    """Labels whole into blocks of like size: the largest first, each to the smallest so far."""
    order = list(dict.fromkeys(labels))
    counts = {label: 0 for label in order}
    for label in labels:
        counts[label] += 1
    size = [0] * min(n_blocks, len(order))
    home = {}
    for label in sorted(order, key=lambda label: -counts[label]):
        home[label] = size.index(min(size))
        size[home[label]] += counts[label]
    return np.array([home[label] for label in labels]), len(order)
