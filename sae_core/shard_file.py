"""One shard of activations: a safetensors file, written part by part and read by memory map."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae_core.activations import Activations
from sae_core.disk import replaced_file
from sae_core.errors import CorruptFileError, reason
from sae_core.untrusted import check_room

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# safetensors' name of each dtype, and a numpy type of the same bytes (numpy has no bfloat16)
_STORED = {"float32": ("F32", "<f4"), "bfloat16": ("BF16", "<u2"), "float16": ("F16", "<f2")}
_KEYS = {"row_id": ("I64", "<i8"), "position": ("I32", "<i4")}
_HEADER_BYTES = 8


@dataclass(frozen=True)
class Shard:
    """One finished shard, as its line of the journal says."""

    file: str
    tokens: int
    bytes: int
    sha256: str
    rows: int
    """Rows of the text that are done when this shard ends."""
    chunks: int
    """Chunks of the next row that are done."""


def write_shard(path: Path, parts: list[dict[str, Activations]], dtype: str) -> tuple[str, int]:
    """Write one safetensors file part by part (no second copy in memory); its sha256 and size."""
    tokens = [next(iter(part.values())) for part in parts]
    n = sum(len(item) for item in tokens)
    columns: list[tuple[str, tuple[str, str], list[int], list[Tensor]]] = [
        ("row_id", _KEYS["row_id"], [n], [item.row_id for item in tokens]),
        ("position", _KEYS["position"], [n], [item.position for item in tokens]),
        *(
            (name, _STORED[dtype], [n, parts[0][name].d_in], [part[name].x for part in parts])
            for name in parts[0]
        ),
    ]
    header, offset = {}, 0
    for name, (kind, numpy_type), shape, _ in columns:
        size = int(np.prod(shape)) * np.dtype(numpy_type).itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_BYTES)  # keeps every matrix aligned
    blocks = chain(
        (len(text).to_bytes(_HEADER_BYTES, "little"), text),
        (_as_bytes(tensor, kind) for _, (_, kind), _, tensors in columns for tensor in tensors),
    )
    return _write_blocks(path, blocks), _HEADER_BYTES + len(text) + offset


def _write_blocks(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Write a file under another name, wait for the disk, rename; its sha256."""
    digest = hashlib.sha256()
    with replaced_file(path, path.with_name(f".{path.name}.tmp")) as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def _as_bytes(tensor: Tensor, numpy_type: str) -> memoryview:
    tensor = tensor.contiguous()
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return bits.numpy().astype(numpy_type, copy=False).data.cast("B")


def check_size(folder: Path, shard: Shard) -> None:
    """Refuse a shard that is gone or has another size than when it was written.

    Raises:
        CorruptFileError: names the file.
    """
    path = folder / shard.file
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing: expected {shard.bytes} bytes.")
    if path.stat().st_size != shard.bytes:
        raise CorruptFileError(f"{path}: expected {shard.bytes} bytes, got {path.stat().st_size}.")


def check_digest(folder: Path, shard: Shard) -> None:
    """Read a whole shard and refuse it if a byte is not what was written.

    Raises:
        CorruptFileError: names the file.
    """
    with open(folder / shard.file, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        raise CorruptFileError(
            f"{folder / shard.file} was altered: expected sha256 {shard.sha256}, got {digest}."
        )


def map_shard(
    path: Path, n: int, hook_point: str, dtype: str
) -> tuple[np.memmap, np.memmap, np.memmap]:
    """Map x (16-bit integers for bfloat16), row_id and position of a shard with ``n`` tokens.

    Raises:
        CorruptFileError: the header does not describe such a shard.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_HEADER_BYTES), "little")
            if length > path.stat().st_size:  # before so many bytes are asked for
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        base = _HEADER_BYTES + length
        keys = {name: numpy_type for name, (_, numpy_type) in _KEYS.items()}
        columns = {hook_point: _STORED[dtype][1]} | keys
        for name, kind in columns.items():
            room = path.stat().st_size - base - header[name]["data_offsets"][0]
            check_room(header[name]["shape"], np.dtype(kind).itemsize, room)
        maps = [
            np.memmap(
                path,
                dtype=kind,
                mode="r",
                offset=base + header[name]["data_offsets"][0],
                shape=tuple(header[name]["shape"]),
            )
            for name, kind in columns.items()
        ]
        if any(len(stored) != n for stored in maps):
            raise ValueError(f"{len(maps[0])} tokens instead of {n}")
        if maps[0].ndim != 2 or any(stored.ndim != 1 for stored in maps[1:]):
            raise ValueError(f"values of shape {list(maps[0].shape)}")
    except (ValueError, LookupError, TypeError, OverflowError, OSError, RecursionError) as error:
        raise CorruptFileError(f"{path}: expected a shard, got {reason(error)}.") from error
    return maps[0], maps[1], maps[2]
