"""Agreement of dictionaries against hand-worked cases, brute force, SciPy and planted truth."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import trapezoid
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode

from sae_core import matching
from sae_core.cosines import cosine_blocks
from sae_core.errors import UserError
from sae_core.identifiability import (
    agreement,
    chance_mcs,
    chance_pw_mcc,
    consistency,
    feature_recovery_rate,
    max_cosine,
    mcs_shares,
    mean_max_cosine,
    pw_mcc,
    top_fraction,
)
from sae_core.synthetic import PlantedConfig, plant

ROUNDING = 1e-6  # a float32 cosine is off by about 5e-8 at d = 1536
LARGE = {"exact_pairs": 0}  # force the bounded-memory path on a small problem


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """The full matrix in float64, zero rows giving 0."""
    x, y = a.double().numpy(), b.double().numpy()
    lengths = np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))
    return np.divide(x @ y.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def shuffled(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows in another order and of other lengths, the order)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    return x[order] * (0.1 + 5 * torch.rand(len(x), 1, generator=generator)), order


# Small integer entries give equal cosines, duplicates, opposite rows and zero rows; the rest is
# what a trained dictionary looks like.
@st.composite
def dictionaries(draw, most: int = 12):
    d = draw(st.integers(1, 5))
    n, m = draw(st.integers(1, most)), draw(st.integers(1, most))
    if draw(st.booleans()):
        seed = draw(st.integers(0, 10**6))
        return normal(n, d, seed), normal(m, d, seed + 1)
    entry = st.integers(-2, 2).map(float)
    a, b = (
        draw(st.lists(st.lists(entry, min_size=d, max_size=d), min_size=k, max_size=k))
        for k in (n, m)
    )
    return torch.tensor(a), torch.tensor(b)


# ---- max cosine ----


def test_max_cosine_by_hand():
    a = torch.tensor([[2.0, 0.0], [0.0, -1.0], [3.0, 4.0]])
    b = torch.tensor([[0.0, 5.0], [1.0, 0.0], [-1.0, -1.0]])
    best, index = max_cosine(a, b)
    # rows of the cosine matrix: (0, 1, -.707), (-1, 0, .707), (.8, .6, -.99)
    assert best.tolist() == pytest.approx([1.0, 0.5**0.5, 0.8])
    assert index.tolist() == [1, 2, 0]


def test_a_flipped_latent_is_another_feature():
    a = normal(20, 64, 0)
    assert feature_recovery_rate(-a, a, 0.5) == 0.0 and feature_recovery_rate(a, a, 0.5) == 1.0
    assert float(max_cosine(a, -a)[0].max()) < 0.5
    for settings in ({}, LARGE):
        assert pw_mcc(a, -a, **settings).mean < 0.5
    assert max_cosine(a[:1], -a[:1])[0].item() == pytest.approx(-1)  # not clipped at 0 either


@given(dictionaries(), st.integers(1, 13))
def test_max_cosine_is_that_of_the_full_matrix_for_any_chunk(pair, chunk):
    a, b = pair
    full = cosines(a, b)
    best, index = max_cosine(a, b, chunk=chunk)
    assert best.numpy() == pytest.approx(full.max(axis=1), abs=ROUNDING)
    assert full[np.arange(len(a)), index] == pytest.approx(full.max(axis=1), abs=ROUNDING)


def test_chunks_change_no_result():
    a, b = normal(70, 8, 0), normal(90, 8, 1)
    whole, index = max_cosine(a, b)
    matched = pw_mcc(a, b, **LARGE)
    for chunk in (7, 64):
        best, where = max_cosine(a, b, chunk=chunk)
        assert torch.allclose(best, whole, atol=ROUNDING) and torch.equal(where, index)
        small = pw_mcc(a, b, **LARGE, chunk=chunk)
        assert torch.equal(small.index, matched.index)
        assert small.mean == pytest.approx(matched.mean, abs=ROUNDING)


def test_the_length_of_a_row_makes_no_difference_however_extreme():
    a, b = normal(6, 5, 0), normal(7, 5, 1)
    scale = torch.tensor([1e-30, 1e30, 1e-20, 1.0, 1e18, 3e-38])[:, None]
    assert torch.allclose(max_cosine(a * scale, b)[0], max_cosine(a, b)[0], atol=ROUNDING)


def test_zero_rows_have_cosine_zero():
    zero, rows = torch.zeros(1, 3), torch.eye(3)
    assert max_cosine(zero, rows)[0].item() == 0.0
    assert max_cosine(rows, torch.cat((zero, -rows)))[0].tolist() == [0.0, 0.0, 0.0]
    assert pw_mcc(zero, rows).mean == 0.0


def test_half_precision_and_parameters_are_taken_as_they_are():
    a = torch.nn.Parameter(normal(9, 6, 0))
    best, _ = max_cosine(a, a.detach().bfloat16())
    assert best.dtype == torch.float32 and not best.requires_grad
    assert best.detach().numpy() == pytest.approx(np.ones(9), abs=1e-2)  # bfloat16 has 8 bits
    assert max_cosine(a.double(), a)[0].dtype == torch.float64


# ---- recovery, shares, top fraction ----


def test_recovery_counts_true_features_and_includes_the_threshold():
    truth = torch.eye(4)[:2]
    dictionary = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.1, 0.0]])
    # feature 0: cosine 1 (two latents are close, it counts once); feature 1: exactly 0.5
    assert feature_recovery_rate(dictionary, truth, 0.9) == 0.5
    assert feature_recovery_rate(dictionary, truth, 0.5) == 1.0
    assert mean_max_cosine(dictionary, truth) == pytest.approx(0.75)
    assert mean_max_cosine(truth, dictionary) == pytest.approx((0.5 + 1 + 9 / 9.000556) / 3)


def test_shares_are_strictly_above_the_threshold():
    mcs = torch.tensor([0.5, 0.75, 1.0, -0.25])
    assert mcs_shares(mcs, (0.5, 0.6, 0.75)) == {0.5: 0.5, 0.6: 0.5, 0.75: 0.25}
    assert list(mcs_shares(mcs)) == [0.6, 0.7, 0.8, 0.9]


@pytest.mark.parametrize(
    ("n", "fraction", "size"),
    [(65536, 0.0005, 33), (65536, 0.003, 197), (100, 0.07, 7), (30, 0.1, 3), (5, 1e-12, 1)],
)
def test_top_fraction_rounds_up_but_not_past_a_whole_number(n, fraction, size):
    score = normal(n, 1, 0)[:, 0]
    chosen = top_fraction(score, fraction)
    assert int(chosen.sum()) == size
    assert score[chosen].min() > score[~chosen].max()


def test_of_equal_scores_the_first_are_chosen():
    score = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0])
    assert top_fraction(score, 0.6).tolist() == [False, True, True, True, False]


# ---- one-to-one matching ----


@pytest.mark.parametrize("settings", [{}, LARGE, LARGE | {"n_candidates": 2, "chunk": 2}])
@given(dictionaries(most=5))
def test_matching_is_the_best_of_all_matchings(settings, pair):
    full = cosines(*pair)
    if full.shape[0] > full.shape[1]:
        full = full.T
    rows = range(len(full))
    best = max(full[rows, p].sum() for p in permutations(range(full.shape[1]), len(full)))
    found = pw_mcc(*pair, **settings, tolerance=0.0)
    assert found.mean == pytest.approx(best / len(full), abs=ROUNDING)


@pytest.mark.parametrize("solves", [1, 2])
@given(dictionaries(most=40), st.integers(1, 4))
def test_the_gap_bounds_what_is_lost(solves, pair, candidates):
    a, b = pair
    full = cosines(a, b)
    exact = full[linear_sum_assignment(full, maximize=True)].mean()
    found = pw_mcc(a, b, **LARGE, n_candidates=candidates, max_solves=solves, chunk=16)
    assert found.gap >= 0
    assert found.mean <= exact + ROUNDING
    assert exact <= found.mean + found.gap + ROUNDING


def test_the_gap_is_positive_where_something_is_lost_and_more_solves_close_it():
    # copies of 10 directions have the same few favourites: one candidate each is far from enough
    a, b = normal(10, 16, 0).repeat(20, 1), normal(10, 16, 1).repeat(20, 1)
    exact = pw_mcc(a, b).mean
    first = pw_mcc(a, b, **LARGE, n_candidates=1, max_solves=1)
    assert exact - first.mean > 0.02 and first.gap >= exact - first.mean - ROUNDING
    last = pw_mcc(a, b, **LARGE, n_candidates=16, max_solves=40)
    assert last.gap < 1e-3 and last.mean == pytest.approx(exact, abs=1e-3)


def test_duals_of_a_hand_worked_problem():
    # cosines (.9 .8 -), (.7 .1 -), (- - .5), (- - .4): rows 0 and 1 both want column 0. The best is
    # 0-1, 1-0, 2-2 and row 3 alone. Column 0 costs what row 0 would gain by it: .1. Column 2 costs
    # row 3's gain over being alone at -1.01.
    row, col = torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([0, 1, 0, 1, 2, 2])
    edges = matching._edges(4, [(row, col, torch.tensor([0.9, 0.8, 0.7, 0.1, 0.5, 0.4]).double())])
    chosen, value = matching._solve_sparse(edges, 4, 4)
    assert chosen.tolist() == [1, 0, 2, -1]
    assert value.tolist() == pytest.approx([0.8, 0.7, 0.5, -1.01])
    utility, price = matching._duals(edges, chosen, value, 4)
    assert price.tolist() == pytest.approx([0.1, 0.0, 1.41, 0.0])
    assert utility.tolist() == pytest.approx([0.8, 0.6, -0.91, -1.01])
    assert matching._completed(chosen, 4).tolist() == [1, 0, 2, 3]


def test_copies_that_stall_a_search_for_any_matching_do_not_stall_this_one():
    # on these candidates SciPy's check that a full matching exists does not end within minutes
    a, b = normal(10, 16, 0).repeat(20, 1), normal(10, 16, 1).repeat(20, 1)
    own = torch.arange(200)
    found, _ = matching._scan(a, b, np.zeros(200), np.zeros(200), 1, 2048)
    edges = matching._edges(200, [(own, own, torch.full((200,), -0.5).double()), *found])
    chosen, _ = matching._solve_sparse(edges, 200, 200)
    assert len(np.unique(chosen[chosen >= 0])) == (chosen >= 0).sum() > 190


@pytest.mark.parametrize("settings", [{}, LARGE])
@pytest.mark.parametrize(("n", "m"), [(60, 60), (40, 90), (90, 40)])
def test_matching_does_not_depend_on_order_or_length(settings, n, m):
    a, b = normal(n, 6, 0), normal(m, 6, 1)
    found = pw_mcc(a, b, **settings)
    moved, order = shuffled(a, 2)
    other = pw_mcc(moved, b, **settings)
    assert other.mean == pytest.approx(found.mean, abs=ROUNDING)
    assert torch.equal(other.index, found.index[order])
    back = pw_mcc(b, a, **settings)
    matched = found.index >= 0
    assert int(matched.sum()) == min(n, m) == len(found.index[matched].unique())
    assert torch.equal(back.index[found.index[matched]], matched.nonzero()[:, 0])
    # unmatched rows are -1 with cosine 0 and are not in the mean
    assert not found.cosine[~matched].any()
    assert found.mean == pytest.approx(float(found.cosine[matched].mean()), abs=ROUNDING)


def test_both_paths_agree_on_what_a_trained_pair_looks_like():
    # half of the directions are shared up to noise, the others are not
    a = normal(600, 32, 0)
    b = torch.cat((a[:300] + 0.3 * normal(300, 32, 1), normal(300, 32, 2)))
    b = shuffled(b, 3)[0]
    exact, large = pw_mcc(a, b), pw_mcc(a, b, **LARGE)
    assert exact.gap == 0.0 and large.gap <= 1e-4
    assert exact.mean - large.gap - ROUNDING <= large.mean <= exact.mean + ROUNDING
    assert 0.6 < exact.mean < 0.9


# ---- exact and random dictionaries ----


def test_an_exact_dictionary_scores_one():
    truth = plant(PlantedConfig(n=128, d=42), seed=0).dictionary
    learned, order = shuffled(truth, 1)
    assert feature_recovery_rate(learned, truth, 0.999) == 1.0
    assert mean_max_cosine(learned, truth) == pytest.approx(1.0, abs=ROUNDING)
    for settings in ({}, LARGE):
        found = pw_mcc(learned, truth, **settings)
        assert found.mean == pytest.approx(1.0, abs=ROUNDING)
        assert torch.equal(found.index, order)
    report = agreement(learned, truth)
    assert report.pw_mcc == pytest.approx(1.0, abs=ROUNDING)
    assert report.shares == {0.6: 1.0, 0.7: 1.0, 0.8: 1.0, 0.9: 1.0}


@pytest.mark.parametrize(("d", "m"), [(2, 3), (3, 50), (42, 512), (576, 4608)])
def test_chance_is_the_mean_of_the_largest_of_m(d, m):
    # the same expectation another way: 1 - the integral of F(x)^m over the cosines x
    x = np.linspace(-1, 1, 200_001)
    cdf = stats.beta((d - 1) / 2, (d - 1) / 2).cdf((1 + x) / 2)
    assert chance_mcs(d, m) == pytest.approx(1 - trapezoid(cdf**m, x), abs=1e-5)


def test_chance_in_closed_form():
    assert chance_mcs(1, 3) == 0.75  # the largest of three signs is -1 once in 8
    assert chance_mcs(7, 1) == pytest.approx(0.0, abs=1e-9)
    assert chance_mcs(3, 9) == pytest.approx(0.8)  # uniform on [-1, 1] in R^3: (m - 1) / (m + 1)


def test_a_random_dictionary_scores_chance():
    n, d, m = 2000, 42, 512
    truth, learned = normal(n, d, 0), normal(m, d, 1)
    mcs, _ = max_cosine(truth, learned)
    error = float(mcs.std()) / n**0.5
    assert abs(mean_max_cosine(learned, truth) - chance_mcs(d, m)) < 4 * error
    assert feature_recovery_rate(learned, truth, 0.9) == 0.0
    assert consistency([truth, learned]).mean() == pytest.approx(chance_mcs(d, m), abs=4 * error)


def test_chance_of_a_matching_lies_a_little_below_and_is_reproducible():
    one, same, other = (chance_pw_mcc(300, 42, 300, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert 0.9 * chance_mcs(42, 300) < one < chance_mcs(42, 300)
    assert other == pytest.approx(one, abs=0.01)


# ---- agreement of two runs ----


def runs() -> tuple[torch.Tensor, torch.Tensor]:
    """b holds latents 0..3 of a (4 and 5 are its own), and all of a in places 6..11, which die."""
    a = torch.eye(8)[:6]
    b = torch.cat((a[:4], torch.eye(8)[6:], a))
    return a, b


def test_dead_latents_of_either_run_do_not_count():
    a, b = runs()
    alive_a = torch.tensor([True] * 5 + [False])
    alive_b = torch.tensor([True] * 6 + [False] * 6)
    found = agreement(a, b, alive_a=alive_a, alive_b=alive_b, thresholds=(0.5,))
    assert (found.n_alive_a, found.n_alive_b) == (5, 6)
    assert found.mcs.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert found.alive.tolist() == alive_a.tolist()
    assert found.mean_mcs == found.pw_mcc == pytest.approx(0.8) and found.gap == 0.0
    assert found.shares == {0.5: pytest.approx(0.8)}
    assert found.chance_mcs == chance_mcs(8, 6)
    assert found.top_shares == {} and found.n_top == {}
    everything = agreement(a, b)  # control: with the dead latents of b all of a is found
    assert everything.mean_mcs == everything.pw_mcc == pytest.approx(1.0)


def test_masks_do_what_leaving_out_the_rows_does():
    a, b, peak = normal(50, 9, 0), normal(60, 9, 1), normal(50, 1, 2)[:, 0].abs()
    alive_a, alive_b = normal(50, 1, 3)[:, 0] > 0, normal(60, 1, 4)[:, 0] > 0
    masked = agreement(a, b, alive_a=alive_a, alive_b=alive_b, peak_a=peak, fractions=(0.1,))
    plain = agreement(a[alive_a], b[alive_b])
    assert masked.mcs[alive_a].tolist() == plain.mcs.tolist()
    for name in ("pw_mcc", "mean_mcs", "shares", "n_alive_a", "n_alive_b", "chance_mcs"):
        assert getattr(masked, name) == getattr(plain, name), name


def test_top_fractions_are_taken_by_peak_among_alive_latents():
    a, b = runs()
    peak = torch.tensor([0.1, 0.2, 0.3, 3.0, 4.0, 99.0])  # the dead one peaked highest
    alive = torch.tensor([True] * 5 + [False])
    settings = {"peak_a": peak, "fractions": (0.3, 0.01, 1.0), "thresholds": (0.5,)}
    found = agreement(a, b[:6], alive_a=alive, **settings)
    # ceil(.3 * 6) = 2: latents 4 and 3, of which 3 is found; ceil(.06) = 1: latent 4
    assert found.n_top == {0.3: 2, 0.01: 1, 1.0: 5}
    assert found.top_shares[0.3] == {0.5: 0.5} and found.top_shares[0.01] == {0.5: 0.0}
    assert found.top_shares[1.0] == found.shares


# ---- consistency ----


def test_consistency_by_hand():
    first = torch.eye(3)
    second = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 4.0]])  # best cosines 1, .6, .8
    third = torch.tensor([[0.0, 0.0, 1.0]])  # 0, 0, 1
    runs = [first, second, third]
    assert consistency(runs).tolist() == pytest.approx([0.5, 0.3, 0.9])
    assert consistency(runs, which=1).tolist() == pytest.approx([0.5, 0.8])
    assert consistency(runs, which=2).tolist() == pytest.approx([0.9])
    alive = [torch.tensor([True, True, False]), torch.tensor([False, True]), torch.tensor([True])]
    assert consistency(runs, alive).tolist() == pytest.approx([0.0, 0.3, 0.0])


def test_consistency_of_an_unchanged_latent_is_one():
    a, b = normal(20, 8, 0), normal(20, 8, 1)
    b[5] = 3 * a[2]
    score = consistency([a, b, shuffled(a, 2)[0]])
    assert score[2].item() == pytest.approx(1.0, abs=ROUNDING)
    assert float(score[:2].max()) < 0.99


# ---- memory ----


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gave."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.n = max(self.n, value.numel())
        return out


def test_no_tensor_grows_with_n_times_m():
    n, chunk, candidates, solves = 1024, 128, 2, 2
    a, b = normal(n, 4, 0), normal(n, 4, 1)
    bound = max(chunk**2, 2 * n * candidates * (solves + 1))
    with LargestTensor() as largest:
        max_cosine(a, b, chunk=chunk)
    assert largest.n <= bound
    with LargestTensor() as largest:
        limits = {"n_candidates": candidates, "max_solves": solves, "chunk": chunk}
        pw_mcc(a, b, exact_pairs=n * n - 1, **limits)
    assert largest.n <= bound
    with LargestTensor() as largest:  # control: the exact solution does hold the matrix
        pw_mcc(a, b, exact_pairs=n * n, chunk=chunk)
    assert largest.n == n * n


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_blocks_cover_every_pair_once(chunk):
    a, b = normal(5, 3, 0), normal(8, 3, 1)
    seen = torch.zeros(5, 8)
    for top, left, block in cosine_blocks(a, b, chunk):
        assert max(block.shape) <= chunk
        seen[top : top + len(block), left : left + block.shape[1]] += block
    assert seen.numpy() == pytest.approx(cosines(a, b), abs=ROUNDING)


# ---- bad input ----


EYE = torch.eye(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: max_cosine(EYE, torch.eye(3)), r"got \[2, 2\] and \[3, 3\]"),
        (lambda: max_cosine(torch.empty(0, 2), EYE), r"got \[0, 2\] and \[2, 2\]"),
        (lambda: pw_mcc(EYE, torch.empty(0, 2)), r"got \[2, 2\] and \[0, 2\]"),
        (lambda: pw_mcc(EYE, EYE / 0), "got 0 rows of the first and 2 rows of the second"),
        (lambda: pw_mcc(EYE, EYE, n_candidates=0), "got 0 and 8"),
        (lambda: max_cosine(EYE, EYE, chunk=0), "at least 1 row, got 0"),
        (lambda: feature_recovery_rate(EYE, EYE, 1.5), r"in \[-1, 1\], got \[1.5\]"),
        (lambda: mcs_shares(torch.empty(0)), "at least 1 latent, got 0"),
        (lambda: top_fraction(torch.ones(3), 0.0), r"in \(0, 1\], got 0.0"),
        (lambda: top_fraction(torch.tensor([1.0, torch.nan]), 0.5), "got 2 scores, 1 of them NaN"),
        (lambda: consistency([EYE, torch.eye(3)]), r"got \[2, 2\] and \[3, 3\]"),
        (lambda: consistency([EYE]), "got 1 runs and number 0"),
        (lambda: consistency([EYE, EYE], which=2), "got 2 runs and number 2"),
        (lambda: consistency([EYE, EYE], [torch.ones(2) > 0]), "2 runs, got 1 masks"),
        (lambda: agreement(EYE, EYE, alive_b=torch.zeros(2) > 0), "2 latents .* got 2 with 0"),
        (lambda: agreement(EYE, EYE, alive_a=torch.ones(3) > 0), "2 latents .* got 3 with 3"),
        (lambda: agreement(EYE, EYE, peak_a=torch.ones(1)), "each of 2 latents, got 1"),
        (lambda: chance_mcs(0, 5), "got 0 and 5"),
        (lambda: chance_pw_mcc(3, 2, 0, 0), "got 3, 2 and 0"),
    ],
)
def test_bad_input_is_refused_with_the_values(call, message):
    with pytest.raises(UserError, match=message):
        call()
