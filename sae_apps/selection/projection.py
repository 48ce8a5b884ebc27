"""Dense embeddings of sparse rows whose inner products rank like the generalised Jaccard.

    x(a) = V^T f(a),     f(a) = a^p / |a^p|_2,     p = 3/4

V [d_sae, dims] is linear, so a row costs nnz x dims multiplications, whatever the width. From m
sample rows F = (f(a_1), ..., f(a_m)), with A [m, dims], V = F A:

    kernel   A = (F^T F + r I)^-1 Y, where Y Y^T is the best approximation of rank dims of the
             Jaccard Gram matrix K_ij = J(a_i, a_j): the ridge regression from f onto the kernel
             PCA (Schoelkopf, Smola, Mueller 1998) of J itself, a positive definite kernel
    svd      A = U S^-1, the leading right singular vectors of F^T = U S V^T
    random   V is Gaussian (Johnson and Lindenstrauss 1984)

A random rotation follows, which changes no inner product but spreads the variance evenly over the
dimensions, as the quantisers of FAISS need it. No embedding knows the norm of a row: pools whose
rows differ much in |a|_1 need more candidates, or the codes of ``sketch``.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32
from scipy import sparse

from sae_apps.selection import kernels
from sae_apps.selection.similarity import score
from sae_apps.selection.sketch import check_rows
from sae_core.errors import UserError
from sae_core.extras import require
from sae_core.features import shape_of

Method = Literal["kernel", "svd", "random"]
METHODS = ("kernel", "svd", "random")
POWER = 0.75
_RIDGE = 0.03  # beside a diagonal of ones
_TASK_NONZEROS = 1 << 18
_GRAM_BLOCK = 256


@dataclass(frozen=True, eq=False)
class Projection:
    """A fitted embedding."""

    matrix: Float32[np.ndarray, "d_sae dims"]
    """V with the rotation in it."""
    power: float = POWER
    """p: 1 leaves values as they are, 0.5 takes roots."""

    @property
    def d_sae(self) -> int:
        return len(self.matrix)

    @property
    def dims(self) -> int:
        return self.matrix.shape[1]

    def embed(self, acts: sparse.csr_array) -> Float32[np.ndarray, "n dims"]:
        """x(a) of every row; zeros for an empty one.

        Raises:
            UserError: another width, or not canonical non-negative CSR in float32.
            MissingExtraError: numba is not installed.
        """
        check_rows(acts, self.d_sae)
        require("numba", "cpu")
        from sae_apps.selection.index_loops import project_rows

        blocks = self._blocks
        out = np.empty((shape_of(acts)[0], len(blocks) * blocks.shape[2]), dtype=np.float32)

        def work(rows: tuple[int, int]) -> None:
            start, stop = rows
            span = slice(int(acts.indptr[start]), int(acts.indptr[stop]))
            values = powers(acts.data[span], self.power)
            latents = acts.indices[span].astype(np.uint32)
            project_rows(acts.indptr, latents, values, start, stop, blocks, out[start:stop])

        for _ in kernels.in_threads(work, kernels.row_blocks(acts.indptr, _TASK_NONZEROS)):
            pass
        return np.ascontiguousarray(out[:, : self.dims])

    @cached_property
    def _blocks(self) -> Float32[np.ndarray, "n_blocks d_sae lanes"]:
        """The matrix in blocks of columns, the last one padded with zeros."""
        from sae_apps.selection.index_loops import LANES

        n_blocks = -(-self.dims // LANES)
        padded = np.zeros((self.d_sae, n_blocks * LANES), dtype=np.float32)
        padded[:, : self.dims] = self.matrix
        return np.ascontiguousarray(padded.reshape(self.d_sae, n_blocks, LANES).swapaxes(0, 1))


def powers(values: Float32[np.ndarray, "n"], power: float) -> Float32[np.ndarray, "n"]:
    """values ** power; the powers in use by roots, which are ten times as fast."""
    if power == 0.75:
        return np.sqrt(values * np.sqrt(values))
    if power == 0.5:
        return np.sqrt(values)
    return values if power == 1 else values ** np.float32(power)


def fit_projection(
    sample: sparse.csr_array,
    dims: int,
    method: Method,
    *,
    power: float = POWER,
    generator: np.random.Generator,
) -> Projection:
    """Fit an embedding on sample rows; empty ones are left out.

    Args:
        sample: m rows of the pool, some thousands. Time is O(m^2 nnz + m^3).
        dims: dimensions; at most the number of non-empty sample rows, and d_sae.
        method: one of METHODS.
        power: p of f.
        generator: of the rotation, and of the matrix of ``random``.
    Raises:
        UserError: unknown method, more dims than rows or latents, or a broken matrix.
    """
    d_sae = shape_of(sample)[1]
    check_rows(sample, d_sae)
    if method not in METHODS:
        raise UserError(f"Expected a method of {METHODS}, got {method!r}.")
    if method == "random":
        return Projection(
            generator.standard_normal((d_sae, dims), dtype=np.float32) / np.float32(dims**0.5),
            power,
        )
    sample = sparse.csr_array(sample[np.flatnonzero(np.diff(sample.indptr) > 0)])
    if not 1 <= dims <= min(shape_of(sample)):
        raise UserError(
            f"Expected dims between 1 and {min(shape_of(sample))}, the smaller of the non-empty "
            f"sample rows and the latents, got {dims}."
        )
    root = sparse.csr_array(
        (powers(sample.data, power), sample.indices, sample.indptr), shape=sample.shape
    )
    inner = _gram(root, "cosine")
    factors = _kernel_factors(sample, inner, dims) if method == "kernel" else _svd(inner, dims)
    norms = np.sqrt(np.asarray(root.multiply(root).sum(axis=1))).ravel()
    rotation = np.linalg.qr(generator.standard_normal((dims, dims)))[0]
    matrix = root.T @ ((factors / norms[:, None]) @ rotation)
    return Projection(np.ascontiguousarray(matrix, dtype=np.float32), power)


def _svd(inner: Float[np.ndarray, "m m"], dims: int) -> Float[np.ndarray, "m dims"]:
    values, vectors = _leading(inner, dims)
    return vectors / np.sqrt(values)


def _kernel_factors(
    sample: sparse.csr_array, inner: Float[np.ndarray, "m m"], dims: int
) -> Float[np.ndarray, "m dims"]:
    from scipy import linalg

    values, vectors = _leading(_gram(sample, "jaccard"), dims)
    inner[np.diag_indices_from(inner)] += _RIDGE
    return linalg.cho_solve(linalg.cho_factor(inner), vectors * np.sqrt(values))


def _leading(
    gram: Float[np.ndarray, "m m"], dims: int
) -> tuple[Float[np.ndarray, "dims"], Float[np.ndarray, "m dims"]]:
    """The largest eigenvalues, at least the rounding of the first, and their vectors."""
    from scipy import linalg

    values, vectors = linalg.eigh(gram, subset_by_index=[len(gram) - dims, len(gram) - 1])
    return np.maximum(values, values[-1] * 1e-7), vectors


def _gram(rows: sparse.csr_array, metric: str) -> Float[np.ndarray, "m m"]:
    """Similarity of every pair of rows, symmetric."""
    n = shape_of(rows)[0]
    gram = np.empty((n, n))
    for start in range(0, n, _GRAM_BLOCK):
        block = rows[start : start + _GRAM_BLOCK].toarray()
        gram[:, start : start + _GRAM_BLOCK] = score(rows, block, metric)
    return (gram + gram.T) / 2
