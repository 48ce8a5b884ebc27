"""Distances between items: of their codes, of points on the sphere, or given.

    cosine        D(a, b) = 1 - F_a . F_b / (|F_a| |F_b|)
    euclidean     D(a, b) = |F_a - F_b|
    great circle  D(a, b) = 2 R asin sqrt(sin^2(dlat / 2) + cos lat_a cos lat_b sin^2(dlon / 2))

Sparse codes stay sparse: only the n x n products of items are dense.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import sparse

from sae_core.errors import UserError

METRICS = ("cosine", "euclidean")
EARTH_KM = 6371.0088  # mean radius
_SYMMETRY = 1e-8  # of the largest distance: rounding of a product in another order

Codes = sparse.csr_array | Float[np.ndarray, "n p"]


def code_distances(codes: Codes, metric: str = "cosine") -> Float[np.ndarray, "n n"]:
    """Distances of all pairs of rows.

    Args:
        codes: [n, p], sparse or dense.
        metric: cosine or euclidean.
    Raises:
        UserError: unknown metric, values that are not finite; with cosine a row of zeros.
    """
    if metric not in METRICS:
        raise UserError(f"Expected a metric of {METRICS}, got {metric!r}.")
    check_finite(codes)
    rows: Any = codes.astype(np.float64)
    gram = rows @ rows.T
    product = gram.toarray() if sparse.issparse(gram) else np.asarray(gram)
    square = np.diagonal(product).copy()
    if metric == "euclidean":
        found = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * product, 0))
    else:
        if (square == 0).any():
            raise UserError(
                f"Expected codes with an active unit, got {int((square == 0).sum())} rows of zeros."
            )
        norm = np.sqrt(square)
        found = 1 - np.clip(product / norm[:, None] / norm[None], -1, 1)
    found = (found + found.T) / 2
    np.fill_diagonal(found, 0)
    return found


def check_finite(codes: Codes) -> None:
    """Raises:
    UserError: values that are not finite.
    """
    values: Any = codes.data if sparse.issparse(codes) else codes
    if not np.isfinite(values).all():
        raise UserError("Expected finite codes, got others.")


def has_code(codes: Codes) -> Bool[np.ndarray, " n"]:
    """Rows with any value other than zero: the others have no cosine."""
    return np.asarray(abs(codes).sum(axis=1)).ravel() > 0


def great_circle(
    lat: Float[np.ndarray, " n"], lon: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n n"]:
    """Great-circle distances [km] of points in degrees north and east.

    Raises:
        UserError: other numbers of latitudes than of longitudes, or values out of range.
    """
    lat, lon = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    if lat.shape != lon.shape or lat.ndim != 1:
        raise UserError(
            f"Expected as many latitudes as longitudes, got {lat.shape} and {lon.shape}."
        )
    for name, values, limit in (("latitude", lat, 90), ("longitude", lon, 180)):
        wrong = np.flatnonzero(~(np.abs(values) <= limit))
        if len(wrong):
            raise UserError(
                f"Expected a {name} between -{limit} and {limit}, got {values[wrong[0]]}."
            )
    phi, lam = np.radians(lat), np.radians(lon)
    half = np.sin((phi[:, None] - phi) / 2) ** 2
    half += np.cos(phi)[:, None] * np.cos(phi) * np.sin((lam[:, None] - lam) / 2) ** 2
    return 2 * EARTH_KM * np.arcsin(np.sqrt(np.clip(half, 0, 1)))


def check_distances(given: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """A matrix of distances as it is to be used, exactly symmetric with a zero diagonal.

    Raises:
        UserError: not square, not finite, negative, not symmetric, or not 0 on the diagonal.
    """
    given = np.asarray(given, dtype=np.float64)
    if given.ndim != 2 or given.shape[0] != given.shape[1]:
        raise UserError(f"Expected a square matrix of distances, got shape {list(given.shape)}.")
    if not np.isfinite(given).all() or (given < 0).any():
        raise UserError("Expected finite distances of at least 0, got others.")
    scale = _SYMMETRY * max(float(given.max(initial=0)), np.finfo(np.float64).tiny)
    gap = np.abs(given - given.T)
    if gap.max(initial=0) > scale:
        a, b = np.unravel_index(int(gap.argmax()), gap.shape)
        raise UserError(
            f"Expected a symmetric matrix of distances, got {given[a, b]:g} from item {a} to "
            f"{b} and {given[b, a]:g} back."
        )
    if np.abs(np.diagonal(given)).max(initial=0) > scale:
        raise UserError("Expected a distance of 0 from every item to itself, got another.")
    found = (given + given.T) / 2
    np.fill_diagonal(found, 0)
    return found
