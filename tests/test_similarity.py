"""Similarity of sparse codes: the compiled and the torch form against the dense formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sae_apps.selection import kernels
from sae_apps.selection.similarity import METRICS, explain, idf, nearest, score
from sae_core.errors import UserError

FORMS = [None, "cpu"]  # compiled loops where numba is installed; the torch form
TOLERANCE = 1e-6  # of the result in float32, which resolves 6e-8 of it
D_SAE = 97  # no multiple of a vector register


def csr(dense) -> sparse.csr_array:
    return sparse.csr_array(np.asarray(dense, dtype=np.float32))


def codes(n: int, seed: int = 0, density: float = 0.3, d_sae: int = D_SAE) -> np.ndarray:
    """Random sparse codes as a dense matrix; every tenth row is empty."""
    generator = np.random.default_rng(seed)
    dense = generator.random((n, d_sae)) * (generator.random((n, d_sae)) < density)
    dense[5::10] = 0
    return dense.astype(np.float32)


def by_formula(acts, prototypes, metric: str, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """The definitions, dense and in float64: sums of minima over sums of maxima, and so on."""
    a = (np.asarray(acts, dtype=np.float64) * weights)[:, None, :]
    b = (np.asarray(prototypes, dtype=np.float64) * weights)[None, :, :]
    if metric == "l2":
        return -np.sqrt(((a - b) ** 2).sum(-1))
    if metric == "jaccard":
        above, below = np.minimum(a, b).sum(-1), np.maximum(a, b).sum(-1)
    else:
        above, below = (a * b).sum(-1), np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


@pytest.fixture(autouse=True)
def two_threads():
    """So that rows are really divided among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, prototypes and weights with many zeros, ties and different magnitudes."""
    n, p, d_sae = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    value = st.sampled_from([0.0, 0.0, 0.0, 1e-3, 0.3, 0.3, 1.0, 2.5, 40.0])
    many = draw(st.lists(value, min_size=(n + p + 1) * d_sae, max_size=(n + p + 1) * d_sae))
    table = np.array(many, dtype=np.float32).reshape(n + p + 1, d_sae)
    return table[:n], table[n : n + p], table[-1]


# ---- scores against the formulas ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", METRICS)
def test_sparse_scores_are_those_of_the_dense_formula(metric: str, form: str | None):
    @settings(max_examples=60)
    @given(pairs(), st.booleans())
    def check(drawn, weighted: bool) -> None:
        acts, prototypes, weights = drawn
        found = score(
            csr(acts), prototypes, metric, weights=weights if weighted else None, device=form
        )
        wanted = by_formula(acts, prototypes, metric, weights if weighted else 1.0)
        assert found.dtype == np.float32 and found.shape == wanted.shape
        # distances of codes of norm 1600 resolve 1e-6 of the norm, the other two are at most 1
        scale = np.maximum(1.0, np.abs(acts).sum() + np.abs(prototypes).sum())
        atol = TOLERANCE * (scale * max(1.0, weights.max()) if metric == "l2" else 1.0)
        np.testing.assert_allclose(found, wanted, atol=atol, rtol=TOLERANCE)

    check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [1, 3, 16, 20, 33])
def test_any_number_of_prototypes_gives_the_formula(p: int, form: str | None):
    acts, prototypes = codes(60), codes(p, seed=1, density=0.8)
    for metric in METRICS[:2] if p == 3 else METRICS[:1]:
        found = score(csr(acts), prototypes, metric, device=form)
        wanted = by_formula(acts, prototypes, metric)
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("p", [1, 3])
def test_small_tasks_and_both_index_types_change_nothing(p: int, monkeypatch: pytest.MonkeyPatch):
    acts, prototypes = csr(codes(200)), codes(p, seed=1)
    whole = score(acts, prototypes)
    monkeypatch.setattr(kernels, "TASK_NONZEROS", 50)
    monkeypatch.setattr(kernels, "TORCH_TERMS", {"cpu": 64})
    assert len(kernels.row_blocks(acts.indptr, 50)) > 64, "control: there are many tasks"
    np.testing.assert_array_equal(score(acts, prototypes), whole)
    np.testing.assert_allclose(score(acts, prototypes, device="cpu"), whole, atol=TOLERANCE)
    wide = acts.copy()
    wide.indices, wide.indptr = acts.indices.astype(np.int64), acts.indptr.astype(np.int64)
    np.testing.assert_array_equal(score(wide, prototypes), whole)


def test_the_order_of_the_rows_changes_nothing():
    acts, prototypes = codes(80), codes(2, seed=1)
    order = np.random.default_rng(2).permutation(80)
    np.testing.assert_array_equal(
        score(csr(acts[order]), prototypes), score(csr(acts), prototypes)[order]
    )


def test_long_sums_keep_their_digits():
    # 200,000 addends: a running sum in float32 is off by more than 1e-6 here, as the control shows
    generator = np.random.default_rng(0)
    acts = generator.random((1, 200_000), dtype=np.float32)
    prototypes = generator.random((3, 200_000), dtype=np.float32)
    minima = np.minimum(acts[0], prototypes[0])
    assert abs(np.cumsum(minima, dtype=np.float32)[-1] / minima.astype(float).sum() - 1) > TOLERANCE
    for some in (prototypes[:1], prototypes):
        wanted = by_formula(acts, some, "jaccard")
        np.testing.assert_allclose(score(csr(acts), some), wanted, rtol=1.2e-7)


# ---- properties of the Jaccard ----


@pytest.mark.parametrize("form", FORMS)
def test_a_code_is_wholly_similar_to_itself(form: str | None):
    full = codes(40)[:5]
    assert (full.sum(axis=1) > 0).all()
    for metric, self_similarity in zip(METRICS, (1.0, 1.0, 0.0), strict=True):
        found = np.diag(score(csr(full), full, metric, device=form))
        np.testing.assert_allclose(found, self_similarity, atol=6e-8)


def test_equal_codes_are_at_distance_zero_to_the_bit():
    full = codes(9, density=1.0, d_sae=4001)[:5]
    norms = (full.astype(float) ** 2).sum(axis=1)
    left = norms - np.cumsum(full.astype(float) ** 2, axis=1)[:, -1]
    assert (left != 0).any(), "control: two orders of the same sum differ"
    assert np.diag(score(csr(full), full, "l2")).tolist() == [0.0] * 5
    assert [score(csr(z[None]), z[None], "l2").item() for z in full] == [0.0] * 5
    assert nearest(csr(full), csr(full), 1, "l2").score.tolist() == [[0.0]] * 5
    near = full * np.float32(1 + 2e-6)  # control: a small distance is not taken for none
    found = np.diag(score(csr(near), full, "l2"))
    np.testing.assert_allclose(found, np.diag(by_formula(near, full, "l2")), rtol=1e-2)


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_is_symmetric(metric: str):
    a, b = codes(20), codes(20, seed=1)
    np.testing.assert_allclose(score(csr(a), b, metric), score(csr(b), a, metric).T, atol=TOLERANCE)


@pytest.mark.parametrize("factor", [0.125, 0.9, 1.0, 3.0, 1e4])
def test_scaling_one_side_costs_exactly_the_factor(factor: float):
    z = codes(5)[:5]
    scaled = np.diag(score(csr(z * np.float32(factor)), z))
    np.testing.assert_allclose(scaled, min(factor, 1 / factor), rtol=TOLERANCE)
    np.testing.assert_allclose(np.diag(score(csr(z * np.float32(factor)), z, "cosine")), 1.0)


@pytest.mark.parametrize("form", FORMS)
def test_empty_codes_score_zero(form: str | None):
    z, nothing = codes(5)[:2], np.zeros((1, D_SAE), dtype=np.float32)
    for metric in ("jaccard", "cosine"):
        assert score(csr(nothing), np.vstack([nothing, z]), metric, device=form).tolist() == [
            [0.0, 0.0, 0.0]
        ]
        assert score(csr(z), nothing, metric, device=form).tolist() == [[0.0], [0.0]]
    assert score(csr(nothing), nothing, "l2", device=form).tolist() == [[0.0]]
    assert score(csr(z)[:0], z, device=form).shape == (0, 2)


def test_faiss_knows_the_same_jaccard():
    faiss = pytest.importorskip("faiss")
    acts, queries = codes(50)[:5], codes(50, seed=1)[:5]
    distances = faiss.pairwise_distances(queries, acts, faiss.METRIC_Jaccard)
    np.testing.assert_allclose(score(csr(acts), queries).T, distances, atol=TOLERANCE)


# ---- weights ----


def test_idf_by_hand():
    # N = 7: ln(8 / 8), ln(8 / 4), ln(8 / 1)
    found = idf(np.array([7, 3, 0]), 7)
    np.testing.assert_allclose(found, [0.0, np.log(2), np.log(8)])
    with pytest.raises(UserError, match="between 0 and 7, got 0 to 8"):
        idf(np.array([0, 8]), 7)


def test_weights_multiply_both_sides_and_a_zero_hides_a_latent():
    a, b = csr([[1.0, 2.0, 5.0]]), np.array([[2.0, 1.0, 0.0]])
    # weights 3, 1, 0: minima 3 + 1 over maxima 6 + 2
    assert score(a, b, weights=np.array([3.0, 1.0, 0.0])).tolist() == [[0.5]]
    assert score(a, b).tolist() == [[np.float32(2 / 9)]]  # control: 1 + 1 + 0 over 2 + 2 + 5


# ---- explanations ----


@pytest.mark.parametrize("metric", ["jaccard", "cosine"])
@pytest.mark.parametrize("weighted", [False, True])
def test_shares_are_the_dense_decomposition_and_sum_to_one(metric: str, weighted: bool):
    acts, prototype = codes(30), codes(1, seed=1, density=0.5)[0]
    weights = np.random.default_rng(3).random(D_SAE) if weighted else None
    factor = 1.0 if weights is None else weights
    a, b = acts.astype(float) * factor, prototype.astype(float) * factor
    parts = np.minimum(a, b) if metric == "jaccard" else a * b
    for row, share in enumerate(explain(csr(acts), prototype, metric, weights=weights, top=D_SAE)):
        if not acts[row].any():
            assert len(share.latents) == len(share.shares) == 0
            continue
        assert share.shares.sum() == pytest.approx(1.0, abs=1e-12)
        assert (np.diff(share.shares) <= 0).all()
        assert sorted(share.latents) == np.flatnonzero(parts[row]).tolist()
        wanted = parts[row][share.latents] / parts[row].sum()
        np.testing.assert_allclose(share.shares, wanted, rtol=TOLERANCE)


def test_the_top_shares_come_first_and_ties_by_latent():
    (share,) = explain(csr([[1.0, 4.0, 1.0, 2.0, 3.0]]), np.array([9.0, 9.0, 9.0, 0.0, 2.0]), top=3)
    assert share.latents.tolist() == [1, 4, 0]
    assert share.shares.tolist() == [4 / 8, 2 / 8, 1 / 8]
    with pytest.raises(UserError, match="got 'l2'"):
        explain(csr([[1.0]]), np.array([1.0]), "l2")
    with pytest.raises(UserError, match="at least 1 latent per explanation, got 0"):
        explain(csr([[1.0]]), np.array([1.0]), top=0)


# ---- exact search ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n_queries", [1, 40])
def test_nearest_is_a_sort_of_all_scores(metric: str, form: str | None, n_queries: int):
    acts, queries = codes(300), codes(n_queries, seed=1)
    acts[200:] = acts[:100]  # equal scores, which the row decides
    some = np.random.default_rng(3).random(D_SAE)
    for weights in (None, some) if n_queries == 1 else (None,):
        for k in (1, 7, 310):
            found = nearest(csr(acts), csr(queries), k, metric, weights=weights, device=form)
            every = by_formula(acts, queries, metric, 1.0 if weights is None else weights).T
            order = np.argsort(-every.astype(np.float32), axis=1, kind="stable")[:, :k]
            places = min(k, 300)
            wanted = np.take_along_axis(every, order, axis=1)
            np.testing.assert_allclose(found.score[:, :places], wanted, atol=TOLERANCE)
            np.testing.assert_array_equal(found.index[:, :places], order)
            assert (found.index[:, places:] == -1).all() and (found.score[:, places:] == 0).all()
    best = np.sort(every.astype(np.float32), axis=1)[:, ::-1]
    assert (best[:, 6] == best[:, 7]).any() or n_queries == 1, "control: the 7th and 8th are equal"


def test_many_queries_pass_in_blocks_and_few_divide_the_rows():
    acts, queries = codes(400), codes(150, seed=1)
    wide = nearest(csr(acts), csr(queries), 5)
    every = by_formula(acts, queries, "jaccard").T
    for one in (0, 31, 127, 128, 149):
        alone = nearest(csr(acts), csr(queries[[one]]), 5)
        np.testing.assert_array_equal(alone.index[0], wide.index[one])
        np.testing.assert_array_equal(alone.score[0], wide.score[one])
        np.testing.assert_allclose(wide.score[one], np.sort(every[one])[::-1][:5], atol=TOLERANCE)


def test_rounding_in_float32_loses_no_neighbour():
    # 5,000 addends: sums in float32 are off by more than the rows differ, up or down by the query
    generator = np.random.default_rng(0)
    n_wrong = 0
    for _ in range(6):
        query = generator.random(5000, dtype=np.float32) + 1
        acts = np.tile(query * np.float32(0.5), (256, 1))
        for row in range(256):  # every row has its losses elsewhere
            lost = generator.choice(5000, 20, replace=False)
            acts[row, lost] *= np.float32(1 - 2e-3 * generator.random())
        every = by_formula(acts, query[None], "jaccard")[:, 0]
        order = np.argsort(-every.astype(np.float32), kind="stable")
        naive = np.cumsum(np.minimum(acts, query), axis=1, dtype=np.float32)[:, -1]
        n_wrong += (np.argsort(-naive, kind="stable")[:5] != order[:5]).any()
        assert nearest(csr(acts), csr(query[None]), 5).index[0].tolist() == order[:5].tolist()
    assert n_wrong, "control: float32 alone gives another order"


# ---- bad input ----


def broken(part: str, place: int, value: float) -> sparse.csr_array:
    acts = csr([[1, 2, 0], [0, 3, 4]])
    getattr(acts, part)[place] = value  # scipy does not look again
    return acts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    ("acts", "message"),
    [
        (broken("data", 2, -3), "activations of at least 0, got -3.0 in line 1"),
        (broken("data", 1, np.nan), "finite activations, got nan in line 0"),
        (broken("data", 3, np.inf), "finite activations, got inf in line 1"),
        (broken("indices", 3, 3), "latents between 0 and 2, got 3 in line 1"),
        (broken("indices", 0, -1), "latents between 0 and 2, got -1 in line 0"),
        (broken("indices", 1, 0), "ascending order and none twice, got 0 in line 0"),
        (broken("indptr", 1, 5), "rising row pointers from 0 to 4"),
        (broken("indptr", 2, 9), "rising row pointers from 0 to 4 .* to 9"),
        (csr([[1, 2, 3]]).astype(np.float64), "float32, got float64"),
        (csr([[1, 2, 3]]).tocsc(), "csr_array, got csc_array"),
    ],
)
def test_bad_activations_are_refused(acts, message: str, p: int, form: str | None):
    ones = np.ones((p, 3))
    with pytest.raises(UserError, match=message):
        score(acts, ones, device=form)
    with pytest.raises(UserError, match=message):
        nearest(acts, csr(ones), 1, device=form)
    with pytest.raises(UserError, match=message):
        nearest(csr(ones), acts, 1, device=form)
    with pytest.raises(UserError, match=message):
        explain(acts, ones[0])


def test_bad_arguments_are_refused():
    acts, ones = csr([[1, 2, 3]]), np.ones((1, 3))
    for call, message in (
        (lambda: score(acts, np.ones((2, 4))), r"width 3 .* got the shape \(2, 4\)"),
        (lambda: score(acts, np.ones(3)), r"one a line, got the shape \(3,\)"),
        (lambda: score(acts, ones, "dice"), "of .*'jaccard', 'cosine', 'l2'.*, got 'dice'"),
        (lambda: score(acts, -ones), "finite prototypes of at least 0, got -1.0"),
        (lambda: score(acts, ones * np.nan), "finite prototypes of at least 0, got nan"),
        (lambda: score(acts, ones, weights=np.array([1, -2, 1])), "weights of at least 0, got -2"),
        (lambda: score(acts, ones, weights=np.ones(2)), r"3 weights, got the shape \(2,\)"),
        (lambda: nearest(acts, csr([[1, 2]]), 1), "queries of width 3 .* got 2"),
        (lambda: nearest(acts, acts, 0), "at least 1 neighbour, got 0"),
        (lambda: nearest(acts, acts, 1, "dice"), "got 'dice'"),
    ):
        with pytest.raises(UserError, match=message):
            call()


# ---- compiled code ----


def test_without_numba_the_torch_form_answers(monkeypatch: pytest.MonkeyPatch):
    acts, prototypes = codes(30), codes(2, seed=1)
    wanted = score(csr(acts), prototypes, device="cpu")
    monkeypatch.setattr(kernels, "has_numba", lambda: False)
    monkeypatch.setattr(kernels, "_compiled_sums", None)
    np.testing.assert_array_equal(score(csr(acts), prototypes), wanted)


def test_compiled_code_is_kept_in_the_users_cache_or_nowhere(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    from sae_apps.selection.jit import jit

    monkeypatch.setenv("SAE_APPS_CACHE", str(tmp_path / "cache"))
    kept = jit()(lambda x: x + 1)
    assert kept(1) == 2
    assert list((tmp_path / "cache" / "numba").rglob("*.nbi"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAE_APPS_CACHE", str(tmp_path / "file"))  # nothing can be made in a file
    forgotten = jit()(lambda x: x + 2)
    assert forgotten(1) == 3 and not forgotten.stats.cache_path
