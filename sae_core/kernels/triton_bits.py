"""Which latents are active, one bit an entry: the encoder's product with the threshold fused.

    bit_ij = 1  where  x_i'w_j > bound_j           bound = threshold - b_enc,  x = u - b_dec

Why bits, and not the values at once: with 8,192 tokens and 65,536 latents the pre-activations are
1.1 GB in bfloat16, written and read again about 0.5 ms on an H200 (4.3 TB/s counting both ways)
beside 2.8 ms of product (2.2e12 operations at 790 TFLOP/s). Their bits are 67 MB. A tile that
wrote its few values itself would need a place in every row: through atomic counters, hence in an
order that changes from run to run and must be sorted away, into rows of a fixed capacity, hence
too narrow for the one token with thousands of active latents, or by a second product. From bits the
place of every entry follows by counting, in order, without atomics and without a capacity. The
values are then products at the active entries only (triton_products.sampled), in the precision of
the weights: 64 of 65,536 a token, a gather of 2 to 4 GB. `train` does so on every device.

Two routes lead to the same bits: `product_bits` (one kernel, nothing else reaches memory) and
`dense_bits` (of a product that a library made, a part of the tokens at a time). Which one is faster
depends on how near Triton's product comes to the library's: benchmarks/gpu_kernels.py times both.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from sae_core.kernels.triton_launch import blocks, launch, power_of_2


class Tiles(NamedTuple):
    """Shape of one program of the product; chosen by measurement, never tuned at run time."""

    tokens: int
    """Tokens of a tile, a power of 2 from 16."""
    latents: int
    """Latents of a tile, a power of 2 from 32."""
    depth: int
    """Input dimensions of a step of the product, a power of 2 from 16."""
    group: int
    """Tiles of tokens that run beside one tile of latents, so that the L2 cache serves them."""
    warps: int
    """Warps of a program."""
    stages: int
    """Loads in flight."""


HALF_TILES = Tiles(128, 256, 64, 8, 8, 3)  # bfloat16: 144 KB of an H100's 227 KB shared memory
FULL_TILES = Tiles(64, 64, 32, 8, 4, 3)  # float32 has no tensor cores: registers are the limit
DENSE_CELLS = 1 << 14  # entries a program of `dense_bits` reads


# no_type_check: tests annotate functions with a run-time check, which a compiled one cannot carry
@triton.jit
@no_type_check
def _packed(active, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 words [ROWS, COLUMNS / 32] of a truth table; bit b is column 32 word + b."""
    bits = tl.reshape(active.to(tl.int32), (ROWS, COLUMNS // 32, 32))
    return tl.sum(bits << tl.arange(0, 32)[None, None, :], 2)


@triton.jit
@no_type_check
def _product_bits(
    x, w, bound, bits, n, m, d, words,
    TOKENS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token_tiles, latent_tiles = tl.cdiv(n, TOKENS), tl.cdiv(m, LATENTS)
    first = program // (GROUP * latent_tiles) * GROUP
    wide = tl.minimum(token_tiles - first, GROUP)
    inside = program % (GROUP * latent_tiles)
    token = (first + inside % wide) * TOKENS + tl.arange(0, TOKENS)
    tile = inside // wide
    latent = tile * LATENTS + tl.arange(0, LATENTS)
    depth = tl.arange(0, DEPTH)
    # past the edge: some row that exists, so that the loads need no mask
    at_x = x + (token % n).to(tl.int64)[:, None] * d + depth[None, :]
    at_w = w + (latent % m).to(tl.int64)[None, :] * d + depth[:, None]
    total = tl.zeros((TOKENS, LATENTS), tl.float32)
    for k in range(0, d, DEPTH):
        if EVEN:
            a, b = tl.load(at_x), tl.load(at_w)
        else:
            a = tl.load(at_x, mask=k + depth[None, :] < d, other=0.0)
            b = tl.load(at_w, mask=k + depth[:, None] < d, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        at_x += DEPTH
        at_w += DEPTH
    limit = tl.load(bound + latent, mask=latent < m, other=float("inf"))
    word = tile * (LATENTS // 32) + tl.arange(0, LATENTS // 32)
    place = bits + token.to(tl.int64)[:, None] * words + word[None, :]
    found = _packed(total > limit[None, :], TOKENS, LATENTS)
    tl.store(place, found, mask=(token < n)[:, None] & (word < words)[None, :])


@triton.jit
@no_type_check
def _dense_bits(pre, bound, bits, n, m, words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < m)[None, :]
    at = pre + row.to(tl.int64)[:, None] * m + column[None, :]
    value = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
    limit = tl.load(bound + column, mask=column < m, other=float("inf"))
    found = _packed(value > limit[None, :], ROWS, COLUMNS)
    word = tl.program_id(1) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
    place = bits + row.to(tl.int64)[:, None] * words + word[None, :]
    tl.store(place, found, mask=(row < n)[:, None] & (word < words)[None, :])


def product_bits(
    x: Float[Tensor, "n d_in"],
    w_enc: Float[Tensor, "d_in d_sae"],
    bound: Float[Tensor, "d_sae"],
    tiles: Tiles | None = None,
) -> Int32[Tensor, "n words"]:
    """One bit for each entry of x W_enc that exceeds its latent's bound.

    Reference: ``x @ w_enc > bound``. The sum is in float32 whatever the operands' type.

    Args:
        x: centred tokens, float32, bfloat16 or float16.
        w_enc: of the same type, stored latent by latent (strides 1, d_in) or copied so.
        bound: float32; a latent with bound inf is never active.
        tiles: None: HALF_TILES for two-byte types, else FULL_TILES.
    Returns:
        int32 words; bit b of word v is latent 32 v + b.
    """
    n, d = x.shape
    m = w_enc.shape[1]
    t = tiles or (HALF_TILES if x.dtype.itemsize == 2 else FULL_TILES)
    x, w = x.contiguous(), w_enc.T.contiguous()
    bits = x.new_empty((n, blocks(m, 32)), dtype=torch.int32)
    grid = (blocks(n, t.tokens) * blocks(m, t.latents),)
    launch(
        _product_bits, grid, x, w, bound.float().contiguous(), bits, n, m, d, bits.shape[1],
        TOKENS=t.tokens, LATENTS=t.latents, DEPTH=t.depth, GROUP=t.group,
        EVEN=d % t.depth == 0, num_warps=t.warps, num_stages=t.stages,
        # the interpreter, which alone sees CPU tensors, multiplies bfloat16 as whole numbers
        WIDEN=not x.is_cuda,
    )  # fmt: skip
    return bits


def dense_bits(
    pre: Float[Tensor, "n d_sae"], bound: Float[Tensor, "d_sae"]
) -> Int32[Tensor, "n words"]:
    """The bits of a product that lies in memory; reference: ``pre > bound``.

    Args:
        pre: x W_enc, contiguous, any floating type.
        bound: float32.
    """
    n, m = pre.shape
    bits = pre.new_empty((n, blocks(m, 32)), dtype=torch.int32)
    columns = min(1024, max(32, power_of_2(m)))
    rows = min(DENSE_CELLS // columns, power_of_2(n))
    grid = (blocks(n, rows), blocks(m, columns))
    launch(
        _dense_bits, grid, pre.contiguous(), bound.float().contiguous(), bits, n, m, bits.shape[1],
        ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    return bits
