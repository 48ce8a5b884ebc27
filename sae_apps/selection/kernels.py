"""Row sums behind every similarity, by compiled loops (numba) or in torch; chosen once.

s[i, q] = sum over the nonzeros k of row i of min(a[i, k], b[q, k])   or of   a[i, k] * b[q, k],

where a = weights * acts and b is dense. Both forms read the CSR matrix once for a whole block of
vectors b, in blocks of rows, so nothing of size n x d_sae exists. The compiled loops (module
``compiled``, extra ``cpu``) run on the CPU; the torch form runs on any device and is the fallback.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from sae_apps.selection.metrics import Measure
from sae_core.errors import UserError
from sae_core.features import shape_of
from sae_core.kernels.compiled import has_numba

Task = TypeVar("Task")
Result = TypeVar("Result")
WIDTHS = (1, 8, 16, 32)  # vectors of one compiled loop; fewer are padded with zeros
TASK_NONZEROS = 1 << 20  # of one task of a thread: 8 MiB of the matrix, some milliseconds
TORCH_TERMS = {"cpu": 1 << 16, "cuda": 1 << 24}  # terms at once: 16 bytes each, in the L2 cache


class Sums(NamedTuple):
    """Sums of a block of rows with a block of vectors."""

    rows: slice
    """Of the matrix."""
    columns: slice
    """Of the vectors."""
    sums: Float[np.ndarray, "rows columns"]
    """Float64 sums of minima or of products."""
    norms: Float[np.ndarray, "rows"]
    """Float64 sums of the row's own weighted values, or of their squares."""


def threads() -> int:
    """Threads of the compiled loops: those of torch, which follow ``OMP_NUM_THREADS``."""
    return torch.get_num_threads()


def row_sums(
    acts: sparse.csr_array,
    vectors: Float[np.ndarray, "p d_sae"],
    measure: Measure,
    weights: Float[np.ndarray, "d_sae"] | None = None,
    device: str | torch.device | None = None,
) -> Iterator[Sums]:
    """Sums of every row with every vector, block by block, in no order.

    Args:
        acts: canonical CSR, float32, non-negative, finite.
        vectors: float32, already weighted.
        measure: minimum or product.
        weights: factors of the columns of acts, float32; None for none.
        device: of the torch form; None takes the compiled loops where numba is installed.
    Raises:
        UserError: the matrix is not what it should be; names the line.
    """
    check_pointers(acts)
    if device is None and has_numba():
        return _compiled_sums(acts, vectors, measure, weights)
    return _torch_sums(acts, vectors, measure, weights, torch.device(device or "cpu"))


def row_blocks(indptr: Int[np.ndarray, "n_plus_1"], nonzeros: int) -> list[tuple[int, int]]:
    """Consecutive ranges of rows with about so many nonzeros, and at least one row, each."""
    n = len(indptr) - 1
    goals = np.arange(nonzeros, int(indptr[-1]), nonzeros)
    # rows without nonzeros cost little but not nothing, so that a range of them is cut as well
    cuts = {0, n, *np.searchsorted(indptr, goals).tolist(), *range(0, n, nonzeros)}
    edges = sorted(cuts)
    return list(zip(edges[:-1], edges[1:], strict=True))


def table_of(vectors: Float[np.ndarray, "p d_sae"], width: int) -> Float[np.ndarray, "d_sae width"]:
    """Vectors interleaved, padded with zeros to ``width``, aligned to cache lines."""
    p, d_sae = vectors.shape
    room = np.zeros(d_sae * width + 16, dtype=np.float32)
    start = (-room.ctypes.data % 64) // 4
    table = room[start : start + d_sae * width].reshape(d_sae, width)
    table[:, :p] = vectors.T
    return table


def _column_blocks(p: int) -> Iterator[tuple[slice, int]]:
    """Blocks of vectors with the width of their loop."""
    for start in range(0, p, WIDTHS[-1]):
        count = min(WIDTHS[-1], p - start)
        yield slice(start, start + count), next(w for w in WIDTHS if w >= count)


def _compiled_sums(
    acts: sparse.csr_array,
    vectors: Float[np.ndarray, "p d_sae"],
    measure: Measure,
    weights: Float[np.ndarray, "d_sae"] | None,
) -> Iterator[Sums]:
    from sae_apps.selection import compiled
    from sae_apps.selection.jit import MINIMUM, PRODUCT

    code = MINIMUM if measure == "minimum" else PRODUCT
    blocks = row_blocks(acts.indptr, TASK_NONZEROS)
    for columns, width in _column_blocks(len(vectors)):
        table = table_of(vectors[columns], width)
        loop = compiled.one_vector(code) if width == 1 else compiled.several_vectors(code, width)
        yield from in_threads(partial(_block, loop, acts, weights, table, columns), blocks)


def _block(
    loop: Callable[..., int],
    acts: sparse.csr_array,
    weights: Float[np.ndarray, "d_sae"] | None,
    table: Float[np.ndarray, "d_sae width"],
    columns: slice,
    rows: tuple[int, int],
) -> Sums:
    """One task of a thread: a range of rows through a compiled loop."""
    start, stop = rows
    sums, norms = np.empty((stop - start, table.shape[1])), np.empty(stop - start)
    bad = loop(acts.indptr, acts.indices, acts.data, weights, table, start, stop, sums, norms)
    if bad or not np.isfinite(norms).all():
        raise UserError(complaint(acts) or "Expected finite sums of activations, got others.")
    return Sums(slice(start, stop), columns, sums[:, : columns.stop - columns.start], norms)


