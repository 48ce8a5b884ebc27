"""Several SAEs on one stream: each is what it would be alone, and little is held."""

import dataclasses
import weakref
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core.activations import Activations
from sae_core.buffer import shuffle_stream, shuffle_streams
from sae_core.checkpoint import load_checkpoint, save_checkpoint
from sae_core.errors import UserError
from sae_core.gba import GBAConfig
from sae_core.loss import SparsityConfig
from sae_core.sae import SAE, SAEConfig
from sae_core.state import TrainConfig, TrainState
from sae_core.together import TrainJob, train_together
from sae_core.train import train

KINDS = ("gba", "topk", "batch_topk", "jumprelu", "relu")
SIZE, D_IN = 32, 16  # tokens a batch
CONFIG = TrainConfig(
    steps=30, batch_size=SIZE, lr=5e-3, init_tokens=4 * SIZE, log_every=5,
    gba=GBAConfig(4, 0.3, 0.05, calibrate_tokens=7 * SIZE),
    sparsity=SparsityConfig(dead_after_tokens=320),
)  # fmt: skip


def new(kind: str = "topk", d_sae: int = 48, seed: int = 0) -> SAE:
    config = SAEConfig(D_IN, d_sae, kind=kind, k=6)  # type: ignore[arg-type]
    return SAE(config, generator=torch.Generator().manual_seed(seed))


def stream(n: int, start: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[dict]:
    """Batches of two hook points, whose values follow from their number alone."""
    for number in range(start, n):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(SIZE, D_IN, generator=generator)
        rows, position = torch.arange(SIZE) + number * SIZE, torch.zeros(SIZE, dtype=torch.int32)
        parts = {"a": x, "b": 0.3 + x.relu(), "unread": x}
        yield {name: Activations(x.to(dtype), rows, position) for name, x in parts.items()}


def alone(job: TrainJob, n: int, dtype: torch.dtype = torch.float32) -> list:
    batches = (found[job.hook_point] for found in stream(n, dtype=dtype))
    return list(train(job.sae, batches, job.config, job.state))


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(v, b.tensors()[k]) for k, v in a.tensors().items())


def assert_as_alone(make: list[TrainJob], twins: list[TrainJob], n: int, **more) -> None:
    """Records and weights of all jobs together are those of each alone."""
    found: dict[str, list] = {job.name: [] for job in make}
    for name, record in train_together(make, stream(n, **more)):
        found[name].append(record)
    for job, twin in zip(make, twins, strict=True):
        assert alone(twin, n, **more) == found[job.name] != []
        assert same(job.sae, twin.sae) and job.state.step == job.config.steps
        assert not job.sae.training


