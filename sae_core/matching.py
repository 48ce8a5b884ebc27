"""One-to-one matching of two dictionaries and its mean cosine, PW-MCC, in bounded memory.

PW-MCC(A, B) = max over one-to-one matchings s of  mean_i cos(a_i, b_s(i))      (arXiv 2505.20254)

It is a linear assignment problem. A small one is solved exactly (SciPy's Hungarian method on the
full matrix). A large one keeps, for every row and every column, the pairs with the largest cosine,
and solves that sparse problem exactly (LAPJVsp). Whether a pair outside it would have helped is
then read from linear programming duality: prices p_j >= 0 of the columns bound every matching,

    sum_i cos(a_i, b_s(i))  <=  sum_i max_j (cos(a_i, b_j) - p_j) + sum_j p_j,

and the maximum is taken over all pairs, block by block. The prices of the sparse optimum make this
an equality for the pairs kept, so the gap between the two sides is the possible loss; where it is
too large the pairs that violate the prices join the problem (column generation).

Cosines are signed: a latent is one-sided, and its negative is another feature. The code behind the
paper's language-model results (xiangchensong/sae-feature-consistency at 32da471, `MCC`) is signed
as well; it takes equal sizes only and counts dead latents. Here the mean is over min(n, m) pairs,
and `agreement` leaves dead latents out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from sae_core.cosines import CHUNK, as_pair, cosine_blocks, paired_cosine
from sae_core.errors import UserError

EXACT_PAIRS = 36_000_000  # 6,000 x 6,000; 20 bytes a pair (float32 and SciPy's copies): 0.7 GiB
_ALONE = -1.01  # worth less than any partner
_PRICE_ROUNDS = 3000  # bounds the time; stopping early costs tightness of the gap, not validity
_PRICE_STEP = 1e-12  # below the rounding of the cosines


@dataclass(frozen=True)
class Matching:
    """A one-to-one matching of the rows of a [n, d] with rows of b [m, d]."""

    mean: float
    """Mean signed cosine of the min(n, m) matched pairs: PW-MCC."""
    index: Int64[Tensor, "n"]
    """Row of b for each row of a; -1 where a has more rows than b and this one is left over."""
    cosine: Float[Tensor, "n"]
    """Cosine of each pair; 0 for a row left over, which `mean` does not count."""
    gap: float
    """The best possible mean is at most mean + gap. 0 when solved exactly; else a bound over all
    pairs, up to the rounding of the cosines."""


def pw_mcc(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m _"],
    *,
    exact_pairs: int = EXACT_PAIRS,
    n_candidates: int = 32,
    tolerance: float = 1e-4,
    max_solves: int = 8,
    chunk: int = CHUNK,
) -> Matching:
    """The best one-to-one matching of two dictionaries' rows and its mean signed cosine.

    Args:
        a, b: [n, d] and [m, d]; rows need not be unit. Zero rows have cosine 0 with everything but
            are matched and counted: leave dead latents out beforehand.
        exact_pairs: up to this n * m the full matrix is built and solved exactly; above, memory is
            O(chunk^2 + (n + m) * n_candidates) beside the dictionaries and `Matching.gap` says how
            far from the optimum the mean can be.
        n_candidates: pairs kept for each row and each column at a time.
        tolerance: a gap of this size ends the search.
        max_solves: sparse problems solved at most. Each costs one pass over all pairs, and one more
            pass picks the first candidates.
        chunk: rows of a block.
    Raises:
        UserError: as `as_pair`, or a number below 1.
    """
    a, b = as_pair(a, b)
    if min(n_candidates, max_solves) < 1:
        raise UserError(
            "Expected n_candidates and max_solves of at least 1, "
            f"got {n_candidates} and {max_solves}."
        )
    if len(a) > len(b):
        index, gap = _match(b, a, exact_pairs, n_candidates, tolerance, max_solves, chunk)
        inverse = torch.full((len(a),), -1, dtype=torch.int64, device=a.device)
        inverse[index] = torch.arange(len(b), device=a.device)
        index = inverse
    else:
        index, gap = _match(a, b, exact_pairs, n_candidates, tolerance, max_solves, chunk)
    cosine = torch.where(index >= 0, paired_cosine(a, b, index.clamp_min(0), chunk), 0.0)
    mean = float(cosine.double().sum()) / min(len(a), len(b))
    return Matching(mean, index, cosine.to(a.dtype), gap)


def _match(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    exact_pairs: int,
    n_candidates: int,
    tolerance: float,
    max_solves: int,
    chunk: int,
) -> tuple[Int64[Tensor, "n"], float]:
    """(row of b for each row of a, certified gap of the mean) for n <= m."""
    n, m = len(a), len(b)
    if n * m <= exact_pairs:
        from scipy.optimize import linear_sum_assignment

        cosine = torch.cat([torch.cat(row, dim=1) for row in _rows_of_blocks(a, b, chunk)])
        _, index = linear_sum_assignment(cosine.cpu().numpy(), maximize=True)
        return torch.from_numpy(index).to(a.device, torch.int64), 0.0
    empty = torch.empty(0, dtype=torch.int64)
    edges = _edges(m, [(empty, empty, empty.double())])
    utility, price = np.zeros(n), np.zeros(m)
    best, bound, index = -np.inf, np.inf, np.zeros(n, dtype=np.int64)
    for solve in range(max_solves + 1):
        found, allowed = _scan(a, b, utility, price, n_candidates, chunk)
        bound = min(bound, allowed)
        if solve == max_solves or bound - best <= tolerance * n:
            break
        edges = _edges(m, [edges, *found])
        chosen, value = _solve_sparse(edges, n, m)
        utility, price = _duals(edges, chosen, value, m)
        full = _completed(chosen, m)
        cosine = paired_cosine(a, b, torch.from_numpy(full).to(a.device), chunk).cpu().numpy()
        if (total := float(cosine.sum())) > best:
            best, index = total, full
        new = chosen < 0
        edges = _edges(m, [edges, (np.flatnonzero(new), full[new], cosine[new])])
    return torch.from_numpy(index).to(a.device), max(bound - best, 0.0) / n


def _completed(chosen: NDArray[np.int64], m: int) -> NDArray[np.int64]:
    """The matching with a free column, whichever, for each row that has none (-1)."""
    free = np.setdiff1d(np.arange(m), chosen)
    full = chosen.copy()
    full[chosen < 0] = free[: int((chosen < 0).sum())]
    return full


def _rows_of_blocks(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], chunk: int
) -> Iterator[list[Tensor]]:
    row: list[Tensor] = []
    for _, left, block in cosine_blocks(a, b, chunk):
        row.append(block)
        if left + chunk >= len(b):
            yield row
            row = []


class _Edges(NamedTuple):
    """Pairs that may be matched: each once, sorted by row, then column."""

    row: NDArray[np.int64]
    col: NDArray[np.int64]
    cosine: NDArray[np.float64]


def _edges(m: int, parts: Sequence[tuple[Any, Any, Any]]) -> _Edges:
    """All parts (row, col, cosine), arrays or tensors, as one set of pairs."""
    row, col, cosine = (
        np.concatenate([torch.as_tensor(part[k]).cpu().numpy().ravel() for part in parts])
        for k in range(3)
    )
    _, first = np.unique(row * m + col, return_index=True)
    return _Edges(row[first], col[first], cosine[first].astype(np.float64))


def _scan(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    utility: NDArray[np.float64],
    price: NDArray[np.float64],
    n_candidates: int,
    chunk: int,
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], float]:
    """One pass over all pairs: the candidates and the bound that the duals give.

    Returns:
        The n_candidates pairs (row, col, cosine) with the largest cosine - price of every row and
        with the largest cosine - utility of every column; no matching's sum of cosines exceeds
        sum_i max_j (cosine - price) + sum_j price.
    """
    u, p = (torch.from_numpy(x).to(a) for x in (utility, price))
    of_row: list[Any] = [None] * ceil(len(a) / chunk)
    of_col: list[Any] = [None] * ceil(len(b) / chunk)
    for top, left, block in cosine_blocks(a, b, chunk):
        i, j = top // chunk, left // chunk
        value = block - p[left : left + chunk]
        of_row[i] = _best(of_row[i], value, left, n_candidates)
        value = (block - u[top : top + chunk, None]).T.contiguous()
        of_col[j] = _best(of_col[j], value, top, n_candidates)
    value, col = (torch.cat(x) for x in zip(*of_row, strict=True))
    found = [(torch.arange(len(a), device=a.device)[:, None].expand_as(col), col, value + p[col])]
    bound = float(value[:, 0].double().sum() + p.double().sum())
    value, row = (torch.cat(x) for x in zip(*of_col, strict=True))
    found += [(row, torch.arange(len(b), device=a.device)[:, None].expand_as(row), value + u[row])]
    return found, bound


def _best(
    known: tuple[Tensor, Tensor] | None, value: Float[Tensor, "k l"], offset: int, n: int
) -> tuple[Tensor, Tensor]:
    """The n largest (value, place) of each row among those known and a further block's."""
    top, place = value.topk(min(n, value.shape[1]), dim=1)
    place = place + offset
    if known is not None:
        top, place = torch.cat((known[0], top), dim=1), torch.cat((known[1], place), dim=1)
        top, order = top.topk(min(n, top.shape[1]), dim=1)
        place = place.gather(1, order)
    return top, place


