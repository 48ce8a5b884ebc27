"""What is removed from every feature before Moran's I: means, covariates, means of strata.

e = (I - H) x,   H the projection on the indicators L of the groups and the covariates C.

With one group, L is the constant and e is x - mean, regressed on C. Q is an orthonormal basis of
the covariates' part that is orthogonal to L, so that e = x - L mu - Q a with mu the group means and
a = Q'x.

Permutation after regression: D. Freedman, D. Lane, A nonstochastic interpretation of reported
significance levels, J. Business & Economic Statistics 1 (1983); A. M. Winkler et al., Permutation
inference for the general linear model, NeuroImage 92 (2014), section 2.3.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer
from scipy import sparse

from sae_core.errors import UserError

RANK = 1e-9  # a covariate whose part beyond the others is smaller than this share adds nothing


@dataclass(frozen=True, eq=False)
class Projection:
    """The space that is removed."""

    groups: Int[np.ndarray, "n"]
    """Group of each place whose mean is removed."""
    sizes: Int[np.ndarray, "s"]
    """Places of each group."""
    basis: Float[np.ndarray, "n q"]
    """Q: orthonormal columns, orthogonal to the indicators of the groups."""

    @property
    def rank(self) -> int:
        """Dimensions that are removed."""
        return len(self.sizes) + self.basis.shape[1]

    def indicators(self) -> sparse.csr_array:
        """L [n, s]: one 1 a place."""
        n = len(self.groups)
        parts = (np.ones(n), self.groups.astype(np.int64), np.arange(n + 1))
        return sparse.csr_array(parts, (n, len(self.sizes)))

    def residual(self, values: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n f"]:
        """e = x - L mu - Q Q'x, float64. Twice, since the first pass leaves rounding of |x|."""
        values = np.asarray(values, dtype=np.float64)
        for _ in range(2):
            values = self._centred(values)
            if self.basis.shape[1]:
                values -= self.basis @ (self.basis.T @ values)
        return values

    def _centred(self, values: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n f"]:
        if len(self.sizes) == 1:
            return values - values.mean(axis=0)
        indicators = self.indicators()
        means = (indicators.T @ values) / self.sizes[:, None]
        return values - means[self.groups]


def projection(
    groups: Integer[np.ndarray, "n"] | None, covariates: Float[np.ndarray, "n c"] | None, n: int
) -> Projection:
    """The projection on group means (None: on the mean) and covariates.

    Covariates that the groups and the other covariates explain are dropped.
    """
    codes = np.zeros(n, dtype=np.int64) if groups is None else groups.astype(np.int64)
    means = Projection(codes, np.bincount(codes), np.zeros((n, 0)))
    if covariates is None:
        return means
    centred = means.residual(covariates)
    before = np.linalg.norm(covariates, axis=0)
    after = np.linalg.norm(centred, axis=0)
    centred = centred[:, after > RANK * before] / after[after > RANK * before]
    left, strength, _ = np.linalg.svd(centred, full_matrices=False)
    basis = left[:, strength > RANK * max(1.0, strength.max(initial=0.0))]
    return Projection(codes, means.sizes, np.ascontiguousarray(basis))


def covariate_table(covariates: Any, n: int) -> tuple[Float[np.ndarray, "n c"] | None, list[str]]:
    """Covariates as columns with their names, from an array, a mapping or a table.

    Raises:
        UserError: a length differs from n, or a value is not a finite number; names the column.
    """
    if covariates is None:
        return None, []
    names, columns = _columns(covariates)
    table = np.empty((n, len(columns)))
    for i, (name, column) in enumerate(zip(names, columns, strict=True)):
        try:
            values = np.asarray(column, dtype=np.float64)
        except (TypeError, ValueError):
            raise UserError(f"Expected numbers in the covariate {name}, got others.") from None
        if values.shape != (n,):
            raise UserError(
                f"Expected the covariate {name} for {n} places, got the shape {values.shape}."
            )
        if not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values))[0])
            raise UserError(
                f"Expected finite values of the covariate {name}, got {values[place]} "
                f"for place {place}."
            )
        table[:, i] = values
    return table, names


def _columns(covariates: Any) -> tuple[list[str], list[Any]]:
    if hasattr(covariates, "column_names"):  # pyarrow
        names = list(covariates.column_names)
        return names, [covariates[name].to_numpy() for name in names]
    if hasattr(covariates, "items") and not hasattr(covariates, "to_frame"):  # mapping, DataFrame
        pairs = list(covariates.items())
        return [str(name) for name, _ in pairs], [np.asarray(column) for _, column in pairs]
    array = np.asarray(covariates)
    if array.ndim not in (1, 2):
        raise UserError(f"Expected covariates [n] or [n, c], got {array.ndim} dimensions.")
    columns = list(array.T) if array.ndim == 2 else [array]
    return [f"covariate {i}" for i in range(len(columns))], columns
