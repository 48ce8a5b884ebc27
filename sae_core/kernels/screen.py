"""Entries of x W + b above a threshold: an 8-bit product proposes them, float32 decides.

Every latent and every token is rounded to integers in a step of its own,

    w_m = s_m (p_m + e_m),   x_n = t_n (q_n + f_n),   |p|, |q| <= 127,   |e|, |f| <= 1/2,

so that y = w'x + b relates to what integers tell by

    y_mn / (s_m t_n) = p_m'q_n + b_m / (s_m t_n) + e_m'x_n / t_n + p_m'f_n.

The last two terms are what rounding leaves: taken as independent and uniform, they have mean 0
and standard deviation at most (||x_n|| / t_n + ||p_m||) / sqrt(12). Entries whose first two terms
exceed minus `MARGIN` of these deviations are computed in float32. Of the entries above 0 fewer than
one in five thousand is passed over, where a product in bfloat16 loses one in a hundred.

On processors with VNNI the product takes half the time of one in bfloat16 (benchmarks/LOG.md). It
goes to one sign per entry, so all terms have to be columns of it: t_n = 1 / (c r_n) with r_n an
integer makes the bias an integer for each latent, T_m = b_m c / s_m, times r_n for each token. T_m
is spread over `BIAS_COLUMNS`; where it is too large for them, s_m grows.
"""

from functools import cache
from math import sqrt

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sae_core.kernels.active import BLOCK_BYTES, above, exact_values
from sae_core.kernels.choice import numba_kernels
from sae_core.kernels.codes import Codes, by_latent
from sae_core.kernels.compiled import has_threads

MARGIN = 2.0  # standard deviations of what rounding leaves; 3 brings a tenth more candidates
MOST = 127  # largest integer
BIAS_COLUMNS = 14
EXTRA = BIAS_COLUMNS + 2
USUAL = 64  # r of the median token: tokens of up to 64 times its largest entry keep c as it is
UNIT_MARGIN = MARGIN / (sqrt(12) * MOST)  # of a row of norm 1, in the unit of its column
MOST_COLUMNS = int(12 * (MOST / MARGIN) ** 2)  # of rows whose margin surely fits one column
ROWS = 512  # fewest latents of a block


@cache
def available() -> bool:
    """Does this processor have instructions for the product, and is it exact here?"""
    try:
        if not torch.cpu._is_vnni_supported():
            return False
        generator = torch.Generator().manual_seed(0)
        p, q = (torch.randint(-MOST, MOST + 1, (64, 80), generator=generator) for _ in range(2))
        p[0], q[0] = MOST, MOST  # sums that overflow 16 bits
        found = _positive_part((p + 128).to(torch.uint8), _packed(q))
        return torch.equal(found.long(), (p @ q.T).clamp_(0, 255))
    except (AttributeError, RuntimeError):  # not in this build of torch
        return False


def serves(x: Float[Tensor, "n d_in"]) -> bool:
    """Can these tokens be screened here? Rounding the latents needs numba."""
    fits = not x.is_cuda and len(x) > 0 and x.shape[1] <= MOST_COLUMNS
    return fits and has_threads() and available()


@torch.no_grad()
def active_codes(
    x: Float[Tensor, "n d_in"],
    w: Float[Tensor, "d_in d_sae"],
    b: Float[Tensor, "d_sae"],
    threshold: Float[Tensor, "d_sae"] | None = None,
) -> Codes:
    """Candidates for x W + b > threshold, with exact pre-activations y = x W + b.

    Of the entries above their threshold fewer than one in five thousand is not among them; some
    candidates lie below it.

    Args:
        threshold: None for 0.
    """
    n, d_sae = len(x), w.shape[1]
    tokens, unit = _tokens(x)
    packed, bias = _packed(tokens), b if threshold is None else b - threshold
    size = max(ROWS, BLOCK_BYTES // n)
    weights, latents, tokens_of = w.T, [], []
    for first in range(0, d_sae, size):
        part = slice(first, first + size)
        sums = _positive_part(_latents(weights[part], bias[part], unit), packed)
        latent, token = above(sums)
        latents.append(latent + first)
        tokens_of.append(token)
    latent, token = torch.cat(latents), torch.cat(tokens_of)
    order, starts = by_latent(token, n)
    row, col = token[order], latent[order]
    return exact_values(x, w, b, Codes(starts, row, col, x.new_empty(len(row)), d_sae))


def _tokens(x: Float[Tensor, "n d_in"]) -> tuple[Int[Tensor, "n columns"], float]:
    """q_n, r_n for each column of the bias, 127, the token's margin; and c."""
    n, d_in = x.shape
    largest = _largest(x)
    unit = MOST / max(float(largest.max()), USUAL * float(largest.median()))
    r = (MOST / (unit * largest)).floor_().clamp_(1, MOST)
    scaled = x * (unit * r)[:, None]
    q = torch.empty(n, d_in + EXTRA, dtype=torch.int8)
    q[:, d_in : d_in + BIAS_COLUMNS] = r[:, None]
    q[:, -2] = MOST
    q[:, -1] = _margin(scaled)
    q[:, :d_in] = scaled.round_()
    return q, unit


def _latents(
    rows: Float[Tensor, "m d_in"], bias: Float[Tensor, "m"], unit: float
) -> UInt8[Tensor, "m columns"]:
    """128 + p_m, T_m spread over the columns of the bias, the latent's margin, 127."""
    return numba_kernels().round_latents(rows, bias, unit, MOST, BIAS_COLUMNS, UNIT_MARGIN)


def _largest(rows: Float[Tensor, "m d"]) -> Float[Tensor, "m"]:
    """Largest absolute entry of each row; above 0."""
    return torch.maximum(rows.amax(1), -rows.amin(1)).clamp_min_(torch.finfo(rows.dtype).tiny * 1e3)


def _margin(rows: Float[Tensor, "m d"]) -> Float[Tensor, "m"]:
    """MARGIN ||row|| / sqrt(12) as a multiple of 127, which is the other factor of its column."""
    return (rows.norm(dim=1) * UNIT_MARGIN).ceil_()


def _packed(q: Int[Tensor, "n columns"]) -> Tensor:
    """Integers in [-127, 127] as the product wants its right side.

    It takes them as they lie: oneDNN's own packing of one batch is a fifth of the product.
    """
    return q.to(torch.int8).T.contiguous().to_mkldnn()


def _positive_part(p: UInt8[Tensor, "m columns"], packed: Tensor) -> UInt8[Tensor, "m n"]:
    """(p - 128)'q where it lies between 0 and 255, the nearer of these elsewhere."""
    n = packed.shape[1]
    zeros = torch.zeros(n, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        p, 1.0, 128, packed, torch.ones(n), zeros, None, 1.0, 0, torch.uint8, "relu", [], ""
    )
