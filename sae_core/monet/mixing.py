"""Sums over pairs (i, j) of halves, weighted by A [n, n] a token, in exact forms.

    rows_i = sum_j A_ij        right(r)_i = sum_j A_ij r_j
    cols_j = sum_i A_ij        left(p)_j  = sum_i A_ij p_i

The weight of expert (i, j) is A_ij = sum_h g_1[h, i] g_2[h, j], each row of the gates summing to 1
(Monet, arXiv 2412.04139). ``Factored`` never forms A: two products with the gates. ``Kept`` is
A times a 0/1 mask, n^2 numbers a token. ``Pairs`` is A at some pairs only, and ``Without`` the
whole less some pairs, for masks that delete few experts. No form scales the weights that are left.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_core.monet.router import Gates

Halves = Float[Tensor, "t n m"]


class Factored(NamedTuple):
    """All experts: A = g_1^T g_2 [t, n, n], never formed."""

    g1: Float[Tensor, "t heads n"]
    g2: Float[Tensor, "t heads n"]

    def rows(self) -> Float[Tensor, "t n"]:
        """sum_h g_1[h], since the rows of g_2 sum to 1."""
        return self.g1.sum(1)

    def cols(self) -> Float[Tensor, "t n"]:
        """sum_h g_2[h], since the rows of g_1 sum to 1."""
        return self.g2.sum(1)

    def left(self, p: Halves) -> Halves:
        """g_2^T (g_1 p)."""
        return self.g2.mT @ (self.g1 @ p)

    def right(self, r: Halves) -> Halves:
        """g_1^T (g_2 r)."""
        return self.g1.mT @ (self.g2 @ r)


class Kept(NamedTuple):
    """The experts of a mask: A [t, n, n] with zeros at those that are deleted."""

    weights: Float[Tensor, "t n n"]

    @classmethod
    def of(cls, gates: Gates, keep: Bool[Tensor, "n n"]) -> "Kept":
        """From the gates [t, heads, n] and the mask."""
        return cls((gates[0].mT @ gates[1]) * keep)

    def rows(self) -> Float[Tensor, "t n"]:
        """Row sums of what is kept."""
        return self.weights.sum(2)

    def cols(self) -> Float[Tensor, "t n"]:
        """Column sums of what is kept."""
        return self.weights.sum(1)

    def left(self, p: Halves) -> Halves:
        """A^T p."""
        return self.weights.mT @ p

    def right(self, r: Halves) -> Halves:
        """A r."""
        return self.weights @ r


class Pairs(NamedTuple):
    """E experts only: their halves and their weights."""

    i: Int[Tensor, "e"]
    j: Int[Tensor, "e"]
    weights: Float[Tensor, "t e"]
    n: int

    @classmethod
    def of(cls, gates: Gates, experts: Int[Tensor, "e"]) -> "Pairs":
        """From the gates [t, heads, n] and the numbers i * n + j of the experts."""
        n = gates[0].shape[-1]
        i, j = experts // n, experts % n
        weights = gates[0].new_zeros(gates[0].shape[0], len(experts))
        for h in range(gates[0].shape[1]):  # head by head: [t, e] and never [t, heads, e]
            first, second = (g[:, h].index_select(1, k) for g, k in zip(gates, (i, j), strict=True))
            weights = weights + first * second
        return cls(i, j, weights, n)

    def rows(self) -> Float[Tensor, "t n"]:
        """Weights added up by first half."""
        return self.weights.new_zeros(len(self.weights), self.n).index_add(1, self.i, self.weights)

    def cols(self) -> Float[Tensor, "t n"]:
        """Weights added up by second half."""
        return self.weights.new_zeros(len(self.weights), self.n).index_add(1, self.j, self.weights)

    def left(self, p: Halves) -> Halves:
        """Gather first halves, weight them, add them up by second half."""
        return self._moved(p, self.i, self.j)

    def right(self, r: Halves) -> Halves:
        """Gather second halves, weight them, add them up by first half."""
        return self._moved(r, self.j, self.i)

    def _moved(self, values: Halves, source: Tensor, target: Tensor) -> Halves:
        weighted = values.index_select(1, source) * self.weights[..., None]
        return torch.zeros_like(values).index_add(1, target, weighted)


class Without(NamedTuple):
    """All experts but a few."""

    whole: Factored
    few: Pairs

    def rows(self) -> Float[Tensor, "t n"]:
        """Of the whole less those of the few."""
        return self.whole.rows() - self.few.rows()

    def cols(self) -> Float[Tensor, "t n"]:
        """Of the whole less those of the few."""
        return self.whole.cols() - self.few.cols()

    def left(self, p: Halves) -> Halves:
        """Of the whole less that of the few."""
        return self.whole.left(p) - self.few.left(p)

    def right(self, r: Halves) -> Halves:
        """Of the whole less that of the few."""
        return self.whole.right(r) - self.few.right(r)


Mixing = Factored | Kept | Pairs | Without
