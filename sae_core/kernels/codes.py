"""Sparse codes of a batch: the CSR triple that flows from the encoder to the decoder."""

from typing import NamedTuple

import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor


class ByLatent(NamedTuple):
    """The entries of codes in the order of their latents; what the transposed product needs."""

    order: Int[Tensor, "nnz"]
    """Places of the entries, by latent, then by token, [nnz]."""
    starts: Int[Tensor, "d_sae_plus_1"]
    """Where each latent starts in that order, [d_sae + 1]; the differences are firing counts."""


class Codes(NamedTuple):
    """Active latents of n tokens in compressed sparse rows; columns ascend within a row."""

    crow: Int[Tensor, "n_plus_1"]
    """Row starts, int64, [n + 1]."""
    row: Int[Tensor, "nnz"]
    """Token of each entry, int64, [nnz]: crow expanded, because every product needs it."""
    col: Int[Tensor, "nnz"]
    """Latent of each entry, int64, [nnz]."""
    values: Float[Tensor, "nnz"]
    """Activation of each entry, [nnz]; carries the gradient."""
    d_sae: int
    """Number of latents."""
    by_latent: ByLatent | None = None
    """Where it was found once for several products; None: each finds it itself."""

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.crow.shape[0] - 1

    @property
    def density(self) -> float:
        """Share of entries that are active, in [0, 1]."""
        return self.col.shape[0] / max(1, self.n * self.d_sae)

    def grouped(self) -> "Codes":
        """The same codes, which carry their order by latent."""
        return self if self.by_latent else self._replace(by_latent=by_latent(self.col, self.d_sae))

    def with_values(self, values: Float[Tensor, "nnz"]) -> "Codes":
        """The same active set with other values."""
        return self._replace(values=values)

    def keep(self, mask: Tensor) -> "Codes":
        """The entries where mask [nnz] is true."""
        place = mask.nonzero()[:, 0]
        row, col, values = (t.index_select(0, place) for t in (self.row, self.col, self.values))
        return Codes(row_starts(row, self.n), row, col, values, self.d_sae)

    def to_dense(self) -> Float[Tensor, "n d_sae"]:
        """The dense matrix [n, d_sae]."""
        dense = self.values.new_zeros(self.n, self.d_sae)
        return dense.index_put((self.row, self.col), self.values)

    def to_scipy(self) -> scipy.sparse.csr_array:
        """A scipy CSR array [n, d_sae] of float32 on the CPU, without the gradient."""
        data = self.values.detach().float().cpu().numpy()
        return scipy.sparse.csr_array(
            (data, self.col.cpu().numpy(), self.crow.cpu().numpy()), shape=(self.n, self.d_sae)
        )


def by_latent(col: Int[Tensor, "nnz"], d_sae: int) -> ByLatent:
    """Order and starts of the latents of entries."""
    # a narrow type takes fewer passes of the sort
    narrow = col.to(torch.int16 if d_sae < 2**15 else torch.int32)
    return ByLatent(narrow.sort(stable=True).indices, row_starts(col, d_sae))


def row_starts(row: Int[Tensor, "nnz"], n: int) -> Int[Tensor, "n_plus_1"]:
    """Where each of n rows starts, [n + 1], in entries sorted by row."""
    crow = torch.zeros(n + 1, dtype=torch.int64, device=row.device)
    torch.cumsum(torch.bincount(row, minlength=n), 0, out=crow[1:])
    return crow


def codes_where(active: Tensor, values: Float[Tensor, "n d_sae"]) -> Codes:
    """Codes of the entries of a dense matrix where the boolean matrix `active` is true."""
    n, d_sae = active.shape
    row, col = active.nonzero(as_tuple=True)
    return Codes(row_starts(row, n), row, col, values[row, col], d_sae)


def codes_at(col: Int[Tensor, "n k"], values: Float[Tensor, "n k"], d_sae: int) -> Codes:
    """Codes of k chosen latents a token; entries that are not positive are left out."""
    col, order = col.sort(dim=-1)
    values = values.gather(-1, order)
    row, slot = (values > 0).nonzero(as_tuple=True)
    return Codes(row_starts(row, col.shape[0]), row, col[row, slot], values[row, slot], d_sae)
