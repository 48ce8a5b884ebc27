"""The second half of a search with ``Refine(SQ8)``: inner products with 8-bit codes.

FAISS's scalar quantiser keeps y_j as a byte c_j, y_j ~ low_j + width_j (c_j + 1/2) / 255, so that

    q.y ~ sum_j q_j (low_j + width_j / 510) + sum_j (q_j width_j / 255) c_j:

one constant a query and a weighted sum of bytes for each row that the scan has found. FAISS takes
one row after the other and waits for the bytes of each; here four are read at once, so that the
waits overlap, and one sort stands in place of a heap.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from sae_apps.selection import kernels
from sae_core.errors import CorruptFileError
from sae_core.extras import require

_TASK_QUERIES = 16


class Fine(NamedTuple):
    """The 8-bit codes of an index, as a view of FAISS's memory that lives as long as the index."""

    codes: UInt8[np.ndarray, "n dims"]
    low: Float32[np.ndarray, "dims"]
    width: Float32[np.ndarray, "dims"]


def fine_codes(faiss: Any, index: Any) -> tuple[Any, Fine] | None:
    """The scan and the codes of an index ``...,Refine(SQ8)`` for inner products; None of others.

    Raises:
        CorruptFileError: codes for another number of rows than the scan has.
    """
    if not isinstance(index, faiss.Index):
        return None
    outer = faiss.downcast_index(index)
    if not hasattr(outer, "refine_index") or outer.metric_type != faiss.METRIC_INNER_PRODUCT:
        return None
    scan, store = faiss.downcast_index(outer.base_index), faiss.downcast_index(outer.refine_index)
    quantiser = getattr(store, "sq", None)
    if quantiser is None or quantiser.qtype != faiss.ScalarQuantizer.QT_8bit:
        return None
    n, dims = scan.ntotal, store.d
    trained = faiss.vector_to_array(quantiser.trained)
    if store.codes.size() != n * dims or len(trained) != 2 * dims:  # compiled loops trust them
        raise CorruptFileError(
            f"Expected {n} codes of {dims} bytes in the FAISS index, got "
            f"{store.codes.size()} bytes."
        )
    held = faiss.rev_swig_ptr(store.codes.data(), n * dims) if n else np.empty(0, np.uint8)
    return scan, Fine(held.reshape(n, dims), trained[:dims], trained[dims:])


def refined(
    scan: Any, fine: Fine, vectors: Float32[np.ndarray, "q dims"], n: int, oversample: int
) -> tuple[Float32[np.ndarray, "q n"], Int64[np.ndarray, "q n"]]:
    """The best n of ``oversample * n`` rows of the scan, by inner product with their codes.

    Best first; place -1 and the lowest float32 where the scan found fewer.

    Raises:
        CorruptFileError: the scan names a row that is not there.
    """
    require("numba", "cpu")
    from sae_apps.selection.index_loops import code_products

    _, places = scan.search(vectors, min(oversample * n, max(n, scan.ntotal)))
    if places.size and places.max() >= len(fine.codes):
        raise CorruptFileError(
            f"Expected places below {len(fine.codes)} from the FAISS index, got {places.max()}."
        )
    weights = vectors * (fine.width / np.float32(255))
    constants = vectors @ (fine.low + fine.width / np.float32(510))
    products = np.empty(places.shape, np.float32)

    def work(part: slice) -> None:
        code_products(fine.codes, weights[part], constants[part], places[part], products[part])

    starts = range(0, len(places), _TASK_QUERIES)
    for _ in kernels.in_threads(work, [slice(k, k + _TASK_QUERIES) for k in starts]):
        pass
    order = np.argsort(-products, axis=1)[:, :n]
    return np.take_along_axis(products, order, 1), np.take_along_axis(places, order, 1)
