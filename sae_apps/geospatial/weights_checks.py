"""Checks of weights, and the matrix and ids inside weights of other libraries."""

from typing import Any

import numpy as np
from scipy import sparse

from sae_core.errors import UserError
from sae_core.features import shape_of


def check_matrix(matrix: sparse.csr_array) -> None:
    """Refuse what is not a square canonical CSR of finite weights >= 0 off the diagonal.

    Raises:
        UserError: any of that does not hold, or there is no weight at all.
    """
    if not isinstance(matrix, sparse.csr_array) or matrix.dtype != np.float64:
        raise UserError(
            f"Expected weights as csr_array of float64, got {type(matrix).__name__} "
            f"of {getattr(matrix, 'dtype', 'unknown type')}."
        )
    if len(set(shape_of(matrix))) != 1:
        raise UserError(f"Expected a square matrix of weights, got {matrix.shape}.")
    if not matrix.has_canonical_format:
        raise UserError("Expected weights in canonical CSR, got unsorted or double entries.")
    bad = ~(np.isfinite(matrix.data) & (matrix.data > 0))
    if bad.any():
        raise UserError(
            f"Expected weights finite and above 0, got {matrix.data[bad.argmax()]} "
            f"and {int(bad.sum()) - 1} more."
        )
    own = matrix.diagonal()
    if own.any():
        i = int(np.flatnonzero(own)[0])
        raise UserError(
            f"Expected no place as its own neighbour, got the weight {own[i]} of place {i} "
            "with itself."
        )
    if not matrix.nnz:
        raise UserError(
            f"Expected at least one link, got none between {shape_of(matrix)[0]} places."
        )


def check_row_id(row_id: np.ndarray, n: int) -> None:
    """Refuse ids that are not int64, not unique or of another number than n.

    Raises:
        UserError: as above.
    """
    if row_id.ndim != 1 or not np.issubdtype(row_id.dtype, np.integer):
        raise UserError(
            f"Expected row_id as a list of whole numbers, got {row_id.dtype} {row_id.shape}."
        )
    if len(row_id) != n:
        raise UserError(f"Expected {n} row ids, got {len(row_id)}.")
    values, counts = np.unique(row_id, return_counts=True)
    if (counts > 1).any():
        double = values[counts.argmax()]
        raise UserError(f"Expected every row_id once, got {double} {counts.max()} times.")


def foreign_matrix(w: Any) -> tuple[sparse.csr_array, np.ndarray | None, str]:
    """Matrix, ids (None where it has none) and kind of a libpysal Graph or W, or a sparse matrix.

    Stored zeros are dropped: a Graph marks a place without neighbours by a zero on the diagonal.

    Raises:
        UserError: w is of another kind.
    """
    if sparse.issparse(w):
        return _canonical(w), None, "a sparse matrix"
    if hasattr(w, "adjacency") and hasattr(w, "unique_ids"):
        return (*_from_graph(w), f"libpysal Graph, transformation {w.transformation}")
    if hasattr(w, "id_order") and hasattr(w, "sparse"):
        ids = np.array(w.id_order)
        return _canonical(w.sparse), _ids(ids), f"libpysal W, transform {w.get_transform()}"
    raise UserError(
        "Expected SpatialWeights, a libpysal Graph or W, or a scipy sparse matrix, "
        f"got {type(w).__name__}."
    )


def _from_graph(graph: Any) -> tuple[sparse.csr_array, np.ndarray]:
    """By the adjacency: Graph.sparse sorts by label, Graph.unique_ids by appearance."""
    ids = graph.unique_ids
    adjacency = graph.adjacency
    focal = ids.get_indexer(adjacency.index.get_level_values("focal"))
    neighbour = ids.get_indexer(adjacency.index.get_level_values("neighbor"))
    values = adjacency.to_numpy(dtype=np.float64)
    matrix = sparse.coo_array((values, (focal, neighbour)), shape=(len(ids), len(ids)))
    return _canonical(matrix), _ids(ids.to_numpy())


def _canonical(matrix: Any) -> sparse.csr_array:
    out = sparse.csr_array(matrix, dtype=np.float64, copy=True)
    if len(set(shape_of(out))) != 1:
        raise UserError(f"Expected a square matrix of weights, got {out.shape}.")
    out.sum_duplicates()
    out.eliminate_zeros()
    return out


def _ids(ids: np.ndarray) -> np.ndarray:
    return ids.astype(np.int64) if np.issubdtype(ids.dtype, np.integer) else ids
