"""Features as the test of Moran's I reads them: sparse columns, and columns that are dense."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int, Int64
from scipy import sparse

from sae_core.errors import UserError
from sae_core.features import SparseFeatures

DENSE_FROM = 1 / 3  # share of active places from which a column is cheaper, and rounds less, dense


@dataclass(frozen=True, eq=False)
class Columns:
    """Features by column, finite; either form."""

    values: "sparse.csc_array | np.ndarray"
    """[n, f] float32 or float64."""
    row_id: Int64[np.ndarray, "n"] | None
    """Ids of the rows where the input has them."""

    @property
    def shape(self) -> tuple[int, int]:
        """Places and features."""
        return cast("tuple[int, int]", self.values.shape)

    def n_active(self) -> Int[np.ndarray, "f"]:
        """Places with a value other than 0."""
        if isinstance(self.values, np.ndarray):
            return np.count_nonzero(self.values, axis=0)
        return np.diff(self.values.indptr).astype(np.int64)

    def sparse_part(self, index: Int[np.ndarray, "t"]) -> sparse.csc_array:
        """Some columns, sparse, in canonical form."""
        part = self.values[:, index]
        part = sparse.csc_array(part)
        part.sort_indices()
        return part

    def dense_part(self, index: Int[np.ndarray, "t"]) -> Float[np.ndarray, "n t"]:
        """Some columns, dense."""
        part = self.values[:, index]
        return part if isinstance(part, np.ndarray) else part.toarray()


def columns_of(features: Any) -> Columns:
    """Features from SparseFeatures, scipy sparse, or what numpy reads as [n, f] or [n].

    Raises:
        UserError: another shape, no place or no feature, not numbers, or a value that is not
            finite; names its place and feature.
    """
    row_id = None
    if isinstance(features, SparseFeatures):
        row_id, features = features.row_ids, features.acts
    if sparse.issparse(features):
        values = sparse.csc_array(features, dtype=_float(features.dtype))
        if values is features:
            values = values.copy()
        values.sum_duplicates()
        values.eliminate_zeros()
        finite = np.isfinite(values.data)
        if not finite.all():
            at = int(np.flatnonzero(~finite)[0])
            column = int(np.searchsorted(values.indptr, at, side="right") - 1)
            _refuse(values.data[at], int(values.indices[at]), column)
    else:
        values = _dense(features)
    shape = cast("tuple[int, ...]", values.shape)
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"Expected features [places, features], got the shape {shape}.")
    return Columns(values, row_id)


def _dense(features: Any) -> np.ndarray:
    if hasattr(features, "detach"):  # a tensor of torch; bfloat16 has no numpy type
        tensor = features.detach().cpu()
        features = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
    array = np.asarray(features)
    if array.dtype.kind not in "fiub":
        raise UserError(f"Expected features as numbers, got {array.dtype}.")
    array = array.astype(_float(array.dtype), copy=False)
    if array.ndim == 1:
        array = array[:, None]
    finite = np.isfinite(array)
    if not finite.all():
        place = np.argwhere(~finite)[0]
        _refuse(array[tuple(place)], int(place[0]), int(place[-1]))
    return array


def _float(dtype: np.dtype) -> type[np.floating]:
    """float32 holds float16 and float32 exactly; the rest becomes float64."""
    return np.float32 if dtype in (np.float16, np.float32, np.bool_) else np.float64


def _refuse(value: Any, place: int, feature: int) -> None:
    raise UserError(f"Expected finite features, got {value} at place {place}, feature {feature}.")
