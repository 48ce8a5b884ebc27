"""Which implementation runs: Triton's kernels on CUDA, numba's on the processor, or torch's own.

The Triton modules are imported at the first tensor on CUDA and numba's at the first large matrix,
so that a machine without triton (extra ``gpu``) or numba (extra ``cpu``) never needs it.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from sae_core.kernels.compiled import has_threads

LARGE = 1 << 20
"""Numbers in a matrix from which on compiled loops are loaded: below, torch's take no time."""


def kernels(tensor: Tensor) -> ModuleType | None:
    """`sae_core.kernels.triton` for a tensor on CUDA where triton is installed, else None."""
    return triton_kernels() if tensor.is_cuda else None


def products(tensor: Tensor, d_sae: int) -> ModuleType | None:
    """Where products with d_sae rows as wide as `tensor` run: Triton's module, cpu.py or None."""
    if tensor.is_cuda:
        return triton_kernels()
    is_served = tensor.dtype in (torch.float32, torch.float64)
    return cpu_kernels(tensor, d_sae * tensor.shape[1]) if is_served else None


def cpu_kernels(tensor: Tensor, size: int) -> ModuleType | None:
    """`sae_core.kernels.cpu` for work on `size` numbers in memory where numba is installed."""
    is_served = tensor.device.type == "cpu" and size >= LARGE
    return numba_kernels() if is_served and has_threads() else None


@cache
def numba_kernels() -> ModuleType:
    """`sae_core.kernels.cpu`; needs numba."""
    return import_module("sae_core.kernels.cpu")


@cache
def triton_kernels() -> ModuleType | None:
    """`sae_core.kernels.triton`, or None where triton is not installed.

    Only the absence of triton itself is passed over; a broken installation says so itself.
    """
    try:
        return import_module("sae_core.kernels.triton")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return None
