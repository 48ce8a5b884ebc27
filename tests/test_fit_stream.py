"""Fitting in bounded memory: blocks on disk, sums over blocks, one pass of the model."""

import errno
import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from sae_apps.suppression import choice, sample, scratch
from sae_apps.suppression.bins import bin_of
from sae_apps.suppression.calibration import CalibrationSums
from sae_apps.suppression.choice import Separation, separation
from sae_apps.suppression.fit import Fit, FitConfig, fit_report
from sae_apps.suppression.histogram import Histogram
from sae_apps.suppression.scratch import TokenFile, read_values
from sae_apps.suppression.tokens import TokenValues, histogram_of
from sae_apps.suppression.units import open_units
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.errors import UserError
from sae_core.models import LanguageModel
from sae_core.sae import SAE
from sae_core.text import rows_from_texts
from tests.tiny_models import mirror_sae

POINT = "layers.3.out"
NAMES = ("Lily", "Tom", "Sue", "Ben", "Mia", "Tim", "Sam", "Anna")
SAD = [f"{a} was sad at the {b}. {a} cried." for a in NAMES for b in ("park", "sea", "hill")]
HAPPY = [f"{a} was happy at the {b}. {a} laughed." for a in NAMES for b in ("park", "sea", "hill")]
NEUTRAL = [f"{a} went to the {b}. {a} saw a tree." for a in NAMES for b in ("park", "sea", "hill")]
TEXTS, LABELS = SAD + HAPPY, ["sad"] * len(SAD) + ["happy"] * len(HAPPY)
ROUNDING = 1e-12  # sums of float64 in another order


def planted(seed: int, has_atom: bool = True) -> tuple[TokenValues, np.ndarray]:
    """60 texts of 3 classes, 2 to 11 tokens each; unit 0 of 12 is larger in class 2."""
    rng = np.random.default_rng(seed)
    label = np.arange(60) % 3
    text = np.repeat(np.arange(60), rng.integers(2, 12, 60))
    value = rng.normal(size=(len(text), 12)).astype(np.float32)
    value[:, 0] += 1.5 * (label[text] == 2)
    value[:, 11] = 0.0
    token, unit = np.nonzero(value > 0) if has_atom else np.indices(value.shape).reshape(2, -1)
    return TokenValues(token, unit, value[token, unit], text, 12, has_atom), label


def pieces(values: TokenValues, cuts: list[int]) -> list[TokenValues]:
    place = np.searchsorted(cuts, np.arange(len(values.text)), side="right")
    return [values.select(place == i) for i in range(len(cuts) + 1)]


@contextmanager
def small_blocks(patch: pytest.MonkeyPatch, n_values: int = 3000) -> Iterator[None]:
    """Blocks, cells and waiting samples that even a small fit fills many times."""
    with patch.context() as inner:
        inner.setattr(scratch, "_VALUES", n_values)
        inner.setattr(choice, "_CELLS", 1 << 13)
        inner.setattr(choice, "_CACHED", 1 << 11)
        inner.setattr(sample, "_SLACK", 1 << 12)
        yield


# --- blocks on disk ---------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=6).map(sorted), st.integers(1, 900))
def test_what_is_read_back_is_what_was_appended(cuts: list[int], size: int) -> None:
    values, _ = planted(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "_VALUES", size)
        file = TokenFile(12, True)
        for piece in pieces(values, cuts):
            file.append(piece)
        for _ in range(2):
            n, found = 0, []
            for block in file:
                found.append((block.token + n, block.unit, block.value, block.text))
                n += len(block.text)
            got = [np.concatenate(part) for part in zip(*found, strict=True)]
            expected = (values.token, values.unit, values.value, values.text)
            for one, other in zip(got, expected, strict=True):
                np.testing.assert_array_equal(one, other)
        file.close()


