"""Hostile variants of a file of torch.save: its archive, the pickle in it, the tensors."""

import io
import struct
import zipfile
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.fuzz_mutate import HUGE, Rng, mutate_bytes, pick

NAMES = (b"torch._utils _rebuild_sparse_tensor", b"torch._utils _rebuild_meta_tensor_no_storage",
         b"torch DoubleStorage", b"torch ByteStorage", b"collections OrderedDict", b"posix system",
         b"builtins eval", b"torch._utils _rebuild_parameter", b"numpy dtype")  # fmt: skip
# Pickles in full: a program, two billion references to one list, lists in lists, a number.
PROGRAM = b"cposix\nsystem\n(S'true'\ntR."
LAUGHS = b"]q\x00" + b"".join(b"(" + b"h\x00" * 10 + b"lq\x00" for _ in range(9)) + b"."
DEEP = b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."
NUMBER = b"\x80\x02K\x01."
ODD: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: torch.zeros((), dtype=t.dtype).expand(1 << 20, 1 << 20),  # a header, no data
    lambda t: torch.zeros((), dtype=t.dtype).expand(1 << 31),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.int8),
    lambda t: t.bool(),
    lambda t: t.half(),
    lambda t: t.float() * torch.nan,
    lambda t: t.float() * 1e30,
    lambda t: -t,
    lambda t: t[None],
    lambda t: t.T if t.ndim == 2 else t,
    lambda t: torch.nn.Parameter(t.float()),
    lambda t: torch.zeros(0, dtype=t.dtype),
)


def mutate_state(content: bytes, rng: Rng) -> bytes:
    """A changed byte, part of the archive, pickle or tensor; the checksums of the archive fit."""
    match int(rng.integers(6)):
        case 0:
            return mutate_bytes(content, rng)
        case 1:
            return _with_pickle(content, lambda old: mutate_bytes(old, rng))
        case 2:
            return _with_pickle(content, lambda old: _claim(old, rng))
        case 3:
            whole = pick(rng, (PROGRAM, LAUGHS, DEEP, NUMBER))
            return whole if rng.random() < 0.3 else _with_pickle(content, lambda _: whole)
        case 4:
            return _with_bomb(content)
        case _:
            return _with_odd_tensor(content, rng)


def _with_pickle(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    return _rewritten(content, "data.pkl", change)


def _with_bomb(content: bytes) -> bytes:
    """The data of the first tensor as 4 MiB of zeros, which deflate to 4 KiB."""
    return _rewritten(content, "data/0", lambda _: bytes(4 << 20), zipfile.ZIP_DEFLATED)


def _rewritten(
    content: bytes, suffix: str, change: Callable[[bytes], bytes], method: int = zipfile.ZIP_STORED
) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for part in old.infolist():
            data = old.read(part)
            is_it, name = part.filename.endswith(suffix), zipfile.ZipInfo(part.filename)  # no time
            new.writestr(name, change(data) if is_it else data, method if is_it else None)
    return out.getvalue()


def _claim(pickled: bytes, rng: Rng) -> bytes:
    """Another small integer (a size, a stride, an offset) or another global."""
    if rng.random() < 0.5:
        places = [i for i, byte in enumerate(pickled[:-1]) if byte == ord("K")]
        place = pick(rng, places)
        if rng.random() < 0.4:
            return pickled[: place + 1] + rng.bytes(1) + pickled[place + 2 :]
        number = pick(rng, (HUGE, 1 << 40, 1 << 33, 1 << 31, -1))
        return pickled[:place] + b"\x8a\x08" + struct.pack("<q", number) + pickled[place + 2 :]
    starts = [i for i, byte in enumerate(pickled) if pickled[i : i + 6] == b"ctorch"]
    place = pick(rng, starts)
    end = pickled.index(b"\n", pickled.index(b"\n", place) + 1)
    return pickled[:place] + b"c" + pick(rng, NAMES).replace(b" ", b"\n") + pickled[end:]


def _with_odd_tensor(content: bytes, rng: Rng) -> bytes:
    state = torch.load(io.BytesIO(content), weights_only=True)
    name = pick(rng, sorted(state))
    out = io.BytesIO()
    torch.save(state | {name: pick(rng, ODD)(state[name])}, out)
    return out.getvalue()
