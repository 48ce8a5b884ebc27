"""Which implementation runs: Triton's kernels for tensors on CUDA, the present path elsewhere.

The Triton modules are imported at the first tensor on CUDA, so that neither a CPU nor a CUDA
machine without triton (extra ``gpu``) ever needs it.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

from torch import Tensor


def kernels(tensor: Tensor) -> ModuleType | None:
    """`sae_core.kernels.triton` for a tensor on CUDA where triton is installed, else None."""
    return triton_kernels() if tensor.is_cuda else None


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
