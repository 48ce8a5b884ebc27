"""Posterior tables: the formula, what must be exactly zero, priors, and several concepts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_apps.suppression.histogram import Histogram
from sae_apps.suppression.posterior import (
    attenuation,
    log_odds,
    posterior,
    posterior_tables,
    smooth,
)
from sae_core.errors import UserError

ROUNDING = 1e-6  # tables are float32


def histogram(counts: np.ndarray, n: list[int], *, has_atom: bool = True) -> Histogram:
    """counts [u, c, B] of the bins; the atom is the rest of n."""
    whole = np.zeros((*counts.shape[:2], counts.shape[2] + 1), dtype=np.int64)
    whole[:, :, 1:] = counts
    whole[:, :, 0] = (np.array(n) - counts.sum(axis=2)) if has_atom else 0
    edges = np.tile(np.arange(1, counts.shape[2], dtype=np.float32), (len(counts), 1))
    zero = np.zeros(counts.shape[:2])
    names = tuple("abcdef"[: counts.shape[1]])
    return Histogram(whole, np.array(n), edges, names, zero, zero, has_atom)


def random(seed: int, u: int = 5, c: int = 3, b: int = 4) -> Histogram:
    return histogram(np.random.default_rng(seed).integers(0, 30, (u, c, b)), [150] * c)


@given(st.integers(0, 1000))
def test_posteriors_sum_to_one(seed: int) -> None:
    p = posterior(posterior_tables(random(seed), {"a": 1, "b": 5, "c": 0.2}))
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-12)


def test_the_table_is_the_formula() -> None:
    """One unit by hand: Jeffreys rate, 1-2-1 kernel, pseudo-token of the pooled density."""
    hist = histogram(np.array([[[8, 0, 0], [0, 0, 2]]]), [10, 20])
    tables = posterior_tables(hist, alpha=1.0)
    q = np.array([6, 2.5, 1.5]) / 10
    g = np.array([(np.array([6, 2, 0]) + q) / 9, (np.array([0, 0.5, 1.5]) + q) / 3])
    r = np.array([8.5 / 11, 2.5 / 21])
    f = np.concatenate([1 - r[:, None], r[:, None] * g], axis=1)
    np.testing.assert_allclose(np.exp(tables.log_mass[0]), f, rtol=ROUNDING)
    np.testing.assert_allclose(np.exp(tables.log_mass[0]).sum(axis=1), 1, rtol=ROUNDING)
    p = f[0] / f.sum(axis=0)
    expected = np.clip((p - 0.5) / 0.5, 0, 1)
    expected[0] = 0
    np.testing.assert_allclose(attenuation(tables, ["a"])[0], expected, atol=ROUNDING)
    literal = attenuation(tables, ["a"], "posterior")[0]
    np.testing.assert_allclose(literal, [0, *p[1:]], atol=ROUNDING)
    np.testing.assert_allclose(log_odds(tables, ["a"])[0], np.log(f[0] / f[1]), atol=1e-5)


@given(st.integers(0, 1000), st.floats(0.01, 0.98))
def test_a_unit_with_equal_counts_is_left_alone_exactly(seed: int, prior: float) -> None:
    one = np.random.default_rng(seed).integers(0, 40, (4, 1, 5))
    rest = (1 - prior) / 2
    tables = posterior_tables(
        histogram(np.repeat(one, 3, axis=1), [200] * 3), {"a": prior, "b": rest, "c": rest}
    )
    assert not attenuation(tables, ["a"]).any()
    assert not attenuation(tables, ["a", "c"]).any()
    literal = attenuation(tables, ["a"], "posterior")[:, 1:]
    np.testing.assert_allclose(literal, prior, rtol=ROUNDING)  # the control: not left alone


def test_firing_alone_tells_as_much_as_it_should() -> None:
    """Fires on 60% of a and 1% of b, with the same values: only the hurdle can tell."""
    shape = np.full(4, 25)
    tables = posterior_tables(histogram(np.array([[shape * 12, shape // 5]]), [2000, 2000]))
    assert attenuation(tables, ["a"])[0, 1:].min() > 0.9
    assert not attenuation(tables, ["b"])[0, 1:].any()


def test_several_concepts_make_one_weight() -> None:
    tables = posterior_tables(random(3))
    p = posterior(tables)
    both = attenuation(tables, ["a", "c"], "posterior")[:, 1:]
    np.testing.assert_allclose(both, (p[:, 0] + p[:, 2])[:, 1:], rtol=ROUNDING)
    pi = 2 / 3
    expected = np.clip((p[:, 0] + p[:, 2] - pi) / (1 - pi), 0, 1)[:, 1:]
    np.testing.assert_allclose(attenuation(tables, ["a", "c"])[:, 1:], expected, atol=ROUNDING)


def test_a_rare_class_needs_more_evidence() -> None:
    hist = random(4, c=2)
    even, rare = (
        attenuation(posterior_tables(hist, prior), ["a"], "posterior")[:, 1:]
        for prior in (None, {"a": 0.01, "b": 0.99})
    )
    assert (rare < even).all()


def test_few_positives_lean_on_all_classes() -> None:
    counts = np.array([[[0, 3, 0, 0], [100, 100, 100, 100]]])
    hist = histogram(counts, [3, 400])
    weak, strong = (np.exp(posterior_tables(hist, alpha=a).log_mass[0, 0, 1:]) for a in (1e-3, 1e3))
    assert weak[3] < 1e-3 * weak.sum()
    np.testing.assert_allclose(strong / strong.sum(), 0.25, atol=0.01)


def test_bins_far_apart_do_not_underflow() -> None:
    counts = np.array([[[10**6, 0, 0, 0, 0], [0, 0, 0, 0, 10**6]]])
    tables = posterior_tables(histogram(counts, [10**6, 10**6]), alpha=1e-300)
    w = attenuation(tables, ["a"])
    assert np.isfinite(w).all()
    assert w[0, 1] == 1
    assert w[0, 5] == 0


def test_two_sided_units_have_no_atom() -> None:
    hist = histogram(np.array([[[9, 1], [1, 9]]]), [10, 10], has_atom=False)
    tables = posterior_tables(hist)
    np.testing.assert_allclose(np.exp(tables.log_mass[0, :, 1:]).sum(axis=1), 1, rtol=ROUNDING)
    assert attenuation(tables, ["a"])[0, 1] > 0.3
    assert attenuation(tables, ["a"])[0, 0] == 0


@given(st.lists(st.integers(0, 99), min_size=1, max_size=9))
def test_smoothing_keeps_the_sum(counts: list[int]) -> None:
    assert smooth(np.array(counts)).sum() == pytest.approx(sum(counts))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda h: attenuation(posterior_tables(h), ["x"]), "a concept of a, b, c, got 'x'"),
        (lambda h: attenuation(posterior_tables(h), []), "got none"),
        (lambda h: attenuation(posterior_tables(h), ["a", "b", "c"]), "at least one class besides"),
        (lambda h: attenuation(posterior_tables(h), ["a"], "soft"), "a mode of .* got 'soft'"),
        (lambda h: posterior_tables(h, alpha=0.0), "positive alpha, got 0.0"),
        (lambda h: posterior_tables(h, {"a": 1.0}), "a prior for each of a, b, c, got a"),
        (lambda h: posterior_tables(h, {"a": 1, "b": 0, "c": 1}), "positive rates"),
        (lambda h: posterior_tables(h.select(["a"])), "at least two classes, got a"),
    ],
)
def test_bad_input_is_refused(what, message: str) -> None:
    with pytest.raises(UserError, match=message):
        what(random(0))
