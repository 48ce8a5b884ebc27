"""A state dict that torch.save pickled, read without trust.

A pickle can run any program when it is loaded. Here only tensors are unpickled (torch.load with
weights_only=True), a file that asks for more is refused unread, and what is not there is not
believed: archives that unpack to more than they are, tensors without data of their own.
"""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sae_core.errors import CorruptFileError, UserError, reason


def load_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict; nothing in the file is executed.

    Raises:
        UserError: the pickle needs more than tensors, or is not a state dict.
        CorruptFileError: not a whole file of torch.save.
    """
    try:
        _refuse_bomb(file)
        with warnings.catch_warnings():  # of another pickle protocol: only its content matters
            warnings.simplefilter("ignore", UserWarning)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"Expected {file} to hold tensors alone, got a pickle that asks for more; it was not "
            "loaded, since that can run any program."
        ) from error
    except Exception as error:  # a pickle calls torch with whatever arguments it holds
        raise CorruptFileError(
            f"{file} is not a whole file of torch.save: {reason(error)}."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"Expected a dictionary of tensors in {file}, got {type(state).__name__}.")
    for name, tensor in state.items():
        _refuse_hollow(file, str(name), tensor)
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _refuse_bomb(file: Path) -> None:
    """torch.save stores its parts as they are: one that unpacks to more than the file is no such.

    Raises:
        ValueError: says both sizes.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > file.stat().st_size:
            raise ValueError(f"{file.stat().st_size} bytes that unpack to {size}")


def _refuse_hollow(file: Path, name: str, tensor: Tensor) -> None:
    """Strides of 0, sparse and meta tensors claim any number of elements and hold few."""
    is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    size = prod(tensor.shape) * tensor.element_size() if is_plain else 0
    if not is_plain or tensor.is_quantized or size > file.stat().st_size:
        raise UserError(
            f"Expected dense tensors in {file}, got {name!r:.80} of shape {list(tensor.shape)}, "
            f"{tensor.dtype}, {tensor.layout}, {tensor.device.type}."
        )
