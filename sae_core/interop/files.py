"""Read and check the files of other libraries: present, whole, the names and shapes expected."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_core.errors import CorruptFileError, UserError, reason

Shapes = Mapping[str, tuple[int, ...]]


def need_files(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder without these files.

    Raises:
        UserError: names what is expected and what lies there.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UserError(f"Expected a folder at {folder}, got {found}.")
    if all((folder / name).is_file() for name in names):
        return
    present = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(present[:8]) + (" and more" if len(present) > 8 else "")
    raise UserError(f"Expected {' and '.join(names)} in {folder}, got {shown or 'no files'}.")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CorruptFileError: not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{file} is not valid JSON: {reason(error)}.") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{file} must hold a JSON object, got {type(value).__name__}.")
    return value


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU.

    Raises:
        CorruptFileError: not a whole safetensors file.
    """
    try:
        return load_file(file)
    except Exception as error:  # safetensors and torch share no base class of theirs
        raise CorruptFileError(
            f"{file} is not a whole safetensors file: {reason(error)}."
        ) from error


def need(config: Mapping[str, Any], key: str, kind: type, file: Path) -> Any:
    """The value of a key that must be there and have a type.

    Raises:
        UserError: absent or another type.
    """
    value = config.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{file} must give {key} as {kind.__name__}, got {value!r}.")
    return value


def check_tensors(file: Path, found: Mapping[str, Tensor], shapes: Shapes) -> None:
    """Refuse other names or shapes than expected, and values that are not finite real numbers.

    Raises:
        UserError: says what was expected and what came.
    """
    if set(found) != set(shapes):
        raise UserError(f"{file} must hold the tensors {sorted(shapes)}, got {sorted(found)}.")
    for name, shape in shapes.items():
        if tuple(found[name].shape) != shape:
            raise UserError(
                f"{name} in {file} must have shape {list(shape)}, got {list(found[name].shape)}."
            )
        if found[name].is_complex():
            raise UserError(f"{name} in {file} must hold real numbers, got {found[name].dtype}.")
        n_bad = int((~torch.isfinite(found[name].double())).sum())
        if n_bad:
            raise UserError(
                f"{name} in {file} must hold finite numbers, got {n_bad} that are NaN or infinite."
            )


def dtype_note(tensors: Mapping[str, Tensor], library: str) -> tuple[str, ...]:
    """A sentence where the file's numbers are not float32, in which this program computes."""
    names = {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.ndim == 2}
    if names <= {"float32"}:
        return ()
    what = "rounded" if names == {"float64"} else "held exactly"
    return (
        f"The matrices are {', '.join(sorted(names))} and {what} in float32; {library} computes in "
        "the dtype of the file, so its codes differ by the rounding of that dtype.",
    )
