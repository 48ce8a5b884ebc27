"""How the Triton kernels are launched, and what their grids are computed with."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any, grid: tuple[int, ...], first: Tensor, *others: Any, **constants: Any
) -> None:
    """Run a kernel on the device of its first argument, which need not be the current one.

    An empty grid, as of a batch without tokens, is no launch: CUDA refuses it.
    """
    if 0 in grid:
        return
    with torch.cuda.device_of(first) if first.is_cuda else nullcontext():
        kernel[grid](first, *others, **constants)


def blocks(n: int, size: int) -> int:
    """How many blocks of this size cover n."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least power of 2 that is n or more; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()
