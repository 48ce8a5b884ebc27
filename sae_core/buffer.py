"""Shuffled batches: random access with a keyed permutation, or a mixing buffer for streams.

The permutation of [0, N) is a Feistel network (Luby and Rackoff 1988) on the smallest power of
two that holds N, with cycle walking (Black and Rogaway 2002) to stay inside N. It needs no array
of length N and answers "what is at place p" at once, so that a run resumes at any step.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_core.activations import Activations
from sae_core.errors import UserError
from sae_core.prefetch import prefetch

__all__ = ["batches", "permute", "prefetch", "shuffle_stream", "shuffle_streams"]

# Each round changes one half only; 12 leave no visible structure in the tests of displacement
# and serial correlation, and cost under 1 ms for a batch of 4,096 places.
_ROUNDS = 12


@runtime_checkable
class IndexedActivations(Protocol):
    """Stored activations with random access, e.g. ``ShardedActivations``."""

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor) -> Activations: ...


def permute(places: NDArray[np.uint64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where a keyed permutation of [0, n) sends each place.

        (L, R) -> (L xor f(R, k_1), R) -> (L xor f(R, k_1), R xor f(L', k_2)) -> ...

    repeated until the result is below ``n`` (less than two walks on average).

    Args:
        places: [m] places in [0, n).
        n: size of the domain, at least 1.
        keys: one key a round.
    """
    bits = (n - 1).bit_length()
    out = places.astype(np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        out[todo] = _feistel(out[todo], bits, keys)
        todo = todo[out[todo] >= np.uint64(n)]
    return out


def _feistel(value: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    low_bits = np.uint64((bits + 1) // 2)
    masks = (np.uint64((1 << int(low_bits)) - 1), np.uint64((1 << bits // 2) - 1))
    halves = [value & masks[0], value >> low_bits]
    for number, key in enumerate(keys):
        side = number % 2
        halves[side] ^= _mix(halves[1 - side] + key) & masks[side]
    return halves[0] | (halves[1] << low_bits)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), whose high bits are the best."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _shuffled_indices(first: int, count: int, n: int, seed: int) -> NDArray[np.int64]:
    """Places ``first .. first + count`` of the endless shuffled sequence of epochs over [0, n)."""
    parts = []
    while count:
        epoch, place = divmod(first, n)
        take = min(count, n - place)
        state = np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64)
        keys = state.astype(np.uint64)
        parts.append(permute(np.arange(place, place + take, dtype=np.uint64), n, keys))
        first, count = first + take, count - take
    return np.concatenate(parts).astype(np.int64)


def batches(
    source: IndexedActivations | Activations | Tensor,
    batch_size: int,
    *,
    seed: int,
    epochs: int | None = None,
    start_step: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Activations]:
    """Batches of exactly ``batch_size`` tokens in an order shuffled anew in every epoch.

    Batch ``s`` holds the places ``s * batch_size ..`` of the sequence of epochs: a batch at the
    seam of two epochs takes from both, every token comes once an epoch, and ``start_step=s``
    yields what the full iterator yields from its batch ``s`` on, without computing the rest.

    Args:
        source: stored activations, activations in memory, or a plain matrix [n, d_in] (its row
            ids are then 0 .. n-1 and its positions 0).
        batch_size: tokens a batch.
        seed: at least 0; the order is a function of it alone.
        epochs: passes over the source; None for ever. What does not fill a last batch is left out.
        start_step: number of the first batch.
        part: (i, n) gives the tokens i, i + n, ... of each batch, for one of n processes that share
            it; only these are read.

    Raises:
        UserError: empty source, a size below 1, fewer tokens in all than one batch, or a batch that
            n processes cannot share equally.
    """
    n = len(source)
    if batch_size < 1 or n < 1 or seed < 0 or start_step < 0:
        raise UserError(
            "batches() needs batch_size >= 1, at least one token, seed >= 0 and start_step >= 0, "
            f"got batch_size {batch_size}, {n} tokens, seed {seed}, start_step {start_step}."
        )
    if epochs is not None and epochs * n < batch_size:
        raise UserError(
            f"One batch takes {batch_size} tokens, but {epochs} epochs of {n} tokens hold "
            f"{epochs * n}."
        )
    if not 0 <= part[0] < part[1] or batch_size % part[1]:
        raise UserError(
            f"Expected a batch size that is a multiple of the {part[1]} processes which share it, "
            f"got {batch_size} for part {part[0]}."
        )
    return _batches(source, n, batch_size, seed, epochs, start_step, part)


def _batches(
    source: IndexedActivations | Activations | Tensor,
    n: int,
    batch_size: int,
    seed: int,
    epochs: int | None,
    start_step: int,
    part: tuple[int, int],
) -> Iterator[Activations]:
    step, (own, n_parts) = start_step, part
    while epochs is None or (step + 1) * batch_size <= epochs * n:
        indices = _shuffled_indices(step * batch_size, batch_size, n, seed)
        yield _take(source, indices[own::n_parts])
        step += 1


def _take(
    source: IndexedActivations | Activations | Tensor, indices: NDArray[np.int64]
) -> Activations:
    index = torch.from_numpy(indices)
    if isinstance(source, Tensor):
        position = torch.zeros(index.shape, dtype=torch.int32)
        return Activations(source.index_select(0, index.to(source.device)), index, position)
    if isinstance(source, Activations):
        return source.select(index)
    return source.gather(index)


def shuffle_stream(
    stream: Iterable[Activations], batch_size: int, buffer_tokens: int, seed: int
) -> Iterator[Activations]:
    """Shuffle a stream through a mixing buffer of ``buffer_tokens`` tokens.

    The buffer is filled, a random batch is drawn out of it without replacement, the room is
    filled again, and so on; at the end the rest is drawn. Every token comes out exactly once. A
    token can come out only while it is in the buffer: the order is local where the stream is long.

    Args:
        stream: activations of one d_in and dtype.
        batch_size: tokens a batch; only the very last batch may be smaller.
        buffer_tokens: memory in tokens, at least ``batch_size``.
        seed: at least 0.

    Raises:
        UserError: sizes that do not fit each other, or a stream whose d_in or dtype changes.
    """
    alone = ({"": item} for item in stream)
    mixed = shuffle_streams(alone, batch_size, buffer_tokens, seed)
    return (found[""] for found in mixed)


def shuffle_streams(
    stream: Iterable[Mapping[str, Activations]], batch_size: int, buffer_tokens: int, seed: int
) -> Iterator[dict[str, Activations]]:
    """``shuffle_stream`` for several hook points: one permutation serves them all.

    A batch holds the same tokens, in the same order, at every hook point, and each hook point gets
    the batches that ``shuffle_stream`` would make of it alone.

    Args:
        stream: activations by hook point, as ``stream_activations`` yields them: the same hook
            points in every item, and the same tokens at all of them.
        batch_size: tokens a batch; only the very last batch may be smaller.
        buffer_tokens: memory in tokens at each hook point, at least ``batch_size``.
        seed: at least 0.

    Raises:
        UserError: sizes that do not fit each other, a stream whose hook points, d_in or dtype
            change, or hook points with different tokens.
    """
    if not 1 <= batch_size <= buffer_tokens:
        raise UserError(
            "shuffle_stream() needs 1 <= batch_size <= buffer_tokens, got batch_size "
            f"{batch_size} and buffer_tokens {buffer_tokens}."
        )
    return _mixed(stream, batch_size, buffer_tokens, np.random.default_rng(seed))


def _mixed(
    stream: Iterable[Mapping[str, Activations]],
    batch_size: int,
    capacity: int,
    rng: np.random.Generator,
) -> Iterator[dict[str, Activations]]:
    held: dict[str, Activations] = {}
    filled = 0
    for items in stream:
        if not held:
            held = {name: _room(item, capacity) for name, item in items.items()}
        done, n = 0, _n_tokens(held, items)
        while done < n:
            take = min(capacity - filled, n - done)
            for name, item in items.items():
                for into, new in zip(_fields(held[name]), _fields(item), strict=True):
                    into[filled : filled + take] = new[done : done + take]
            filled, done = filled + take, done + take
            if filled == capacity:
                yield _draw(held, filled, batch_size, rng)
                filled -= batch_size
    while filled:
        size = min(batch_size, filled)
        yield _draw(held, filled, size, rng)
        filled -= size


def _n_tokens(held: Mapping[str, Activations], items: Mapping[str, Activations]) -> int:
    """How many tokens came, checked to fit what is held and to be the same at all hook points."""
    if items.keys() != held.keys() or not items:
        raise UserError(
            f"The stream began with the hook points {sorted(held)}, then came {sorted(items)}."
        )
    first = next(iter(items.values()))
    for name, item in items.items():
        kept = held[name]
        if item.x.shape[1:] != kept.x.shape[1:] or item.x.dtype != kept.x.dtype:
            raise UserError(
                f"The stream began with d_in {kept.d_in} in {kept.x.dtype}, then came d_in "
                f"{item.d_in} in {item.x.dtype}."
            )
        if not all(map(torch.equal, _fields(item)[1:], _fields(first)[1:])):
            raise UserError(
                f"Expected the same tokens at all hook points, got others at {name!r} than at "
                f"{next(iter(items))!r}."
            )
    return len(first)


def _fields(item: Activations) -> tuple[Tensor, Tensor, Tensor]:
    return item.x, item.row_id, item.position


def _room(like: Activations, capacity: int) -> Activations:
    return Activations(*(f.new_zeros((capacity, *f.shape[1:])) for f in _fields(like)))


def _draw(
    held: Mapping[str, Activations], filled: int, size: int, rng: np.random.Generator
) -> dict[str, Activations]:
    """Take ``size`` random tokens out of the first ``filled`` and close the holes from the tail."""
    chosen = rng.choice(filled, size=size, replace=False)
    batch = {name: item.select(torch.from_numpy(chosen)) for name, item in held.items()}
    kept = filled - size
    holes = torch.from_numpy(np.sort(chosen[chosen < kept]))
    tail = torch.from_numpy(np.setdiff1d(np.arange(kept, filled), chosen, assume_unique=True))
    for item in held.values():
        for field in _fields(item):
            field[holes.to(field.device)] = field[tail.to(field.device)]
    return batch
