"""Moran's I of many sparse features under shared permutations, exact, with what is removed.

I = (n / S0) e'We / e'e,   e = x - L mu - Q a   (see ``residual``).

Permuted: e* = (I - H) P e. Seen from the places before the permutation (W' = P'WP, Q' = P'Q; L does
not change, since places move within its groups), P'e* = x - L mu - D t with D = [Q, Q'], t = [a; g]
and g = Q''e, hence with M = W' + W'' (its transpose)

2 e*'W e* = x'Mx + mu' L'ML mu + t' D'MD t - 2 x'ML mu - 2 x'MD t + 2 mu' L'MD t,
e*'e* = e'e - g'g.

x'Mx = 2 x'W'x costs the nonzeros of x times the neighbours of a place; every product with D is made
once for all features. Without covariates it is z'Wz = x'Wx - mean (r + c)'x + mean^2 S0, r and c
the row and column sums of W.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from jaxtyping import Float, Int, Int32
from scipy import sparse

from sae_apps.geospatial.moran_links import Table, relabelled_rows, relabelled_table, table_of
from sae_apps.geospatial.parallel import in_threads, threads
from sae_apps.geospatial.permutation import inverse
from sae_apps.geospatial.residual import Projection
from sae_core.kernels.compiled import has_numba

INNER = 4  # permutations for which a feature stays spread out: their tables fit in the cache
Perms = Int32[np.ndarray, "b n"]
Live = Int[np.ndarray, "l"]


@dataclass(frozen=True, eq=False)
class SparseStatistic:
    """I of the columns of ``features`` for any permutations; ``sums`` are e'e."""

    features: sparse.csc_array
    weights: sparse.csr_array
    removed: Projection

    def __call__(self, perms: Perms, live: Live) -> Float[np.ndarray, "l b"]:
        """I of the features ``live`` under each permutation, float64."""
        quadratic = self._about_means(perms, live) + self._mean_squares[live][:, None]
        sums = np.broadcast_to(self.sums[live][:, None], quadratic.shape)
        if self.removed.basis.shape[1]:
            parts = [self._covariates(live, perm) for perm in perms]
            quadratic += np.stack([part[0] for part in parts], axis=1)
            sums = sums - np.stack([part[1] for part in parts], axis=1)
        scale = len(self.removed.groups) / self.weights.sum()
        return scale * np.divide(
            quadratic,
            sums,
            out=np.zeros_like(quadratic),
            where=sums > 1e-12 * self.sums[live][:, None],
        )

    # ---- once for all permutations ----

    @cached_property
    def means(self) -> sparse.csr_array:
        """mu [f, s]."""
        totals = sparse.csr_array(self._rows @ self.removed.indicators())
        return sparse.csr_array(totals @ sparse.diags_array(1 / self.removed.sizes))

    @cached_property
    def slopes(self) -> Float[np.ndarray, "f q"]:
        """a [f, q]."""
        return self._rows @ self.removed.basis

    @cached_property
    def sums(self) -> Float[np.ndarray, "f"]:
        """e'e [f]."""
        squares = self._rows.power(2).sum(axis=1)
        between = self.means.power(2) @ self.removed.sizes
        return squares - between - (self.slopes**2).sum(axis=1)

    @cached_property
    def _both(self) -> sparse.csr_array:
        """W + W'."""
        return sparse.csr_array(self.weights + self.weights.T)

    @cached_property
    def _loads(self) -> sparse.csc_array:
        """(W + W') L [n, s]."""
        return sparse.csc_array(self._both @ self.removed.indicators())

    @cached_property
    def _mean_squares(self) -> Float[np.ndarray, "f"]:
        """mu' L'WL mu."""
        between = sparse.csr_array(self.removed.indicators().T @ self.weights)
        between = sparse.csr_array(between @ self.removed.indicators())
        return np.asarray((sparse.csr_array(self.means @ between) * self.means).sum(axis=1)).ravel()

    @cached_property
    def _lagged_basis(self) -> Float[np.ndarray, "n q"]:
        """(W + W') Q."""
        return self._both @ self.removed.basis

    @cached_property
    def _rows(self) -> sparse.csr_array:
        """x' [f, n] in float64, for products with dense tables."""
        return sparse.csr_array(self.features.T.astype(np.float64))

    @cached_property
    def _table(self) -> Table | None:
        return table_of(self.weights)

    @property
    def _is_one_group(self) -> bool:
        return len(self.removed.sizes) == 1

    # ---- for a block of permutations ----

    def _chunks(self, live: Live) -> list[slice]:
        """Ranges of ``live`` with about equal numbers of nonzeros."""
        cost = np.cumsum(np.diff(self.features.indptr)[live] + 64)
        n = min(len(live), 1 if threads() == 1 else 4 * threads())
        edges = np.searchsorted(cost, np.linspace(0, cost[-1], n + 1)[1:-1]).tolist()
        bounds = sorted({0, *edges, len(live)})
        return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

    def _about_means(self, perms: Perms, live: Live) -> Float[np.ndarray, "l b"]:
        """x'W'x - x'(W' + W'')L mu."""
        if not has_numba():
            return np.stack([self._about_means_scipy(perm, live) for perm in perms], axis=1)
        if self._table is None:
            relabelled = relabelled_rows(self.weights, perms)
        else:
            relabelled = relabelled_table(self._table, perms)
        if self._is_one_group:
            means, loads = self.means.toarray().ravel(), self._loads.toarray().ravel()[perms]
        else:
            means, loads = np.zeros(len(self.sums)), np.zeros(perms.shape)
        out = np.empty((len(live), len(perms)))
        work = partial(self._chunk, perms, live, means, (loads, *relabelled), out)
        in_threads(work, self._chunks(live))
        return out

    def _chunk(
        self,
        perms: Perms,
        live: Live,
        means: Float[np.ndarray, "f"],
        arrays: tuple[np.ndarray, ...],
        out: Float[np.ndarray, "l b"],
        part: slice,
    ) -> None:
        """Some features through the compiled loops, INNER permutations at a time."""
        from sae_apps.geospatial import moran_kernels

        x, here = self.features, live[part]
        matrix = (x.indptr, x.indices, x.data, here)
        loop = moran_kernels.quadratic_csr if self._table is None else moran_kernels.quadratic_table
        work = np.zeros(perms.shape[1] + 1, dtype=x.dtype)
        for start in range(0, len(perms), INNER):
            inner = slice(start, start + INNER)
            found = np.empty((len(here), len(perms[inner])))
            loop(*matrix, means, *(array[inner] for array in arrays), work, found)
            out[part, inner] = found
        if not self._is_one_group:
            mu, groups, found = self.means, self._loads, np.empty((len(here), len(perms)))
            moran_kernels.linear_groups(
                *matrix, mu.indptr, mu.indices, mu.data,
                groups.indptr, groups.indices, groups.data, perms, np.empty(perms.shape[1]), found,
            )  # fmt: skip
            out[part] -= found

    def _about_means_scipy(self, perm: Int32[np.ndarray, "n"], live: Live) -> np.ndarray:
        """Without numba: slower by the cost of making sparse products."""
        x = sparse.csr_array(self.features[:, live].astype(np.float64))
        moved = x[inverse(perm)]
        quadratic = moved.multiply(self.weights @ moved).sum(axis=0)
        products = x.T @ sparse.csr_array(self._loads)[perm]
        return np.ravel(quadratic - self.means[live].multiply(products).sum(axis=1))

    def _products(self, live: Live, table: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "l c"]:
        """x'T."""
        if not has_numba():
            return self._rows[live] @ table
        from sae_apps.geospatial import moran_kernels

        x, out = self.features, np.empty((len(live), table.shape[1]))

        def one(part: slice) -> None:
            matrix = (x.indptr, x.indices, x.data, live[part])
            moran_kernels.linear_table(*matrix, table, out[part])

        in_threads(one, self._chunks(live))
        return out

    def _covariates(
        self, live: Live, perm: Int32[np.ndarray, "n"]
    ) -> tuple[Float[np.ndarray, "l"], Float[np.ndarray, "l"]]:
        """What the covariates add to e*'We*, and g'g, for one permutation."""
        basis, lagged = self.removed.basis, self._lagged_basis
        q = basis.shape[1]
        moved = basis[inverse(perm)]
        lagged_moved = self._both @ moved
        table = np.hstack([lagged_moved, lagged, basis])[perm]
        products = self._products(live, table)
        slopes = self.slopes[live]
        g = products[:, 2 * q :] - slopes @ (basis.T @ basis[perm])
        t = np.hstack([slopes, g])
        cross = moved.T @ lagged
        inner = np.block([[moved.T @ lagged_moved, cross], [cross.T, basis.T @ lagged]])
        groups = np.hstack([self._loads.T @ moved, self._loads.T @ basis])
        terms = 0.5 * (t @ inner) - products[:, : 2 * q] + self.means[live] @ groups
        return (terms * t).sum(axis=1), (g * g).sum(axis=1)
