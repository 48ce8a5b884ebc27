"""Ridge regression with blocks left out, every penalty at once, in closed form.

With unpenalised intercept, beta = argmin |Y - 1 b - X beta|^2 + alpha |beta|^2. Trained without the
rows S it predicts those rows as

    n <= 2 F:  Y_S - (Q_SS)^-1 (Q Y)_S  with  Q = A - A 1 1'A / (1'A 1),  A = (X X' + alpha I)^-1
    n > 2 F:   from X'X, X'Y and the sums of all rows less those of S

The first is the identity for leaving out part of a kriging system (Dubrule 1983), so that one
inverse serves all S; the second keeps one F x F matrix a block, and solves one system for each S
and penalty. Neither makes sparse features dense. Memory in float64: 5 n^2, or (blocks + 4) F^2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

Matrix = Float[np.ndarray, "n F"] | sparse.csr_array
LeftOut = tuple[tuple[int, ...], int, Float[np.ndarray, "m t"]]


def left_out(
    x: Matrix,
    y: Float[np.ndarray, "n t"],
    rows_of: Sequence[Int[np.ndarray, "m"]],
    sets: Sequence[tuple[int, ...]],
    alphas: Float[np.ndarray, "a"],
) -> Iterator[LeftOut]:
    """Predictions of blocks by fits without them, for every set of blocks and every penalty.

    Args:
        x: features, dense or CSR.
        y: targets.
        rows_of: rows of each block.
        sets: blocks that are left out together.
        alphas: penalties, above 0.
    Yields:
        the set, the position of the penalty, and predictions of the set's rows, block after block.
    """
    n, width = size_of(x)
    form = _dual if n <= 2 * width else _primal
    yield from form(x, y, rows_of, sets, alphas)


def size_of(x: Matrix) -> tuple[int, int]:
    """Rows and columns, with the type that scipy does not declare."""
    return cast("tuple[int, int]", x.shape)


def total_variance(x: Matrix) -> float:
    """sum_ij (x_ij - mean_j)^2: the trace of the centred X'X."""
    if isinstance(x, np.ndarray):
        return float(((x - x.mean(axis=0)) ** 2).sum())
    mean, values = np.asarray(x.mean(axis=0)), np.asarray(x.data)
    return float((values**2).sum() - size_of(x)[0] * (mean**2).sum())


def _dense(product: Any) -> np.ndarray:
    return product if isinstance(product, np.ndarray) else product.toarray()


def _dual(x, y, rows_of, sets, alphas) -> Iterator[LeftOut]:
    from scipy import linalg

    kernel = _dense(x @ x.T)
    # Centring changes nothing beside an intercept, but keeps the digits.
    kernel -= kernel.mean(axis=0)
    kernel -= kernel.mean(axis=1, keepdims=True)
    n = len(kernel)
    for a, alpha in enumerate(alphas):
        shifted = kernel.copy(order="F")
        shifted.flat[:: n + 1] += alpha
        q = _inverse(shifted)
        row = q.sum(axis=0)
        q -= np.outer(row, row / row.sum())
        qy = q @ y
        for blocks in sets:
            rows = np.concatenate([rows_of[block] for block in blocks])
            part = linalg.solve(q[np.ix_(rows, rows)], qy[rows], assume_a="pos", check_finite=False)
            yield blocks, a, y[rows] - part


def _inverse(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Inverse of a positive definite matrix, which is overwritten: a third of the general cost."""
    from scipy import linalg

    factorise, invert = linalg.get_lapack_funcs(("potrf", "potri"), (matrix,))
    lower, failed = factorise(matrix, lower=1, overwrite_a=1)
    assert not failed  # a Gram matrix plus a penalty far above rounding
    lower, failed = invert(lower, lower=1, overwrite_c=1)
    assert not failed
    return lower + np.tril(lower, -1).T


@dataclass(frozen=True, eq=False)
class _Sums:
    """What a fit needs of some rows."""

    n: int
    x: Float[np.ndarray, "F"]
    y: Float[np.ndarray, "t"]
    xx: Float[np.ndarray, "F F"]
    xy: Float[np.ndarray, "F t"]

    def less(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.n - other.n,
            self.x - other.x,
            self.y - other.y,
            self.xx - other.xx,
            self.xy - other.xy,
        )


def _sums(x: Matrix, y: Float[np.ndarray, "n t"]) -> _Sums:
    return _Sums(len(y), np.asarray(x.sum(axis=0)), y.sum(axis=0), _dense(x.T @ x), x.T @ y)


def _primal(x, y, rows_of, sets, alphas) -> Iterator[LeftOut]:
    from scipy import linalg

    if isinstance(x, np.ndarray):
        x = x - x.mean(axis=0)  # nothing changes but the digits that are left
    of_block = [_sums(x[rows], y[rows]) for rows in rows_of]
    everything = _sums(x, y)
    for blocks in sets:
        train = everything
        for block in blocks:
            train = train.less(of_block[block])
        mean_x, mean_y = train.x / train.n, train.y / train.n
        gram = train.xx - train.n * np.outer(mean_x, mean_x)
        right = train.xy - train.n * np.outer(mean_x, mean_y)
        rows = np.concatenate([rows_of[block] for block in blocks])
        for a, alpha in enumerate(alphas):
            shifted = gram.copy()
            shifted.flat[:: len(gram) + 1] += alpha
            beta = linalg.solve(
                shifted, right, assume_a="pos", overwrite_a=True, check_finite=False
            )
            yield blocks, a, mean_y + x[rows] @ beta - mean_x @ beta