def in_threads(work: Callable[[Task], Result], tasks: list[Task]) -> Iterator[Result]:
    """Results of the tasks in their order, a few finished ones per thread waiting."""
    n = threads()
    if n == 1 or len(tasks) == 1:
        yield from map(work, tasks)
        return
    with ThreadPoolExecutor(n) as pool:
        for start in range(0, len(tasks), 32 * n):
            yield from pool.map(work, tasks[start : start + 32 * n])


def _torch_sums(
    acts: sparse.csr_array,
    vectors: Float[np.ndarray, "p d_sae"],
    measure: Measure,
    weights: Float[np.ndarray, "d_sae"] | None,
    device: torch.device,
) -> Iterator[Sums]:
    if message := complaint(acts):
        raise UserError(message)
    factors = None if weights is None else torch.from_numpy(weights).to(device)
    for columns, width in _column_blocks(len(vectors)):
        table = torch.from_numpy(np.ascontiguousarray(vectors[columns].T)).to(device)
        terms = TORCH_TERMS["cpu" if device.type == "cpu" else "cuda"] // width
        for start, stop in row_blocks(acts.indptr, max(1, terms)):
            span = slice(int(acts.indptr[start]), int(acts.indptr[stop]))
            counts = torch.from_numpy(np.diff(acts.indptr[start : stop + 1]).astype(np.int64))
            sums, norms = torch_sums(
                counts.to(device),
                torch.from_numpy(acts.indices[span]).to(device),
                torch.from_numpy(acts.data[span]).to(device),
                table, measure, factors,
            )  # fmt: skip
            yield Sums(slice(start, stop), columns, sums.cpu().numpy(), norms.cpu().numpy())


def torch_sums(
    counts: Int[Tensor, "n"],
    indices: Int[Tensor, "nnz"],
    data: Float[Tensor, "nnz"],
    table: Float[Tensor, "d_sae p"],
    measure: Measure,
    weights: Float[Tensor, "d_sae"] | None = None,
) -> tuple[Float[Tensor, "n p"], Float[Tensor, "n"]]:
    """Sums and norms, float64, of one block of rows given as tensors of one device.

    Args:
        counts: nonzeros of each row.
        indices: latent of each nonzero.
        data: value of each nonzero.
        table: the vectors, interleaved.
        measure: minimum or product.
        weights: factors of the latents.
    """
    indices = indices.long()
    if weights is not None:
        data = data * weights[indices]
    value, other = data[:, None], table[indices]
    if measure == "minimum":
        terms, own = torch.minimum(value, other).double(), data.double()
    else:
        terms, own = value.double() * other.double(), data.double().square()
    # segment_reduce adds in the order of the entries on every device; index_add_ does not on CUDA
    sums = torch.segment_reduce(terms, "sum", lengths=counts, axis=0, initial=0)
    norms = torch.segment_reduce(own, "sum", lengths=counts, axis=0, initial=0)
    return sums, norms


def check_pointers(acts: sparse.csr_array) -> None:
    """Row pointers that lead outside the arrays would make a compiled loop read there.

    Raises:
        UserError: acts is not CSR in float32, or its row pointers are broken.
    """
    if not isinstance(acts, sparse.csr_array | sparse.csr_matrix):
        raise UserError(f"Expected activations as scipy csr_array, got {type(acts).__name__}.")
    if acts.dtype != np.float32:
        raise UserError(f"Expected activations in float32, got {acts.dtype}.")
    indptr, entries = acts.indptr, min(len(acts.indices), len(acts.data))
    n_rows = shape_of(acts)[0]
    good = len(indptr) == n_rows + 1 and indptr[0] == 0 and indptr[-1] <= entries
    if not good or (np.diff(indptr) < 0).any():
        raise UserError(
            f"Expected rising row pointers from 0 to {entries} for {n_rows} rows, "
            f"got {len(indptr)} from {indptr[0]} to {indptr[-1]}."
        )


def complaint(acts: sparse.csr_array) -> str | None:
    """What is wrong with the entries of a CSR matrix, in one sentence; None for nothing."""
    d_sae = shape_of(acts)[1]
    end = int(acts.indptr[-1])
    indices, data = acts.indices[:end], acts.data[:end]
    falls = np.zeros(end, dtype=bool)
    falls[1:] = np.diff(indices) <= 0
    starts = acts.indptr[:-1]
    falls[starts[starts < end]] = False  # a row may start anywhere
    for wrong, what, values in (
        ((indices < 0) | (indices >= d_sae), f"latents between 0 and {d_sae - 1}", indices),
        (falls, "latents in ascending order and none twice", indices),
        (~np.isfinite(data), "finite activations", data),
        (data < 0, "activations of at least 0", data),
    ):
        if wrong.any():
            place = np.flatnonzero(wrong)[0]
            line = np.searchsorted(acts.indptr, place, side="right") - 1
            return f"Expected {what}, got {values[place]} in line {line}."
    return None
