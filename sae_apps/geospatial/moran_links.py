"""Weights as compiled loops read them, and their relabelling by permutations."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int32
from scipy import sparse

from sae_apps.geospatial.parallel import in_threads
from sae_apps.geospatial.permutation import inverse

PADDING = 1.5  # a table of neighbours may hold so many entries for each link
Perms = Int32[np.ndarray, "b n"]


@dataclass(frozen=True, eq=False)
class Table:
    """Weights as a table of neighbours, one factor a row."""

    neighbours: np.ndarray
    """[n, k] unsigned, of 16 bits where n fits; rows are filled up with n."""
    factors: Float[np.ndarray, "n"]
    """The weight of every link of a row."""


def table_of(weights: sparse.csr_array) -> Table | None:
    """The table form, where each row has one weight and the rows are of about one length."""
    n = len(weights.indptr) - 1
    counts = np.diff(weights.indptr)
    width = int(counts.max(initial=0))
    if width == 0 or n * width > PADDING * weights.nnz:
        return None
    starts = weights.indptr[:-1][counts > 0]
    factors = np.zeros(n)
    factors[counts > 0] = weights.data[starts]
    if (weights.data != np.repeat(factors, counts)).any():
        return None
    table = np.full((n, width), n, dtype=np.uint16 if n < 1 << 16 else np.uint32)
    place = np.arange(weights.nnz) - np.repeat(weights.indptr[:-1], counts)
    table[np.repeat(np.arange(n), counts), place] = weights.indices
    return Table(table, factors)


def relabelled_table(table: Table, perms: Perms) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours [b, n, k] and factors [b, n] under each permutation."""
    from sae_apps.geospatial import moran_kernels

    out = np.empty((len(perms), *table.neighbours.shape), dtype=table.neighbours.dtype)

    def one(b: int) -> None:
        back = np.append(inverse(perms[b]), len(perms[b])).astype(out.dtype)
        moran_kernels.relabel_table(table.neighbours, perms[b], back, out[b])

    in_threads(one, range(len(perms)))
    return out, table.factors[perms]


def relabelled_rows(
    weights: sparse.csr_array, perms: Perms
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR weights under each permutation: indptr [b, n + 1], indices and data [b, links]."""
    from sae_apps.geospatial import moran_kernels

    b, n_links = len(perms), weights.nnz
    rows = np.empty((b, len(weights.indptr)), dtype=np.uint32)
    columns, values = np.empty((b, n_links), dtype=np.uint32), np.empty((b, n_links))
    matrix = (weights.indptr, weights.indices, weights.data)

    def one(i: int) -> None:
        back = inverse(perms[i])
        moran_kernels.relabel_csr(*matrix, perms[i], back, rows[i], columns[i], values[i])

    in_threads(one, range(b))
    return rows, columns, values
