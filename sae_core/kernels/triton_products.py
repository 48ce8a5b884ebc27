"""The three products of a sparse autoencoder on compressed rows; references in eager.py.

    matmul(A, W) = A W       a program a token: gathers the rows of W that its latents name
    sampled(A, G, W)         a program a token: holds its row of G, gathers the same rows of W
    matmul_t(A, G) = A' G    a program a piece of a latent: gathers the rows of G of its tokens

For A' the entries are sorted by latent (stable, so tokens ascend). A latent that fires often is cut
into pieces of `PIECE` entries whose sums a second kernel adds up in order: no atomics, the same
result in every run, and no program is much longer than another. Sums are in float32, in float64
for float64 operands; a bfloat16 operand is gathered as such, at half the traffic.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sae_core.kernels.codes import ByLatent, Codes
from sae_core.kernels.triton_launch import blocks, launch, power_of_2

PIECE = 256  # entries of one latent that one program adds up
CELLS = 4096  # numbers that a program gathers at once, 32 to a thread
COLUMNS = 512  # of them in one row; 1 KB of bfloat16, enough for full use of memory


class _Block(NamedTuple):
    """What a program holds at once."""

    entries: int
    columns: int
    warps: int


def block(d: int, columns: int, cells: int) -> _Block:
    """Entries, columns and warps for rows of d numbers, where so many of them are held at once."""
    columns = min(columns, power_of_2(d))
    entries = max(1, min(16, cells // columns))
    return _Block(entries, columns, max(1, min(32, entries * columns // 1024)))


def sum_types(*tensors: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """The type of sums over these operands, as torch and as Triton name it."""
    double = any(t.dtype == torch.float64 for t in tensors)
    return (torch.float64, tl.float64) if double else (torch.float32, tl.float32)


@triton.jit
@no_type_check
def _matmul(
    crow, col, values, w, bias, out, d, HAS_BIAS: tl.constexpr,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, ENTRIES)
    end = tl.load(crow + i + 1)
    total = tl.zeros((COLUMNS,), SUM)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < d, other=0.0).to(SUM)
    for start in range(tl.load(crow + i), end, ENTRIES):
        inside = start + lane < end
        latent = tl.load(col + start + lane, mask=inside, other=0)
        value = tl.load(values + start + lane, mask=inside, other=0.0).to(SUM)
        mask = inside[:, None] & (column < d)[None, :]
        rows = tl.load(w + latent[:, None] * d + column[None, :], mask=mask, other=0.0).to(SUM)
        total += tl.sum(value[:, None] * rows, 0)
    tl.store(out + i * d + column, total, mask=column < d)


@triton.jit
@no_type_check
def _sampled(
    crow, col, g, w, out, d, room,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    lane = tl.arange(0, ENTRIES)
    end = tl.minimum(tl.load(crow + i + 1), room)
    for start in range(tl.load(crow + i), end, ENTRIES):
        inside = start + lane < end
        latent = tl.load(col + start + lane, mask=inside, other=0)
        total = tl.zeros((ENTRIES,), SUM)
        for first in range(0, d, COLUMNS):
            wide = first + column < d
            # the same row of g for every block of entries: it stays in the nearest cache
            own = tl.load(g + i * d + first + column, mask=wide, other=0.0).to(SUM)
            at = w + latent[:, None] * d + (first + column)[None, :]
            rows = tl.load(at, mask=inside[:, None] & wide[None, :], other=0.0).to(SUM)
            total += tl.sum(own[None, :] * rows, 1)
        tl.store(out + start + lane, total, mask=inside)


@triton.jit
@no_type_check
def _pieces(
    order, row, values, starts, latent_of, first_piece, slot, g, out, parts, d,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, ENTRIES)
    latent = tl.load(latent_of + piece)
    number = piece - tl.load(first_piece + latent)
    begin = tl.load(starts + latent) + number * PIECE
    end = tl.minimum(tl.load(starts + latent + 1), begin + PIECE)
    total = tl.zeros((COLUMNS,), SUM)
    for start in range(begin, end, ENTRIES):
        inside = start + lane < end
        entry = tl.load(order + start + lane, mask=inside, other=0)
        token = tl.load(row + entry, mask=inside, other=0)
        value = tl.load(values + entry, mask=inside, other=0.0).to(SUM)
        mask = inside[:, None] & (column < d)[None, :]
        rows = tl.load(g + token[:, None] * d + column[None, :], mask=mask, other=0.0).to(SUM)
        total += tl.sum(value[:, None] * rows, 0)
    n = tl.load(first_piece + latent + 1) - tl.load(first_piece + latent)
    if number < n:  # the last programs may have no piece
        if n == 1:
            tl.store(out + latent * d + column, total, mask=column < d)
        else:
            part = tl.load(slot + latent) + number
            tl.store(parts + part * d + column, total, mask=column < d)


@triton.jit
@no_type_check
def _join(
    latent_of, first_piece, slot, parts, out, d, COLUMNS: tl.constexpr, SUM: tl.constexpr
):  # fmt: skip
    piece = tl.program_id(0)
    latent = tl.load(latent_of + piece)
    first = tl.load(first_piece + latent)
    n = tl.load(first_piece + latent + 1) - first
    if piece == first and n > 1:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        begin = tl.load(slot + latent)
        total = tl.zeros((COLUMNS,), SUM)
        for part in range(begin, begin + n):
            total += tl.load(parts + part * d + column, mask=column < d, other=0.0)
        tl.store(out + latent * d + column, total, mask=column < d)


def by_latent(codes: Codes) -> ByLatent:
    """The entries in the order of their latents and where each latent starts."""
    col, order = codes.col.int().sort(stable=True)
    edges = torch.arange(codes.d_sae + 1, dtype=torch.int32, device=col.device)
    return ByLatent(order, torch.searchsorted(col, edges))


def matmul(
    codes: Codes, w: Float[Tensor, "d_sae d"], bias: Float[Tensor, "d"] | None = None
) -> Float[Tensor, "n d"]:
    """A W (+ bias)."""
    dtype, sum_type = sum_types(codes.values, w)
    w = w.contiguous()
    out = w.new_empty((codes.n, w.shape[1]), dtype=dtype)
    b = block(w.shape[1], COLUMNS, CELLS)
    launch(
        _matmul, (codes.n, blocks(w.shape[1], b.columns)), codes.crow, codes.col, codes.values,
        w, w if bias is None else bias, out, w.shape[1], HAS_BIAS=bias is not None,
        ENTRIES=b.entries, COLUMNS=b.columns, SUM=sum_type, num_warps=b.warps,
    )  # fmt: skip
    return out


def sampled(
    codes: Codes, g: Float[Tensor, "n d"], w: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "nnz"]:
    """(G W') at the active entries, in the order of the codes; 0 behind the last of them."""
    dtype, sum_type = sum_types(g, w)
    g, w = g.contiguous(), w.contiguous()
    room, d = codes.col.shape[0], g.shape[1]
    out = g.new_zeros(room, dtype=dtype)
    b = block(d, COLUMNS, CELLS)
    if room:
        launch(
            _sampled, (codes.n,), codes.crow, codes.col, g, w, out, d, room,
            ENTRIES=b.entries, COLUMNS=b.columns, SUM=sum_type, num_warps=b.warps,
        )  # fmt: skip
    return out


def matmul_t(codes: Codes, g: Float[Tensor, "n d"]) -> Float[Tensor, "d_sae d"]:
    """A' G; the order of the codes' latents is taken from them where they carry it."""
    dtype, sum_type = sum_types(codes.values, g)
    order, starts = codes.by_latent or by_latent(codes)
    count = starts.diff()
    pieces = (count + (PIECE - 1)).div(PIECE, rounding_mode="floor").clamp_min(1)
    first_piece = torch.zeros_like(starts)
    torch.cumsum(pieces, 0, out=first_piece[1:])
    shared = torch.where(pieces > 1, pieces, 0)
    slot = shared.cumsum(0) - shared
    # room for any division of the entries, so that the host need not ask: a latent has at most
    # count / PIECE pieces more than one, and at most twice that many where it has several
    n_more = codes.col.shape[0] // PIECE
    program = torch.arange(codes.d_sae + n_more, device=starts.device)
    latent_of = torch.searchsorted(first_piece, program, right=True) - 1
    latent_of = latent_of.clamp_max(codes.d_sae - 1)
    g = g.contiguous()
    d = g.shape[1]
    out = g.new_empty((codes.d_sae, d), dtype=dtype)
    parts = g.new_empty((2 * n_more, d), dtype=dtype)
    b = block(d, COLUMNS, CELLS)
    grid = (len(program), blocks(d, b.columns))
    launch(
        _pieces, grid, order, codes.row, codes.values, starts, latent_of, first_piece, slot, g, out,
        parts, d, PIECE=PIECE, ENTRIES=b.entries, COLUMNS=b.columns, SUM=sum_type,
        num_warps=b.warps,
    )  # fmt: skip
    if n_more:
        launch(
            _join, grid, latent_of, first_piece, slot, parts, out, d,
            COLUMNS=b.columns, SUM=sum_type,
        )  # fmt: skip
    return out
