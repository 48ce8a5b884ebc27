"""A training step's kernels on the processor, compiled by numba; `choice` hands this module out.

    matmul, matmul_t, sampled      the three products of eager.py
    reconstruction    decoder, residual, loss and the gradient of the codes in one pass
    adam_unit_rows    Adam's step and the return to unit norm in one pass
    above             rows and columns of what is above a number
    top               rows and columns of the k largest of a row
    round_latents     the left side of the 8-bit product of screen.py

The loops are in loops.py and search_loops.py. Results are the same on any number of threads.
torch's own kernels, which take their place where numba is not installed, are in sparse.py and
active.py.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numba import get_num_threads, set_num_threads
from torch import Tensor

from sae_core.kernels import loops, search_loops
from sae_core.kernels.adam import Adam
from sae_core.kernels.codes import Codes, by_latent
from sae_core.kernels.reconstruction import differentiable

MOST_COLUMNS = 1 << 30  # any width will do
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _start() -> int:
    """Start numba's threads, as many as it has; that may set torch's number, which is set back."""
    before = torch.get_num_threads()
    most = get_num_threads()
    torch.set_num_threads(before)
    return most


MOST_THREADS = _start()


def _run(loop: Callable[..., Any], *arrays: Any) -> Any:
    """The loop on as many threads as torch has."""
    before, many = get_num_threads(), min(torch.get_num_threads(), MOST_THREADS)
    set_num_threads(many)
    try:
        return loop(many, *(_array(a) if isinstance(a, Tensor) else a for a in arrays))
    finally:
        set_num_threads(before)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _check(codes: Codes, w: Tensor | None, g: Tensor | None) -> None:
    """Loops look no index up: each latent must be a row of W, each token one of G.

    Raises:
        IndexError: they are not.
    """
    if w is not None and codes.col.numel() and not 0 <= codes.col.min() <= codes.col.max() < len(w):
        raise IndexError(f"Expected latents from 0 to {len(w) - 1}, got others.")
    if g is not None and len(g) != codes.n:
        raise IndexError(f"Expected one row for each of {codes.n} tokens, got {len(g)}.")


def matmul(codes: Codes, w: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
    """A W."""
    _check(codes, w, None)
    out = w.new_empty(codes.n, w.shape[1])
    _run(loops.sums, None, codes.col, codes.values, codes.crow, w, out)
    return out


def matmul_t(
    codes: Codes, g: Float[Tensor, "n d"], out: Float[Tensor, "d_sae d"] | None = None
) -> Float[Tensor, "d_sae d"]:
    """A' G; the order of the codes' latents is taken from them where they carry it.

    Args:
        out: memory for the result; None: new.
    """
    _check(codes, None, g)
    order, starts = codes.by_latent or by_latent(codes.col, codes.d_sae)
    out = g.new_empty(codes.d_sae, g.shape[1]) if out is None else out
    _run(loops.sums, order, codes.row, codes.values, starts, g, out)
    return out


def sampled(
    codes: Codes, g: Float[Tensor, "n d"], w: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "nnz"]:
    """(G W') at the active entries, in the order of the codes."""
    _check(codes, w, g)
    out = g.new_empty(codes.col.shape[0])
    _run(loops.dots, codes.crow, codes.col, g, w, out)
    return out


def above(
    matrix: Tensor, floor: Float[Tensor, ""] | None = None
) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:
    """Rows and columns, ascending, of what is above `floor`, 0 or more (None: 0), in [n, m]."""
    # + 0: the bits of -0 would be the least integer
    least = matrix.new_zeros(1, 1) if floor is None else floor.to(matrix.dtype).view(1, 1) + 0
    row, col = _run(search_loops.above, _integers(matrix), _integers(least).numpy()[0, 0])
    return torch.from_numpy(row), torch.from_numpy(col)


def top(matrix: Tensor, k: int) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:
    """Rows and columns, ascending, of the k largest numbers of each row that are above 0."""
    row, col = _run(search_loops.top, _integers(matrix), k)
    return torch.from_numpy(row), torch.from_numpy(col)


def _integers(matrix: Tensor) -> Tensor:
    """Their bits as integers, which have the sign and, above 0, the order of the numbers."""
    return matrix.contiguous().view(INTEGERS[matrix.element_size()])


def round_latents(
    rows: Float[Tensor, "m d_in"],
    bias: Float[Tensor, "m"],
    unit: float,
    most: int,
    columns: int,
    margin: float,
) -> UInt8[Tensor, "m d_in_plus_columns_plus_2"]:
    """Latents as integers, the left side of the product in screen.py, which has the equations.

    Args:
        unit: c, of the tokens.
        most: largest integer.
        columns: that share a bias.
        margin: of a row of norm 1.
    """
    out = torch.empty(len(rows), rows.shape[1] + columns + 2, dtype=torch.uint8)
    _run(loops.round_latents, rows, bias, unit, most, columns, margin, out)
    return out


@torch.no_grad()
def adam_unit_rows(optimizer: Adam, parameter: Tensor) -> None:
    """`triton_update.adam_unit_rows`: Adam's step on a matrix whose rows then get unit norm.

    The gradient is used up: `optimizer.step()` afterwards updates the other parameters.
    """
    assert parameter.grad is not None and parameter.is_contiguous()
    group = optimizer.group_of(parameter)
    state = optimizer.moments(parameter)
    state["step"] += 1
    t, (beta1, beta2) = int(state["step"]), group["betas"]
    rate, root = group["lr"] / (1 - beta1**t), sqrt(1 - beta2**t)
    settings = [rate, root, group["eps"], beta1, 1 - beta1, beta2, 1 - beta2]
    numbers = parameter.new_tensor(settings).numpy()
    matrices = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
    _run(loops.adam_unit_rows, *matrices, *numbers)
    optimizer.forget(parameter)


def _reconstruct(
    codes: Codes, w_dec: Tensor, b_dec: Tensor, x: Tensor, factor: float, squared: Tensor | None
) -> tuple[Tensor, ...]:
    """Loss, x_hat and gradients: the rows of W_dec that a token names are read for x_hat and, while
    they are in the cache, again for the gradient of the codes."""
    _check(codes, w_dec, x)
    x = x.contiguous()
    x_hat, g, d_values = (torch.empty_like(t) for t in (x, x, codes.values))
    loss = x.new_empty(codes.n)
    _run(
        loops.reconstruct, codes.crow, codes.col, codes.values, w_dec, b_dec, x,
        x.new_empty(0) if squared is None else squared, x.new_full((), factor).numpy()[()],
        x_hat, g, d_values, loss,
    )  # fmt: skip
    return loss.sum(), x_hat, g, d_values


reconstruction = differentiable(_reconstruct, matmul_t)
