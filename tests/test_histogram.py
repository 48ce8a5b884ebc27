"""Hurdle histograms: bins, streaming, merging, and counts under permuted labels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_apps.suppression.histogram import EdgeSketch, HurdleCounts, bin_of
from sae_apps.suppression.permuted import PermutedCounts, permuted_labels
from sae_apps.suppression.sample import BottomK
from sae_core.errors import UserError
from sae_core.kernels.codes import codes_where


def sparse_values(n: int = 400, u: int = 12, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    fires = random.random((n, u)) < np.linspace(0.02, 0.9, u)
    return np.where(fires, random.exponential(size=(n, u)), 0.0).astype(np.float32)


def as_codes(values: np.ndarray):
    x = torch.from_numpy(values)
    return codes_where(x > 0, x)


def edges_of(values: np.ndarray, n_bins: int = 8, **options) -> np.ndarray:
    sketch = EdgeSketch(values.shape[1], n_bins, **options)
    sketch.update(values)
    return sketch.compute()


@given(
    st.integers(0, 40),
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=30),
    st.integers(0, 1000),
)
def test_bins_are_those_of_searchsorted(n_edges: int, given_values: list[float], seed: int) -> None:
    random = np.random.default_rng(seed)
    edges = np.sort(random.choice(np.linspace(-2, 2, 9), (3, n_edges))).astype(np.float32)
    values = np.array(given_values, dtype=np.float32)
    unit = random.integers(0, 3, len(values))
    expected = [
        1 + np.searchsorted(edges[j], v, side="right") for j, v in zip(unit, values, strict=True)
    ]
    assert bin_of(values, unit, edges, has_atom=False).tolist() == expected
    with_atom = np.where(values > 0, expected, 0)
    assert bin_of(values, unit, edges).tolist() == with_atom.tolist()
    tensors = (torch.from_numpy(values), torch.from_numpy(unit), torch.from_numpy(edges))
    assert bin_of(*tensors).tolist() == with_atom.tolist()


def test_a_value_on_an_edge_lies_above_it() -> None:
    edges = np.array([[1.0, 2.0]], dtype=np.float32)
    values = np.array([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 9.0], dtype=np.float32)
    unit = np.zeros(7, dtype=np.int64)
    assert bin_of(values, unit, edges).tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert bin_of(values, unit, edges, has_atom=False).tolist() == [1, 1, 1, 2, 2, 3, 3]


def test_counts_by_hand() -> None:
    edges = np.array([[1.0], [np.inf]], dtype=np.float32)
    counts = HurdleCounts(edges, ["no", "yes"])
    values = np.array([[0.5, 0.0], [2.0, 0.0], [0.0, 0.0], [3.0, 0.0]], dtype=np.float32)
    counts.update(values, np.array([0, 0, 0, 1]))
    found = counts.compute()
    assert found.counts[0].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert found.counts[1].tolist() == [[3, 0, 0], [1, 0, 0]]
    assert found.n.tolist() == [3, 1]
    assert found.live.tolist() == [True, False]
    np.testing.assert_allclose(found.mean()[0], [2.5 / 3, 3.0])
    np.testing.assert_allclose(found.variance()[0], [float(np.var([0.5, 2, 0])), 0.0], atol=1e-12)
    rest = found.against_rest("yes")
    assert rest.classes == ("yes", "rest") and rest.counts[0].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert found.select(["yes", "no"]).n.tolist() == [1, 3]


def test_edges_are_quantiles_of_the_positive_values() -> None:
    values = sparse_values(4000, 6)
    edges = edges_of(values, n_bins=4, per_unit=5000)
    for j in range(6):
        positive = np.sort(values[values[:, j] > 0, j])
        assert edges[j].tolist() == [positive[len(positive) * i // 4] for i in (1, 2, 3)]
    sampled = edges_of(values, n_bins=4, per_unit=400)
    shares = [float((values[values[:, 5] > 0, 5] < edge).mean()) for edge in sampled[5]]
    # a quantile of 400 values is off by 0.025 (standard deviation) at most
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.75], atol=0.1)
    assert not np.array_equal(sampled, edges_of(values, n_bins=4, per_unit=400, seed=1))


def test_a_sample_is_bounded_and_uniform() -> None:
    sample = BottomK(2, 100, seed=0)
    for start in range(0, 10_000, 1000):
        value = np.arange(start, start + 1000, dtype=np.float32)
        sample.update(np.zeros(1000, dtype=np.int64), value)
    sample.update(np.ones(7, dtype=np.int64), np.arange(7, dtype=np.float32))
    unit, value = sample.compute()
    assert np.bincount(unit).tolist() == [100, 7]
    # the mean of 100 uniform values has a standard deviation of 289
    assert abs(value[unit == 0].mean() - 5000) < 900


def test_units_of_both_signs_have_bins_over_the_whole_range() -> None:
    values = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    edges = edges_of(values, n_bins=4, has_atom=False, per_unit=1000)
    assert (edges[:, 0] < 0).all() and (edges[:, 2] > 0).all()
    counts = HurdleCounts(edges, ["a", "b"], has_atom=False)
    counts.update(values, np.arange(600) % 2)
    found = counts.compute()
    assert not found.counts[:, :, 0].any()
    assert (found.counts.sum(axis=1)[:, 1:] == 150).all()


def test_streaming_equals_all_at_once_sparse_or_dense() -> None:
    values, labels = sparse_values(900), np.arange(900) % 3
    whole = EdgeSketch(12, 8, per_unit=50)
    parts = EdgeSketch(12, 8, per_unit=50)
    whole.update(values)
    for some in np.array_split(np.arange(900), 7):
        parts.update(as_codes(values[some]))
    edges = whole.compute()
    np.testing.assert_array_equal(edges, parts.compute())
    one, many = (HurdleCounts(edges, ["a", "b", "c"]) for _ in range(2))
    one.update(values, labels)
    for some in np.array_split(np.arange(900), 7):
        many.update(as_codes(values[some]), torch.from_numpy(labels[some]))
    np.testing.assert_array_equal(one.compute().counts, many.compute().counts)
    np.testing.assert_allclose(one.compute().square, many.compute().square)


def test_merging_is_associative() -> None:
    values, labels = sparse_values(900), np.arange(900) % 3
    parts = np.array_split(np.arange(900), 3)

    def sketch(i: int) -> EdgeSketch:
        made = EdgeSketch(12, 8, seed=i, per_unit=40)
        made.update(values[parts[i]])
        return made

    left, right, tail = sketch(0), sketch(0), sketch(1)
    left.merge(sketch(1))
    left.merge(sketch(2))
    tail.merge(sketch(2))
    right.merge(tail)
    np.testing.assert_array_equal(left.compute(), right.compute())
    edges = left.compute()
    all_labels = np.stack([labels, labels[::-1]])

    def counts(index: np.ndarray) -> tuple[HurdleCounts, PermutedCounts]:
        made = HurdleCounts(edges, ["a", "b", "c"]), PermutedCounts(edges, all_labels, 3)
        made[0].update(values[index], labels[index])
        made[1].update(values[index], index)
        return made

    together, merged = counts(np.arange(900)), counts(parts[0])
    for part in parts[1:]:
        for mine, other in zip(merged, counts(part), strict=True):
            mine.merge(other)  # type: ignore[arg-type]
    np.testing.assert_array_equal(together[0].compute().counts, merged[0].compute().counts)
    np.testing.assert_array_equal(together[1].compute().counts, merged[1].compute().counts)


@pytest.mark.parametrize("has_atom", [True, False])
def test_counts_under_permuted_labels_are_those_of_relabelled_tokens(has_atom: bool) -> None:
    values = sparse_values(600) if has_atom else sparse_values(600) - 0.5
    item = np.sort(np.random.default_rng(1).integers(0, 60, 600))
    labels = permuted_labels(np.arange(60) % 3, None, 5, seed=0)
    edges = edges_of(values, has_atom=has_atom)
    found = PermutedCounts(edges, labels, 3, has_atom)
    for some in np.array_split(np.arange(600), 4):
        found.update(as_codes(values[some]) if has_atom else values[some], item[some])
    permuted = found.compute()
    for p in range(5):
        direct = HurdleCounts(edges, ["a", "b", "c"], has_atom)
        direct.update(values, labels[p][item])
        np.testing.assert_array_equal(
            permuted.counts[:, :, p], direct.compute().counts.transpose(0, 2, 1)
        )
        np.testing.assert_array_equal(permuted.n[p], direct.compute().n)
        np.testing.assert_array_equal(
            permuted.against_rest(1).counts[:, :, p],
            direct.compute().against_rest("b").counts.transpose(0, 2, 1),
        )


def test_labels_move_with_what_is_exchangeable() -> None:
    codes = np.array([0, 1, 0, 1, 0, 1, 0, 0, 1, 1])
    free = permuted_labels(codes, None, 50, 0)
    assert (np.sort(free, axis=1) == np.sort(codes)).all() and len(np.unique(free, axis=0)) > 30
    pairs = permuted_labels(codes[:6], np.array([0, 0, 1, 1, 2, 2]), 50, 0)
    assert (pairs.reshape(50, 3, 2).sum(axis=2) == 1).all() and len(np.unique(pairs, axis=0)) == 8
    blocks = permuted_labels(np.array([0, 0, 1, 1, 1, 0]), np.array([5, 5, 3, 3, 3, 4]), 50, 0)
    assert (blocks[:, 0] == blocks[:, 1]).all() and (np.ptp(blocks[:, 2:5], axis=1) == 0).all()
    assert len(np.unique(blocks, axis=0)) == 3
    mixed = permuted_labels(np.array([0, 1, 0, 1, 0]), np.array([0, 0, 1, 2, 3]), 50, 0)
    assert (mixed[:, :2].sum(axis=1) == 1).all() and (mixed[:, 2:].sum(axis=1) == 1).all()
    assert len(np.unique(mixed, axis=0)) == 6
    assert np.array_equal(free, permuted_labels(codes, None, 50, 0))
    assert not np.array_equal(free, permuted_labels(codes, None, 50, 1))


def test_bad_input() -> None:
    edges = np.zeros((2, 3), dtype=np.float32)
    counts = HurdleCounts(edges, ["a", "b"])
    ok = np.ones((4, 2), dtype=np.float32)
    with pytest.raises(UserError, match="one label for each of 4 tokens, got \\[3\\]"):
        counts.update(ok, np.zeros(3, dtype=int))
    with pytest.raises(UserError, match="labels between 0 and 1, got 2"):
        counts.update(ok, np.array([0, 1, 2, 0]))
    with pytest.raises(UserError, match="values of 2 units, got 3"):
        counts.update(np.ones((4, 3)), np.zeros(4, dtype=int))
    with pytest.raises(UserError, match="finite values, got nan"):
        counts.update(ok * np.nan, np.zeros(4, dtype=int))
    with pytest.raises(UserError, match="got sparse codes"):
        HurdleCounts(edges, ["a", "b"], has_atom=False).update(as_codes(ok), np.zeros(4, dtype=int))
    with pytest.raises(UserError, match="each once"):
        HurdleCounts(edges, ["a", "a"])
    with pytest.raises(UserError, match="one of the concepts a, b, got 'c'"):
        counts.compute().against_rest("c")
    with pytest.raises(UserError, match="same edges"):
        counts.merge(HurdleCounts(edges + 1, ["a", "b"]))
    with pytest.raises(UserError, match="shape \\[tokens, units\\], got \\[4\\]"):
        counts.update(np.ones(4), np.zeros(4, dtype=int))
    with pytest.raises(UserError, match="sample of at least the bins"):
        EdgeSketch(3, 16, per_unit=8)
    with pytest.raises(UserError, match="at most 4 GiB, got"):
        PermutedCounts(np.zeros((100_000, 63)), np.zeros((1000, 4), dtype=int), 2)
    with pytest.raises(UserError, match="between 0 and 3, got"):
        PermutedCounts(edges, np.zeros((2, 4), dtype=int), 2).update(ok, np.array([0, 1, 2, 4]))


def test_sums_do_not_depend_on_the_batches_in_the_last_bit() -> None:
    values = sparse_values(3000, 5)
    labels, edges = np.arange(3000) % 3, edges_of(values, n_bins=4, per_unit=100)
    whole, parts = (HurdleCounts(edges, ["a", "b", "c"]) for _ in range(2))
    whole.update(values, labels)
    for rows in np.array_split(np.arange(3000), 11):
        parts.update(values[rows], labels[rows])
    assert np.array_equal(parts.compute().total, whole.compute().total)
    assert np.array_equal(parts.compute().square, whole.compute().square)