def jobs_of_all_kinds() -> list[TrainJob]:
    """Kinds, widths, seeds, hook points, lengths, records and starts that differ."""
    jobs = [
        TrainJob(kind, new(kind, 48 + 8 * i), "ab"[i % 2], dataclasses.replace(
            CONFIG, steps=20 + 7 * i, log_every=3 + i, init_tokens=SIZE * (1 + 2 * i)))
        for i, kind in enumerate(KINDS)
    ]  # fmt: skip
    return [*jobs, TrainJob("another seed", new("gba", seed=1), "a", CONFIG)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_job_is_train_alone(dtype: torch.dtype) -> None:
    assert_as_alone(jobs_of_all_kinds(), jobs_of_all_kinds(), 60, dtype=dtype)


def test_a_stream_that_ends_cuts_the_calibration_alone() -> None:
    def make() -> list[TrainJob]:
        longer = dataclasses.replace(CONFIG, steps=33)
        return [
            TrainJob("x", new("gba"), "a", longer),
            TrainJob("y", new("gba", seed=1), "a", CONFIG),
        ]

    assert_as_alone(make(), make(), 34)
    cut, whole = make(), make()
    for jobs, n in ((cut, 34), (whole, 60)):
        for _ in train_together(jobs, stream(n)):
            pass
    assert not same(cut[0].sae, whole[0].sae)  # control: the calibration does read on


@settings(max_examples=10)
@given(
    st.lists(st.tuples(st.integers(1, 25), st.integers(1, 12), st.integers(1, 9)), min_size=1,
             max_size=4),
)  # fmt: skip
def test_any_lengths_go_together(shapes: list[tuple[int, int, int]]) -> None:
    def make() -> list[TrainJob]:
        return [
            TrainJob(str(i), new("gba", 16, i), "ab"[i % 2], dataclasses.replace(
                CONFIG, steps=steps, log_every=every, init_tokens=SIZE * head))
            for i, (steps, every, head) in enumerate(shapes)
        ]  # fmt: skip

    assert_as_alone(make(), make(), 40)


def test_no_more_is_held_than_a_job_reads_between_two_records() -> None:
    alive: set[int] = set()
    most = fetched = 0

    def watched() -> Iterator[dict]:
        nonlocal most, fetched
        for number in count():
            x = torch.randn(SIZE, D_IN, generator=torch.Generator().manual_seed(number))
            alive.add(number)
            weakref.finalize(x, alive.discard, number)
            most, fetched = max(most, len(alive)), fetched + 1
            found = {"a": x}
            del x
            yield found
            del found

    def jobs(steps: int) -> list[TrainJob]:
        kinds = ("gba", "topk", "gba")
        return [
            TrainJob(str(i), new(kind, 16, i), "a", dataclasses.replace(CONFIG, steps=steps * 2**i))
            for i, kind in enumerate(kinds)
        ]

    for _ in train_together(jobs(20), watched()):
        pass
    short, most = most, 0
    assert fetched == 80 + 7 - 1  # the longest job's steps and calibration; the last batch counts
    for _ in train_together(jobs(60), watched()):
        pass
    # log_every and the calibration, and the one batch that each suspended training is at
    assert most <= 5 + 7 + 3 and short <= 5 + 7 + 3
    assert len(alive) <= 1


def test_jobs_resume_where_each_stopped(tmp_path: Path) -> None:
    whole = jobs_of_all_kinds()
    records = list(train_together(whole, stream(60)))
    half = jobs_of_all_kinds()
    for number, (name, _) in enumerate(train_together(half, stream(60))):
        job = next(job for job in half if job.name == name)
        save_checkpoint(tmp_path / name, job.sae, job.state, job.config)
        if number == 19:
            break
    loaded = []
    for job in half:
        found = load_checkpoint(tmp_path / job.name, job.config)
        assert found is not None
        loaded.append(dataclasses.replace(job, sae=found[0], state=found[1]))
    steps = [job.state.step for job in loaded]
    assert len(set(steps)) > 2
    rest = list(train_together(loaded, stream(60, start=min(steps)), start_step=min(steps)))
    for job, other in zip(whole, loaded, strict=True):
        assert same(job.sae, other.sae)
        done = [r for name, r in records if name == job.name]
        assert [r for name, r in rest if name == job.name] == done[
            -len([r for n, r in rest if n == job.name]) :
        ]
    assert len(rest) == len(records) - 20


def test_a_finished_job_reads_nothing() -> None:
    job = TrainJob("x", new(), "a", CONFIG)
    for _ in train_together([job], stream(30)):
        pass
    assert list(train_together([job], iter([]))) == []


def test_bad_jobs_are_refused_at_the_call() -> None:
    job = TrainJob("x", new(), "a", CONFIG)
    with pytest.raises(UserError, match="at least one job to train, got none"):
        train_together([], stream(9))
    for other, what in (
        (TrainJob("x", new(), "a", CONFIG), "names"),
        (TrainJob("y", job.sae, "a", CONFIG), "SAEs"),
        (TrainJob("y", new(), "a", CONFIG, job.state), "states"),
    ):
        with pytest.raises(UserError, match=f"different {what}, got one of them twice in x, "):
            train_together([job, other], stream(9))
    with pytest.raises(UserError, match="from step 0 of 'x' on or earlier, got one from step 3"):
        train_together([job], stream(9), start_step=3)


def test_bad_streams_are_refused() -> None:
    with pytest.raises(UserError, match="hook point 'c' in the stream, got those of a, b, unread"):
        list(train_together([TrainJob("x", new(), "c", CONFIG)], stream(9)))
    with pytest.raises(UserError, match="batches for 30 steps, got 9"):
        list(train_together([TrainJob("x", new(), "a", CONFIG)], stream(9)))
    assert TrainState().step == 0


# ---- one permutation for several hook points ----


@settings(max_examples=25)
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 9), st.integers(0, 30))
def test_one_permutation_serves_all_hook_points(sizes: list[int], batch: int, extra: int) -> None:
    def items() -> Iterator[dict]:
        first = 0
        for n in sizes:
            rows = torch.arange(first, first + n)
            x, position = rows[:, None].float(), rows.int() % 5
            yield {"a": Activations(x, rows, position), "b": Activations(-x, rows, position)}
            first += n

    got = list(shuffle_streams(items(), batch, batch + extra, 3))
    for name in "ab":
        single = shuffle_stream((found[name] for found in items()), batch, batch + extra, 3)
        for found, other in zip(got, single, strict=True):
            assert torch.equal(found[name].x, other.x)
            assert torch.equal(found[name].row_id, other.row_id)
            assert torch.equal(found[name].position, other.position)
    for found in got:
        assert torch.equal(found["a"].row_id, found["b"].row_id)
        assert torch.equal(found["a"].x, -found["b"].x)
        assert torch.equal(found["a"].x[:, 0].long(), found["a"].row_id)
    drawn = [row for found in got for row in found["b"].row_id.tolist()]
    assert sorted(drawn) == list(range(sum(sizes)))


def test_hook_points_that_do_not_go_together_are_refused() -> None:
    x, rows, zero = torch.ones(4, 2), torch.arange(4), torch.zeros(4, dtype=torch.int32)
    one, other = Activations(x, rows, zero), Activations(x, rows + 1, zero)
    with pytest.raises(UserError, match="same tokens at all hook points, got others at 'b' than"):
        list(shuffle_streams([{"a": one, "b": other}], 2, 4, 0))
    with pytest.raises(UserError, match=r"hook points \['a'\], then came \['a', 'b'\]"):
        list(shuffle_streams([{"a": one}, {"a": one, "b": one}], 2, 4, 0))
    with pytest.raises(UserError, match="needs 1 <= batch_size"):
        shuffle_streams([], 5, 4, 0)
