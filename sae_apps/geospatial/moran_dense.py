"""Moran's I of many dense features under shared permutations: raw units, or any device of torch.

With residuals e = (I - H) x [n, f] (see ``residual``) and the permuted places as in
``moran_sparse``, P'e* = e - Q'g with g = Q''e, hence

e*'We* = e'W'e - e'(W' + W'')Q'g + g'Q'WQ g,   e*'e* = e'e - g'g.

e'W'e = sum over pairs i < j of (w_ij + w_ji) e_i e_j: each link once. Places are put in the reverse
Cuthill-McKee order of the links, so that rows of neighbours are near in memory.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from scipy import sparse

from sae_apps.geospatial.parallel import in_threads
from sae_apps.geospatial.permutation import inverse
from sae_apps.geospatial.residual import Projection
from sae_core.kernels.compiled import has_numba

WIDTH = 16  # features of one compiled loop: two cache lines a place
Perms = Int32[np.ndarray, "b n"]
Live = Int[np.ndarray, "l"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Links of the places in an order that keeps neighbours near, each pair once."""

    order: Int[np.ndarray, "n"]
    upper: sparse.csr_array
    """(W + W') above the diagonal, reordered."""


def pairs_of(weights: sparse.csr_array) -> Pairs:
    """The links, reordered."""
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    both = sparse.csr_array(weights + weights.T)
    order = reverse_cuthill_mckee(sparse.csr_matrix(both), symmetric_mode=True)
    upper = sparse.csr_array(sparse.triu(both[order][:, order], k=1))
    upper.sort_indices()
    return Pairs(order, upper)


@dataclass(frozen=True, eq=False)
class DenseStatistic:
    """I of the columns of ``residuals`` (float64, from ``Projection.residual``)."""

    residuals: Float[np.ndarray, "n f"]
    weights: sparse.csr_array
    pairs: Pairs
    removed: Projection
    device: str | None = None

    def __call__(self, perms: Perms, live: Live) -> Float[np.ndarray, "l b"]:
        """I of the features ``live`` under each permutation, float64."""
        quadratic = self._quadratic(perms, live)
        sums = np.broadcast_to(self.sums[live][:, None], quadratic.shape)
        if self.removed.basis.shape[1]:
            parts = [self._covariates(live, perm) for perm in perms]
            quadratic += np.stack([part[0] for part in parts], axis=1)
            sums = sums - np.stack([part[1] for part in parts], axis=1)
        n_by_s0 = len(self.residuals) / self.weights.sum()
        kept = sums > 1e-12 * self.sums[live][:, None]
        return n_by_s0 * np.divide(quadratic, sums, out=np.zeros_like(quadratic), where=kept)

    @cached_property
    def sums(self) -> Float[np.ndarray, "f"]:
        """e'e [f]."""
        return np.einsum("ij,ij->j", self.residuals, self.residuals)

    def _quadratic(self, perms: Perms, live: Live) -> Float[np.ndarray, "l b"]:
        """e'W'e."""
        if self.device is not None or not has_numba():
            return self._quadratic_torch(perms, live)
        out = np.empty((len(live), len(perms)))
        backs = [inverse(perm)[self.pairs.order] for perm in perms]

        def one(start: int) -> None:
            _quadratic_block(self, live[start : start + WIDTH], backs, out[start : start + WIDTH])

        in_threads(one, range(0, len(live), WIDTH))
        return out

    @cached_property
    def _on_device(self) -> tuple[torch.Tensor, torch.Tensor]:
        upper = self.pairs.upper.tocoo()
        at = torch.from_numpy(np.vstack([upper.row, upper.col]).astype(np.int64))
        matrix = torch.sparse_coo_tensor(
            at, torch.from_numpy(upper.data), upper.shape, check_invariants=True
        )
        device = self.device or "cpu"
        return matrix.coalesce().to(device), torch.from_numpy(self.residuals).to(device)

    def _quadratic_torch(self, perms: Perms, live: Live) -> Float[np.ndarray, "l b"]:
        upper, values = self._on_device
        if len(live) < values.shape[1]:
            values = values[:, torch.from_numpy(live).to(values.device)]
        columns = []
        for perm in perms:
            back = torch.from_numpy(inverse(perm)[self.pairs.order].astype(np.int64))
            moved = values[back.to(values.device)]
            columns.append((moved * torch.sparse.mm(upper, moved)).sum(dim=0))
        return torch.stack(columns, dim=1).cpu().numpy()

    @cached_property
    def _lagged_basis(self) -> Float[np.ndarray, "n q"]:
        """(W + W') Q."""
        return (self.weights + self.weights.T) @ self.removed.basis

    def _covariates(
        self, live: Live, perm: Int32[np.ndarray, "n"]
    ) -> tuple[Float[np.ndarray, "l"], Float[np.ndarray, "l"]]:
        """What the covariates add to e*'We*, and g'g, for one permutation."""
        basis, lagged = self.removed.basis, self._lagged_basis
        q = basis.shape[1]
        products = (np.hstack([lagged, basis])[perm].T @ self.residuals)[:, live].T
        g = products[:, q:]
        terms = 0.5 * (g @ (basis.T @ lagged)) - products[:, :q]
        return (terms * g).sum(axis=1), (g * g).sum(axis=1)


def _quadratic_block(
    statistic: DenseStatistic, live: Live, backs: list[Any], out: Float[np.ndarray, "w b"]
) -> None:
    """At most WIDTH features through the compiled loop."""
    from sae_apps.geospatial import moran_kernels

    upper = statistic.pairs.upper
    n = len(statistic.residuals)
    values = np.zeros((n, WIDTH))
    values[:, : len(live)] = statistic.residuals[:, live]
    work, lag, sums = np.empty((n, WIDTH)), np.empty(WIDTH), np.empty(WIDTH)
    for b, back in enumerate(backs):
        moran_kernels.quadratic_dense(
            upper.indptr, upper.indices, upper.data, values, back, work, lag, sums
        )
        out[:, b] = sums[: len(live)]
