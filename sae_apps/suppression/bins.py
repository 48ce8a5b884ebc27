"""Bins of values, each unit with its own edges: what every count and every look-up shares."""

from typing import NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from sae_core.errors import UserError
from sae_core.kernels.codes import Codes

Values: TypeAlias = Codes | Tensor | np.ndarray
Array = TypeVar("Array", np.ndarray, Tensor)


class Entries(NamedTuple):
    """Values of a batch of tokens that lie outside the atom, one entry each."""

    row: Int[np.ndarray, "nnz"]
    """Token in the batch."""
    unit: Int[np.ndarray, "nnz"]
    value: Float[np.ndarray, "nnz"]
    n: int
    """Tokens of the batch."""
    n_units: int


def entries(values: Values, has_atom: bool) -> Entries:
    """What is counted: the positive values of one-sided units, every value of two-sided ones.

    Args:
        values: sparse codes, or a dense matrix [n, u] of torch or numpy.
        has_atom: whether values of at most 0 form the atom.

    Raises:
        UserError: a value is not finite, the matrix has no two dimensions, or sparse codes come
            for units of both signs.
    """
    if isinstance(values, Codes):
        if not has_atom:
            raise UserError("Expected a dense matrix for units of both signs, got sparse codes.")
        row, unit = values.row.cpu().numpy(), values.col.cpu().numpy()
        value, n, n_units = values.values, values.n, values.d_sae
    else:
        if values.ndim != 2:
            shape = list(values.shape)
            raise UserError(f"Expected values of shape [tokens, units], got {shape}.")
        (n, n_units), value = values.shape, values
        row = np.repeat(np.arange(n), n_units)
        unit = np.tile(np.arange(n_units), n)
    if isinstance(value, Tensor):
        value = value.detach().float().cpu().numpy()
    value = np.asarray(value, dtype=np.float32).ravel()
    if not np.isfinite(value).all():
        raise UserError(f"Expected finite values, got {value[~np.isfinite(value)][0]}.")
    if has_atom and not (value > 0).all():
        kept = np.flatnonzero(value > 0)
        row, unit, value = row[kept], unit[kept], value[kept]
    return Entries(row, unit, value, n, n_units)


def bin_of(values: Array, unit: Array, edges: Array, has_atom: bool = True) -> Array:
    """Bin of each value: 0 for the atom {a <= 0}, else 1 + the number of edges <= a.

    Bins are closed on the left and open on the right; a value beyond the last edge lies in bin B.
    The binary search is spelled out because every value has the edges of its own unit.

    Args:
        values: [m], of numpy or torch, on the device of the others.
        unit: [m] unit of each value.
        edges: [u, B - 1] ascending within a unit.
        has_atom: without it no value has bin 0.

    Returns:
        int64 [m] between 0 and B.
    """
    last = edges.shape[1]
    flat, below = edges.reshape(-1), unit * 0
    step = 1 << max(0, last.bit_length() - 1)
    while step and last:
        probe = below + step
        inside = probe <= last
        # where the probe lies outside, any edge of the unit is read and its answer is dropped
        edge = flat[unit * last + (probe - 1) * inside]
        below = below + step * (inside & (edge <= values))
        step >>= 1
    found = (below + 1) * (values > 0) if has_atom else below + 1
    return cast("Array", found)


def checked_labels(labels: np.ndarray | Tensor, n: int, c: int) -> Int[np.ndarray, "n"]:
    """Labels as int64 [n] between 0 and c - 1, or a UserError."""
    found = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if found.shape != (n,):
        raise UserError(f"Expected one label for each of {n} tokens, got {list(found.shape)}.")
    if n and not 0 <= found.min() <= found.max() < c:
        wrong = found.min() if found.min() < 0 else found.max()
        raise UserError(f"Expected labels between 0 and {c - 1}, got {wrong}.")
    return found.astype(np.int64)


def check_units(found: int, expected: int) -> None:
    """UserError where values come of another number of units."""
    if found != expected:
        raise UserError(f"Expected values of {expected} units, got {found}.")