def test_the_file_has_no_name_and_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_VALUES", 100)
    values, _ = planted(0)
    file = TokenFile(12, True)
    file.append(values)
    assert sum(len(block.value) for block in file) == len(values.value) > 100
    assert os.fstat(file._file.fileno()).st_size > 8 * len(values.value)
    assert not list(tmp_path.iterdir())
    file.close()

    class Full:
        def seek(self, *_: Any) -> None: ...

        def write(self, _: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = TokenFile(12, True)
    full.close()
    full._file = Full()  # pyright: ignore[reportAttributeAccessIssue] - a disk without room
    with pytest.raises(UserError, match=f"holds {tmp_path} is full"):
        full.append(values)


def test_one_pass_of_the_model_parts_the_texts(tiny_lm: LanguageModel) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    units, config = open_units(tiny_lm, hook_point=POINT, kind="residual"), HarvestConfig()
    train = np.arange(len(TEXTS)) % 3 > 0
    handle = tiny_lm.model.base_model.register_forward_pre_hook(count)
    try:
        rows = rows_from_texts(TEXTS)
        whole = [found[POINT] for found in stream_activations(tiny_lm, rows, [POINT], config)]
        once, calls = calls, 0
        with read_values(tiny_lm, units, TEXTS, train, config) as (fitted, held_out):
            sides = [list(fitted), list(held_out)]
        assert calls == once > 0
        calls = 0
        fit_report(tiny_lm, None, TEXTS, LABELS, "sad", hook_point=POINT, kind="residual",
                   config=FitConfig(permutations=19))  # fmt: skip
        assert calls == once
    finally:
        handle.remove()
    x = torch.cat([one.x for one in whole]).numpy()
    text = torch.cat([one.row_id for one in whole]).numpy()
    for blocks, mine in zip(sides, (train[text], ~train[text]), strict=True):
        np.testing.assert_array_equal(np.concatenate([one.text for one in blocks]), text[mine])
        dense = np.concatenate([one.of_units(np.arange(64)) for one in blocks])
        np.testing.assert_array_equal(dense, x[mine])


# --- sums over blocks -------------------------------------------------------------------------


def oracle(
    values: TokenValues, hist: Histogram, label: np.ndarray, texts: np.ndarray, seed: int
) -> Separation:
    """Everything in memory, unit by unit and permutation by permutation."""
    rng, members = np.random.default_rng(seed), np.flatnonzero(texts)
    dense = values.of_units(np.arange(12))
    drawn = [label == 2]
    for _ in range(19):
        one = np.zeros(len(label), dtype=bool)
        one[members] = drawn[0][rng.permutation(members)]
        drawn.append(one)
    jsd, d_prime = np.zeros((12, 20)), np.zeros(12)
    for j in range(12):
        place = bin_of(dense[:, j], np.full(len(dense), j), hist.edges, values.has_atom)
        for p, one in enumerate(drawn):
            mine = one[values.text]
            inside, outside = (np.bincount(place[side], minlength=6) for side in (mine, ~mine))
            jsd[j, p] = jensenshannon(inside, outside, base=2) ** 2
        a, b = dense[label[values.text] == 2, j], dense[label[values.text] != 2, j]
        sd = np.sqrt((a.var(dtype=float) + b.var(dtype=float)) / 2)
        d_prime[j] = (a.mean(dtype=float) - b.mean(dtype=float)) / sd if sd else 0.0
    jsd = np.nan_to_num(jsd)
    mean, sd = jsd.mean(axis=1), jsd.std(axis=1)
    z = (jsd - mean[:, None]) / np.where(sd > 1e-9, sd, np.inf)[:, None]
    p = (1 + (z[:, 1:].max(axis=0) >= z[:, :1] - 1e-9).sum(axis=1)) / 20
    distance = np.sqrt(np.maximum(0, jsd[:, 0] - jsd[:, 1:].mean(axis=1)))
    return Separation(distance, np.where(sd > 1e-9, p, 1.0), d_prime, 19)


@pytest.mark.parametrize("has_atom", [True, False])
def test_blocks_give_the_separation_of_the_whole(
    has_atom: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three units at a time, and blocks that cut texts in two."""
    values, label = planted(3, has_atom)
    texts = np.arange(60) % 5 > 0
    values = values.select(texts[values.text])
    blocks = pieces(values, [7, 8, 100, 217])
    assert any(set(a.text) & set(b.text) for a, b in zip(blocks, blocks[1:], strict=False))
    hist = histogram_of(blocks, label, ("a", "b", "c"), n_bins=5, seed=0)
    whole = histogram_of([values], label, ("a", "b", "c"), n_bins=5, seed=0)
    for name in ("edges", "counts", "n", "total", "square"):
        np.testing.assert_array_equal(getattr(hist, name), getattr(whole, name))
    monkeypatch.setattr(choice, "_CELLS", 3 * 5 * 20)
    monkeypatch.setattr(choice, "_CACHED", 2 * 5 * 20)
    rng = np.random.default_rng(4)
    got = separation(blocks, hist, label, texts, ["c"], permutations=19, rng=rng)
    expected = oracle(values, hist, label, texts, 4)
    np.testing.assert_allclose(got.distance, expected.distance, atol=1e-8)
    np.testing.assert_array_equal(got.p_value, expected.p_value)
    np.testing.assert_allclose(got.d_prime, expected.d_prime, atol=1e-6)  # squares of float32
    assert got.p_value[0] == 0.05 < got.p_value[1:].min()  # the planted one, and no other
    assert got.p_value[11] == 1  # never varies


def test_calibration_is_that_of_weighted_tokens() -> None:
    rng = np.random.default_rng(0)
    label, prior = rng.integers(0, 2, 500) * 2, np.array([0.5, 0.2, 0.3])  # none of class 1
    evidence = rng.normal(size=(500, 3)).astype(np.float32) + 0.8 * (label == 2)[:, None]
    sums = CalibrationSums(3, prior, np.array([False, False, True]))
    for part in np.split(np.arange(500), [3, 3, 350]):
        sums.update(evidence[part], label[part])
    got = sums.compute()
    assert got is not None and got.n_tokens == 500
    weight = (prior / np.maximum(np.bincount(label), 1))[label]
    weight, sign, logit = weight / weight.sum(), np.where(label == 2, 1, -1), np.log(0.3 / 0.7)

    def loss(odds: np.ndarray) -> float:
        return float(weight @ np.log1p(np.exp(-sign * (logit + odds))))

    joint = evidence.sum(axis=1, dtype=float)
    assert got.gate_loss == pytest.approx(loss(got.temperature * joint), abs=ROUNDING)
    assert got.gate_loss <= min(loss(t * joint) for t in np.geomspace(0.01, 2, 40)) + ROUNDING
    assert got.prior_loss == pytest.approx(loss(np.zeros(500)), abs=ROUNDING)
    np.testing.assert_allclose(got.loss, [loss(one) for one in evidence.T], atol=1e-7)
    p = 1 / (1 + np.exp(-logit - got.temperature * joint))
    for i in np.flatnonzero(got.weight):
        mine = (p * 10).astype(int) == i
        assert got.weight[i] == pytest.approx(weight[mine].sum())
        assert got.predicted[i] == pytest.approx(weight[mine] @ p[mine] / weight[mine].sum())
        assert got.observed[i] == pytest.approx(weight[mine & (label == 2)].sum() / got.weight[i])
    nothing = CalibrationSums(3, prior, np.array([False, False, True]))
    nothing.update(evidence[label == 2], label[label == 2])
    assert nothing.compute() is None


def test_a_unit_that_tells_nothing_has_exactly_the_loss_of_the_prior() -> None:
    """Else rounding would decide whether it is dropped."""
    sums = CalibrationSums(3, np.array([0.3, 0.7]), np.array([True, False]))
    rng = np.random.default_rng(0)
    for n in (7, 1000):
        evidence = rng.normal(size=(n, 3)).astype(np.float32) * [1, 0, 1]
        sums.update(evidence.astype(np.float32), rng.integers(0, 2, n))
    got = sums.compute()
    assert got is not None and got.loss[1] == got.prior_loss != got.loss[0]


# --- the whole fit ----------------------------------------------------------------------------


def fitted(lm: LanguageModel, sae: SAE | None, times: int = 1, **more: Any) -> Fit:
    kind = "residual" if sae is None else "latents"
    return fit_report(
        lm, sae, TEXTS * times, LABELS * times, "sad", NEUTRAL * times,
        hook_point=POINT, kind=kind, config=FitConfig(permutations=20, **more),
    )  # fmt: skip


@pytest.mark.parametrize("latents", [True, False])
def test_the_size_of_blocks_changes_nothing(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, latents: bool
) -> None:
    sae = mirror_sae() if latents else None
    whole = fitted(tiny_lm, sae)
    with small_blocks(monkeypatch):
        parts = fitted(tiny_lm, sae)
    assert whole.app.units.n_units > 4
    for name in ("edges", "weights", "evidence", "neutral"):
        assert torch.equal(getattr(parts.app, name), getattr(whole.app, name))
    assert whole.app.units.index is not None and parts.app.units.index is not None
    assert torch.equal(parts.app.units.index, whole.app.units.index)
    for name in ("distance", "p_value", "d_prime"):
        one, other = getattr(parts.separation, name), getattr(whole.separation, name)
        np.testing.assert_array_equal(one, other)
    assert parts.calibration is not None and whole.calibration is not None
    for name in ("loss", "gate_loss", "temperature", "predicted", "observed", "weight"):
        one, other = getattr(parts.calibration, name), getattr(whole.calibration, name)
        np.testing.assert_allclose(one, other, atol=ROUNDING)


def test_memory_does_not_grow_with_the_texts(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(times: int) -> int:
        tracemalloc.start()
        fitted(tiny_lm, None, times, n_units=8)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    with small_blocks(monkeypatch, 1 << 14):
        once, often = peak(2), peak(10)
    values = 8 * 12 * 64 * 12 * len(TEXTS + NEUTRAL)  # bytes of what the added texts say at least
    assert values > 5 * 2**20
    assert often - once < values / 10
    monkeypatch.setattr(scratch, "_VALUES", 1 << 30)  # control: one block that holds everything
    monkeypatch.setattr(scratch, "_TOKENS", 1 << 30)
    assert peak(10) - once > values
