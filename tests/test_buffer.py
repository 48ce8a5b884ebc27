"""Shuffled batches, the mixing buffer and prefetching."""

import threading
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sae_core.activations import Activations
from sae_core.buffer import batches, permute, prefetch, shuffle_stream
from sae_core.errors import UserError

# A uniform permutation fails a test at this level once in 10,000 seeds; the seeds are fixed.
P_VALUE = 1e-4
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 1000, 1023, 1024, 1025, 4095, 4097]


def tokens(n: int, d: int = 3) -> Activations:
    """Every vector tells its own row."""
    x = torch.arange(n, dtype=torch.float32)[:, None].expand(n, d).contiguous()
    return Activations(x, torch.arange(n) + 1000, torch.arange(n, dtype=torch.int32) % 7)


def order(n: int, seed: int, epochs: int = 1, size: int = 1) -> np.ndarray:
    source = torch.arange(n, dtype=torch.float32)[:, None]
    return torch.cat([b.row_id for b in batches(source, size, seed=seed, epochs=epochs)]).numpy()


# --- the permutation ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_every_place_comes_once_an_epoch(n: int) -> None:
    for seed in (0, 1):
        assert np.array_equal(np.sort(order(n, seed, size=n)), np.arange(n))


@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1), rounds=st.integers(1, 12))
def test_any_keys_permute(n: int, key: int, rounds: int) -> None:
    keys = np.arange(rounds, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    image = permute(np.arange(n, dtype=np.uint64), n, keys)
    assert np.array_equal(np.sort(image), np.arange(n, dtype=np.uint64))


def test_a_domain_beyond_32_bits() -> None:
    n = 2**40 + 7
    keys = np.arange(12, dtype=np.uint64)
    image = permute(np.arange(n - 1000, n, dtype=np.uint64), n, keys)
    assert image.max() < n and len(set(image.tolist())) == 1000
    assert (image > 2**39).mean() == pytest.approx(0.5, abs=0.1)


def test_seeds_and_epochs_differ_and_the_same_seed_does_not() -> None:
    assert np.array_equal(order(1000, 0, size=100), order(1000, 0, size=100))
    assert (order(1000, 0, size=100) == order(1000, 1, size=100)).mean() < 0.02
    two = order(1000, 0, epochs=2, size=100)
    assert (two[:1000] == two[1000:]).mean() < 0.02


def test_the_permutation_looks_uniform() -> None:
    """Displacement, neighbours, and where a few places go over many seeds."""
    for n in (1000, 1024, 4097):
        for seed in range(3):
            image = order(n, seed, size=n)
            moved = (image - np.arange(n)) % n
            counts = np.bincount(moved * 20 // n, minlength=20)
            assert stats.chisquare(counts).pvalue > P_VALUE
            assert stats.spearmanr(image[:-1], image[1:]).pvalue > P_VALUE
            steps = np.bincount((np.diff(image) % n) * 20 // n, minlength=20)
            assert stats.chisquare(steps).pvalue > P_VALUE
    for n in (3, 5, 10):
        first = np.array([order(n, seed, size=n) for seed in range(500)])
        for place in range(n):
            assert stats.chisquare(np.bincount(first[:, place], minlength=n)).pvalue > P_VALUE


def test_small_domains_reach_every_order() -> None:
    seen = {tuple(order(4, seed, size=4)) for seed in range(600)}
    assert len(seen) == 24


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 7, 33, 34, 60])
def test_a_late_start_continues_the_full_iterator(start: int) -> None:
    source = tokens(101)
    whole = list(islice(batches(source, 3, seed=5), 80))
    late = list(islice(batches(source, 3, seed=5, start_step=start), 20))
    for a, b in zip(whole[start : start + 20], late, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.row_id, b.row_id) and torch.equal(a.position, b.position)


def test_a_late_start_ends_where_the_full_iterator_ends() -> None:
    assert len(list(batches(tokens(10), 4, seed=0, epochs=3))) == 7  # 30 tokens, 2 left out
    assert len(list(batches(tokens(10), 4, seed=0, epochs=3, start_step=5))) == 2
    assert list(batches(tokens(10), 4, seed=0, epochs=3, start_step=9)) == []


def test_batches_are_full_and_each_epoch_is_complete() -> None:
    got = list(batches(tokens(10), 4, seed=3, epochs=4))
    assert [len(b) for b in got] == [4] * 10
    rows = torch.cat([b.row_id for b in got]).reshape(4, 10) - 1000
    assert all(sorted(epoch) == list(range(10)) for epoch in rows.tolist())


def test_a_batch_may_span_several_epochs() -> None:
    got = next(batches(tokens(3), 8, seed=0))
    assert sorted(torch.bincount(got.row_id - 1000).tolist()) == [2, 3, 3]


def test_rows_stay_with_their_vectors() -> None:
    for batch in batches(tokens(50), 8, seed=0, epochs=2):
        assert torch.equal(batch.x[:, 0].long() + 1000, batch.row_id)
        assert torch.equal(batch.x[:, 0].int() % 7, batch.position)


def test_a_plain_matrix_numbers_its_rows() -> None:
    source = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for batch in batches(source, 6, seed=0, epochs=1):
        assert torch.equal(batch.x, source[batch.row_id])
        assert batch.x.dtype == torch.bfloat16
        assert not batch.position.any()


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (0, {}, "0 tokens"),
        (5, {"batch_size": 0}, "batch_size 0"),
        (5, {"seed": -1}, "seed -1"),
        (5, {"start_step": -1}, "start_step -1"),
        (5, {"batch_size": 11, "epochs": 2}, "takes 11 tokens, but 2 epochs of 5 tokens hold 10"),
    ],
)
def test_bad_sizes(n: int, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        batches(tokens(n), **{"batch_size": 2, "seed": 0, **options})


# --- the mixing buffer --------------------------------------------------------------------------


def stream(sizes: list[int]) -> Iterator[Activations]:
    whole, start = tokens(sum(sizes)), 0
    for size in sizes:
        yield whole.select(torch.arange(start, start + size))
        start += size


@given(
    sizes=st.lists(st.integers(0, 40), max_size=8),
    batch=st.integers(1, 12),
    extra=st.integers(0, 30),
    seed=st.integers(0, 3),
)
def test_every_token_comes_out_once(sizes: list[int], batch: int, extra: int, seed: int) -> None:
    got = list(shuffle_stream(stream(sizes), batch, batch + extra, seed))
    assert all(len(b) == batch for b in got[:-1])
    rows = [row for b in got for row in b.row_id.tolist()]
    assert sorted(rows) == list(range(1000, 1000 + sum(sizes)))
    for b in got:
        assert torch.equal(b.x[:, 0].long() + 1000, b.row_id)
        assert torch.equal(b.x[:, 0].int() % 7, b.position)


def mixed(seed: int) -> list[int]:
    return [r for b in shuffle_stream(stream([50] * 20), 10, 200, seed) for r in b.row_id.tolist()]


def test_the_stream_is_shuffled_by_its_seed() -> None:
    assert mixed(0) == mixed(0)
    assert mixed(0) != mixed(1)
    correlation = stats.spearmanr(mixed(0)[:200], np.arange(200)).statistic
    assert abs(correlation) < 0.9  # within one filling of the buffer the order is not the stream's


def test_memory_is_bounded_by_the_buffer() -> None:
    """A batch comes out as soon as the buffer is full: the source is never read far ahead."""
    taken = 0

    def source() -> Iterator[Activations]:
        nonlocal taken
        for item in stream([10] * 100):
            taken += 10
            yield item

    for given_out, batch in enumerate(shuffle_stream(source(), 5, 50, 0)):
        assert len(batch) == 5
        assert taken <= 50 + 5 * given_out + 10


def test_batches_do_not_change_after_they_were_given_out() -> None:
    got = list(shuffle_stream(stream([30, 30, 30]), 7, 20, 0))
    assert all(torch.equal(b.x[:, 0].long() + 1000, b.row_id) for b in got)


def test_bad_buffers_and_streams() -> None:
    for batch, room in ((0, 5), (6, 5)):
        with pytest.raises(UserError, match=f"batch_size {batch} and buffer_tokens {room}"):
            shuffle_stream(stream([5]), batch, room, 0)
    other = Activations(torch.zeros(2, 9), torch.arange(2), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(UserError, match="d_in 3 in torch.float32, then came d_in 9"):
        list(shuffle_stream([*stream([5]), other], 2, 5, 0))


# --- prefetch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 100])
def test_order_is_kept(size: int) -> None:
    assert list(prefetch(range(50), size)) == list(range(50))
    assert list(prefetch([], size)) == []


@pytest.mark.parametrize("size", [0, 1, 5])
def test_exceptions_come_in_their_place(size: int) -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise UserError("third")

    got = []
    with pytest.raises(UserError, match="third"):
        for item in prefetch(source(), size):
            got.append(item)
    assert got == [1, 2]


def test_work_is_done_ahead_but_not_too_far() -> None:
    made: list[int] = []
    ready = threading.Event()

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 3:
                ready.set()
            yield number

    items = prefetch(source(), 2)
    assert next(items) == 0
    # without another next(): 1 and 2 wait in the queue, 3 in the hand of the thread
    assert ready.wait(timeout=10)
    items.close()  # type: ignore[attr-defined]
    assert len(made) <= 5  # closing makes room once


def test_the_thread_ends_and_the_source_is_closed_when_the_consumer_stops() -> None:
    before = threading.active_count()
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            closed.set()

    for item in (items := prefetch(source(), 2)):
        if item == 5:
            break
    assert threading.active_count() == before + 1
    items.close()  # type: ignore[attr-defined]
    assert closed.is_set() and threading.active_count() == before


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(UserError, match="got -1"):
        prefetch([1], -1)