def _solve_sparse(edges: _Edges, n: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(column of each row or -1, what the row gets) in the best matching of the edges.

    A row may stay alone, at a value below any cosine. So there always is a solution, and SciPy sees
    that at once (its search for one takes exponential time on some graphs, scipy issue 26147).
    """
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    own = np.arange(n)
    row, col = np.concatenate((edges.row, own)), np.concatenate((edges.col, m + own))
    # SciPy reads a weight of 0 as no edge; +3 makes all positive and adds the same to any matching.
    weight = np.concatenate((edges.cosine, np.full(n, _ALONE))) + 3
    places = (row.astype(np.int32), col.astype(np.int32))
    graph = csr_array((weight, places), shape=(n, m + n))
    row, col = min_weight_full_bipartite_matching(graph, maximize=True)
    chosen = np.empty(n, dtype=np.int64)
    chosen[row] = col
    value = np.full(n, _ALONE)
    taken = chosen < m
    place = np.searchsorted(edges.row * m + edges.col, own[taken] * m + chosen[taken])
    value[taken] = edges.cosine[place]
    return np.where(taken, chosen, -1), value


def _duals(
    edges: _Edges, chosen: NDArray[np.int64], value: NDArray[np.float64], m: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(utility of each row, price of each column) that support an optimal matching of the edges.

    The smallest prices >= 0 under which no row prefers another column to what it has:
    p_j >= p_s(i) + cos_ij - cos_is(i) for every edge, iterated from 0 (Bellman-Ford). Any prices
    give a valid bound, so a stop before the fixed point would cost tightness only.
    """
    gain = edges.cosine - value[edges.row]
    price = np.zeros(m + 1)  # the last one, that of -1, stays 0
    moved = np.ones(len(chosen), dtype=bool)
    for _ in range(_PRICE_ROUNDS):
        seen = np.flatnonzero(moved[edges.row])  # edges of rows whose own price rose
        least = price.copy()
        np.maximum.at(least, edges.col[seen], price[chosen][edges.row[seen]] + gain[seen])
        raised = least > price + _PRICE_STEP
        if not raised.any():
            break
        price[raised] = least[raised]
        moved = raised[chosen]
    return value - price[chosen], price[:m]
