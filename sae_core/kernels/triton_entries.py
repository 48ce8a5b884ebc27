"""From bits to compressed rows: counts, places, and the entries that survive a second look.

Every place follows from a running sum over the row, so the entries come out by token, then by
latent, whatever order the programs run in. The host must learn one number, how many entries there
are. `codes_from_bits` writes into reserved room and slices it afterwards: the host waits for that
number only after all kernels are queued, and a batch that needs more room than was reserved is
written again in room of the right size. Nothing is cut off and the product is not repeated.
"""

from collections.abc import Callable
from math import inf
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32
from torch import Tensor

from sae_core.kernels.codes import Codes
from sae_core.kernels.triton_launch import launch, power_of_2

WORDS = 2048  # words of a row that a program holds at once
SLOTS = 256  # entries of a row that a program holds at once


@triton.jit
@no_type_check
def _ones(word):
    """How many bits of each uint32 word are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
@no_type_check
def _row_counts(bits, count, words, WIDTH: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, words, WIDTH):
        word = tl.load(bits + i * words + start + lane, mask=start + lane < words, other=0)
        total += _ones(word.to(tl.uint32, bitcast=True))
    tl.store(count + i, tl.sum(total, 0).to(tl.int64))


@triton.jit
@no_type_check
def _entries(bits, crow, row, col, words, room, WIDTH: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    at = tl.load(crow + i)
    for start in range(0, words, WIDTH):
        word = tl.load(bits + i * words + start + lane, mask=start + lane < words, other=0)
        word = word.to(tl.uint32, bitcast=True)
        ones = _ones(word)
        place = at + tl.cumsum(ones, 0) - ones
        # the lowest bit of every word at once, until none is left: one to three rounds as a rule
        for _ in range(0, tl.max(ones, 0)):
            mask = (word != 0) & (place < room)
            bit = _ones(word ^ (word - 1)) - 1
            tl.store(row + place, tl.zeros((WIDTH,), tl.int64) + i, mask=mask)
            tl.store(col + place, ((start + lane) * 32 + bit).to(tl.int64), mask=mask)
            word = word & (word - 1)
            place += 1
        at += tl.sum(ones, 0)


@triton.jit
@no_type_check
def _kept_counts(crow, values, count, room, low, WIDTH: tl.constexpr):
    i = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    end = tl.minimum(tl.load(crow + i + 1), room)
    total = tl.zeros((WIDTH,), tl.int32)
    for start in range(tl.load(crow + i), end, WIDTH):
        value = tl.load(values + start + lane, mask=start + lane < end, other=-float("inf"))
        total += (value > low).to(tl.int32)
    tl.store(count + i, tl.sum(total, 0).to(tl.int64))


@triton.jit
@no_type_check
def _keep(
    crow, col, values, kept, new_row, new_col, new_values, room, low, WIDTH: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    end = tl.minimum(tl.load(crow + i + 1), room)
    at = tl.load(kept + i)
    for start in range(tl.load(crow + i), end, WIDTH):
        inside = start + lane < end
        value = tl.load(values + start + lane, mask=inside, other=-float("inf"))
        latent = tl.load(col + start + lane, mask=inside, other=0)
        stays = value > low
        one = stays.to(tl.int32)
        place = at + tl.cumsum(one, 0) - one
        tl.store(new_row + place, tl.zeros((WIDTH,), tl.int64) + i, mask=stays)
        tl.store(new_col + place, latent, mask=stays)
        tl.store(new_values + place, value, mask=stays)
        at += tl.sum(one, 0)


def _width(words: int) -> int:
    return min(WORDS, power_of_2(words))


def _starts(count: Tensor) -> Tensor:
    crow = count.new_zeros(count.shape[0] + 1)
    torch.cumsum(count, 0, out=crow[1:])
    return crow


def row_starts_of_bits(bits: Int32[Tensor, "n words"]) -> Int[Tensor, "n_plus_1"]:
    """Row starts of the set bits; reference: ``cumsum(active.sum(1))`` with a leading 0."""
    n, words = bits.shape
    count = bits.new_empty(n, dtype=torch.int64)
    launch(_row_counts, (n,), bits, count, words, WIDTH=_width(words))
    return _starts(count)


def entries_of_bits(
    bits: Int32[Tensor, "n words"], crow: Int[Tensor, "n_plus_1"], room: int
) -> tuple[Int[Tensor, "room"], Int[Tensor, "room"]]:
    """Token and latent of every set bit, by token, then by latent; the first `room` of them.

    Reference: ``active.nonzero(as_tuple=True)``. Places behind the last entry hold 0.
    """
    row, col = bits.new_zeros((2, room), dtype=torch.int64)
    n, words = bits.shape
    if room:
        launch(_entries, (n,), bits, crow, row, col, words, room, WIDTH=_width(words))
    return row, col


def keep_above(codes: Codes, low: float) -> Codes:
    """Entries with a value above `low`, packed, in room of the same size; see `Codes.keep`.

    Its row starts count what was kept; no host is asked, so the room is not cut to size.
    """
    n, room = codes.n, codes.col.shape[0]
    count = codes.crow.new_zeros(n)
    launch(_kept_counts, (n,), codes.crow, codes.values, count, room, low, WIDTH=SLOTS)
    crow = _starts(count)
    row, col = codes.crow.new_zeros((2, room))
    values = torch.zeros_like(codes.values)
    if room:
        launch(
            _keep, (n,), codes.crow, codes.col, codes.values, crow, row, col, values, room, low,
            WIDTH=SLOTS,
        )  # fmt: skip
    return Codes(crow, row, col, values, codes.d_sae)


class _Later:
    """Numbers on their way to the host; `read` waits for them and for nothing queued after."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.event = numbers, None
        if numbers.is_cuda:
            self.event = torch.cuda.Event()
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.event.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return self.numbers.tolist()


def codes_from_bits(
    bits: Int32[Tensor, "n words"],
    d_sae: int,
    room: int,
    value_of: Callable[[Codes], Float[Tensor, "room"]],
    low: float | None,
    most: float = inf,
) -> Codes | None:
    """Codes of the set bits with their values; those not above `low` are left out.

    Args:
        room: entries expected; more are detected and written again in room enough.
        value_of: values of codes that may end in unused places, which it must leave alone.
        low: None: every set bit stays.
        most: set bits above which there are no codes but None.
    """
    crow = row_starts_of_bits(bits)
    while True:
        row, col = entries_of_bits(bits, crow, room)
        codes = Codes(crow, row, col, row.new_zeros(room, dtype=torch.float32), d_sae)
        codes = codes.with_values(value_of(codes))
        if low is not None:
            codes = keep_above(codes, low)
        found, stayed = _Later(torch.stack([crow[-1], codes.crow[-1]])).read()
        if found <= room:
            return Codes(
                codes.crow, codes.row[:stayed], codes.col[:stayed], codes.values[:stayed], d_sae
            )
        if found > most:
            return None
        room = found
