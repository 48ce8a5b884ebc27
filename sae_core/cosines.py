"""Signed cosines of the rows of two dictionaries, block by block: never the full n x m matrix.

cos(a_i, b_j) = a_i . b_j / (|a_i| |b_j|), and 0 where either row is zero.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_core.errors import UserError

CHUNK = 2048  # rows of a block: 16 MiB of float32 cosines, which malloc reuses (4096: 20% slower)


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows scaled to length 1; a zero row stays zero, so that its cosines are 0."""
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=1, keepdim=True).clamp_min(tiny)  # squares neither over- nor underflow
    return x / x.norm(dim=1, keepdim=True).clamp_min(tiny)


def as_pair(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m _"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Both dictionaries without gradient in one dtype, at least float32.

    Raises:
        UserError: an empty dictionary, different widths, or entries that are not finite.
    """
    if a.shape[1] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise UserError(
            "Expected two dictionaries with at least one row and the same width d, "
            f"got {list(a.shape)} and {list(b.shape)}."
        )
    bad = [sum(int((~y.isfinite().all(dim=1)).sum()) for y in x.split(CHUNK)) for x in (a, b)]
    if any(bad):
        raise UserError(
            f"Expected finite dictionaries, got {bad[0]} rows of the first and {bad[1]} rows of "
            "the second with NaN or infinity."
        )
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.detach().to(dtype), b.detach().to(dtype)


def cosine_blocks(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], chunk: int
) -> Iterator[tuple[int, int, Float[Tensor, "k l"]]]:
    """(first row, first column, cosines) of every block of at most chunk x chunk, row by row.

    Raises:
        UserError: ``chunk`` is below 1.
    """
    if chunk < 1:
        raise UserError(f"Expected a chunk of at least 1 row, got {chunk}.")
    for top in range(0, len(a), chunk):
        left_unit = unit_rows(a[top : top + chunk])
        for left in range(0, len(b), chunk):
            yield top, left, left_unit @ unit_rows(b[left : left + chunk]).T


def max_cosine(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m _"], *, chunk: int = CHUNK
) -> tuple[Float[Tensor, "n"], Int64[Tensor, "n"]]:
    """For each row of a: the largest signed cosine with a row of b, and which row that is.

    Rows need not be unit; a zero row has cosine 0 with everything. Memory: O(chunk^2 + chunk d)
    beside the dictionaries. Where several rows are best, up to rounding, any of them may be named.

    Raises:
        UserError: as `as_pair`; ``chunk`` below 1.
    """
    a, b = as_pair(a, b)
    best = a.new_full((len(a),), -torch.inf)
    index = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    for top, left, block in cosine_blocks(a, b, chunk):
        rows = slice(top, top + chunk)
        value, place = block.max(dim=1)
        index[rows] = torch.where(value > best[rows], place + left, index[rows])
        best[rows] = torch.maximum(value, best[rows])
    return best.clamp(-1, 1), index


def paired_cosine(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], index: Int64[Tensor, "n"], chunk: int
) -> Float[Tensor, "n"]:
    """cos(a_i, b_index(i)) in float64, chunk by chunk."""
    parts = [
        (unit_rows(x.double()) * unit_rows(b[j].double())).sum(dim=1)
        for x, j in zip(a.split(chunk), index.split(chunk), strict=True)
    ]
    return torch.cat(parts).clamp(-1, 1)
