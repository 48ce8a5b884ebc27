"""Files that somebody else may have made: read so that what is wrong with them is one sentence.

Sizes that a header claims are compared with the file, or bounded, before memory is asked for.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tokenize import TokenError  # numpy's, of the header of an array
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from sae_core.errors import CorruptFileError, UserError, reason

MAX_D_SAE = 1 << 26
"""Latents: four times the widest SAE that is published. Counts of so many fit any memory."""
BOMB_BYTES, BOMB_RATIO = 64 << 20, 250
"""A parquet file that unpacks to more of both is a bomb: real tables shrink to a tenth."""
_BAD = (
    SafetensorError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError, IndexError,
    OSError, OverflowError, RuntimeError, MemoryError, TokenError, SyntaxError,
)  # fmt: skip


@contextmanager
def reading(what: str, place: Path) -> Iterator[None]:
    """Turn whatever a damaged or hostile file sets off into one sentence.

    Args:
        what: was expected, e.g. ``an index``.
        place: file or folder, for the message.
    Raises:
        CorruptFileError: the block raised an error that bad content can cause.
    """
    try:
        yield
    except CorruptFileError:
        raise
    except PermissionError as error:
        raise UserError(f"Cannot read {place}: {error.strerror}.") from error
    except _BAD as error:
        told = str(error).rstrip(".") if isinstance(error, UserError) else reason(error)
        raise CorruptFileError(f"{place}: expected {what}, got {told}.") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CorruptFileError: it holds something else.
    """
    with reading("a JSON object", file):
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(type(found).__name__)
        return found


def map_array(file: Path) -> np.ndarray:
    """The array in a .npy file, mapped; never a pickle, and no larger than the file.

    numpy multiplies the shape in 64 bits, where 2^61 numbers of 8 bytes are 0 bytes and fit any
    file; a read of the last would be a crash.

    Raises:
        CorruptFileError: it holds something else.
    """
    with reading("an array", file):
        with open(file, "rb") as opened:
            version = np.lib.format.read_magic(opened)
            if version != (1, 0):
                raise ValueError(f"version {version}")
            shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
            check_room(shape, dtype.itemsize, file.stat().st_size - opened.tell())
        return np.load(file, mmap_mode="r", allow_pickle=False)


def read_array(file: Path) -> np.ndarray:
    """As ``map_array``, copied into memory."""
    return np.array(map_array(file))


def check_room(shape: Sequence[Any], itemsize: int, room: int) -> None:
    """Refuse a shape that needs more bytes than there are.

    Raises:
        ValueError: it does, or it is no shape.
    """
    if any(type(n) is not int or n < 0 for n in shape) or prod(shape) * itemsize > room:
        raise ValueError(f"shape {list(shape)!r:.100} of {itemsize} bytes each in {room} bytes")


def read_table(file: Path) -> pa.Table:
    """The table in a parquet file.

    Raises:
        CorruptFileError: it is damaged, or a bomb.
    """
    with reading("a whole parquet file", file), pq.ParquetFile(file) as opened:
        refuse_bomb(opened.metadata, file)
        table = opened.read()
        table.validate(full=True)  # texts in UTF-8, offsets within their buffers
        return table


def refuse_bomb(metadata: Any, file: Path) -> None:
    """Refuse a parquet file that unpacks to a multiple of its size which no real data reach.

    Only sizes of row groups are asked for: pyarrow looks at a column's metadata without a guard,
    and a damaged one ends the process (seen with size statistics, pyarrow 26).

    Raises:
        CorruptFileError: names both sizes.
    """
    size, packed = _unpacked(metadata), file.stat().st_size
    if size > BOMB_BYTES and size > BOMB_RATIO * packed:
        raise CorruptFileError(
            f"{file}: expected a file that unpacks to at most {BOMB_RATIO} times its size, got "
            f"{packed} bytes that claim {size}."
        )


def may_repeat(metadata: Any, file: Path) -> bool:
    """Whether a file shrank so much that one large value may stand in every row."""
    return _unpacked(metadata) > 20 * max(1 << 16, file.stat().st_size)


def _unpacked(metadata: Any) -> int:
    groups = range(metadata.num_row_groups)
    return sum(metadata.row_group(group).total_byte_size for group in groups)
