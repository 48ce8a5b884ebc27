"""SparseIndex: exact after re-ranking, measured recall, the same whether built or extended."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from sae_apps.selection.codes import Codes, IndexConfig
from sae_apps.selection.index import SparseIndex
from sae_apps.selection.projection import POWER, fit_projection, powers
from sae_apps.selection.rerank import Part, exact_scores, recall_of, sample_rows
from sae_core.errors import CorruptFileError, UserError
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance

faiss = pytest.importorskip("faiss")
pytest.importorskip("numba")

D_SAE, K = 400, 5
CLOSE = 1e-6  # float32 scores of sums in another order
METHODS = {
    "kernel": {}, "svd": {"method": "svd"}, "random": {"method": "random"},
    "minhash": {"method": "minhash", "dims": 1024},
    "ivf": {"method": "svd", "dims": 32, "factory": "IVF8,SQ8", "effort": 4},
    "hnsw": {"method": "svd", "dims": 32, "factory": "HNSW16,SQ8"},
    "binary ivf": {"method": "minhash", "dims": 512, "factory": "BIVF8", "effort": 6},
}  # fmt: skip


def topical(n: int, seed: int) -> sparse.csr_array:
    """Rows of 20 topics: each a weak copy of its topic's latents and some of its own."""
    topics = np.random.default_rng(99).lognormal(size=(20, D_SAE))
    topics *= np.random.default_rng(98).random((20, D_SAE)) < 0.15
    rng = np.random.default_rng(seed)
    kept = topics[rng.integers(20, size=n)] * (rng.random((n, D_SAE)) < 0.6)
    own = rng.lognormal(sigma=1, size=(n, D_SAE)) * (rng.random((n, D_SAE)) < 0.05)
    dense = (kept * rng.lognormal(sigma=0.3, size=kept.shape) + own).astype(np.float32)
    return sparse.csr_array(dense / dense.sum(1, keepdims=True))


def jaccards(queries: sparse.csr_array, rows: sparse.csr_array) -> np.ndarray:
    """The formula of the paper on dense float64 rows."""
    a, b = queries.toarray().astype(float)[:, None], rows.toarray().astype(float)[None]
    below = np.maximum(a, b).sum(2)
    return np.divide(np.minimum(a, b).sum(2), below, out=np.zeros(below.shape), where=below > 0)


def features(acts: sparse.csr_array, first_id: int, sae: str = "sae") -> SparseFeatures:
    ids = np.arange(first_id, first_id + acts.shape[0], dtype=np.int64)
    provenance = Provenance("m", "r", "layers.0.out", sae, "d", "0", "v")
    return SparseFeatures(acts, pa.table({"row_id": ids}), provenance)


@pytest.fixture(scope="module")
def rows() -> sparse.csr_array:
    return topical(1200, 1)


@pytest.fixture(scope="module")
def queries() -> sparse.csr_array:
    return topical(40, 2)


@pytest.fixture(scope="module")
def truth(rows: sparse.csr_array, queries: sparse.csr_array) -> np.ndarray:
    return jaccards(queries, rows)


@pytest.fixture(scope="module")
def index(rows: sparse.csr_array) -> SparseIndex:
    return SparseIndex.build(rows)


def top(scores: np.ndarray, k: int = K) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


# ---- candidates and exact scores ----


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_neighbours_far_above_chance(
    name: str, rows: sparse.csr_array, queries: sparse.csr_array, truth: np.ndarray
) -> None:
    found = SparseIndex.build(rows, IndexConfig(**METHODS[name])).query(
        queries, K, n_candidates=120
    )
    hits = [np.isin(a, b).mean() for a, b in zip(found.row_ids, top(truth), strict=True)]
    assert np.mean(hits) > 0.6  # 120 random candidates of 1,200 rows would find 0.1
    exact = np.take_along_axis(truth, found.row_ids, 1)
    assert np.abs(found.scores - exact).max() < CLOSE
    assert (np.diff(found.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("method", ["kernel", "minhash"])
def test_all_candidates_give_the_neighbours_of_the_dense_jaccard_index(
    method: str, rows: sparse.csr_array, queries: sparse.csr_array
) -> None:
    flat = faiss.IndexFlat(D_SAE, faiss.METRIC_Jaccard)
    flat.add(rows.toarray())  # type: ignore[call-arg]
    scores, places = flat.search(queries.toarray(), K)  # type: ignore[call-arg]
    config = IndexConfig(method=method, dims=64)
    found = SparseIndex.build(rows, config).query(queries, K, n_candidates=10**6)
    assert found.n_candidates == 1200
    assert (found.row_ids == places).all()
    assert np.abs(found.scores - scores).max() < CLOSE


def test_kernel_comes_closer_to_the_jaccard_than_svd(
    rows: sparse.csr_array, queries: sparse.csr_array, truth: np.ndarray
) -> None:
    def correlation(method: Any) -> float:
        rng = np.random.default_rng(0)
        projection = fit_projection(rows, 32, method, generator=rng)
        inner = projection.embed(queries) @ projection.embed(rows).T
        return float(np.corrcoef(inner.ravel(), truth.ravel())[0, 1])

    assert correlation("random") < correlation("svd") < correlation("kernel")
    assert correlation("kernel") > 0.9


def test_embedding_is_the_formula(rows: sparse.csr_array) -> None:
    projection = fit_projection(rows[:300], 40, "svd", generator=np.random.default_rng(1))
    raised = rows.toarray().astype(float) ** POWER
    unit = raised / np.linalg.norm(raised, axis=1, keepdims=True)
    assert np.abs(projection.embed(rows) - unit @ projection.matrix).max() < 1e-5
    # svd with all directions and a rotation keeps every inner product of the sample
    few = fit_projection(rows[:30], 30, "svd", generator=np.random.default_rng(1)).embed(rows[:30])
    assert np.abs(few @ few.T - unit[:30] @ unit[:30].T).max() < 1e-4
    # ... and mixes the directions: without it the second moments of the sample would be diagonal
    moments = np.abs(few.T @ few)
    mixed = moments[~np.eye(30, dtype=bool)]
    assert mixed.max() > 0.05 * moments.max()


@pytest.mark.parametrize("power", [0.3, 0.5, 0.75, 1.0])
def test_powers(power: float) -> None:
    values = np.array([1e-6, 0.3, 1.0, 70.0], dtype=np.float32)
    assert np.allclose(powers(values, power), values.astype(float) ** power, rtol=1e-6)


def test_scores_of_candidates_over_several_parts(
    rows: sparse.csr_array, queries: sparse.csr_array, truth: np.ndarray
) -> None:
    parts = [Part.of(rows[:500]), Part.of(rows[500:501]), Part.of(rows[501:])]
    rng = np.random.default_rng(3)
    wanted = np.sort(np.stack([rng.choice(1200, 30, replace=False) for _ in range(40)]), axis=1)
    wanted[:, :4] = [-1, -1, 499, 500]
    wanted = np.sort(wanted, axis=1)
    found = exact_scores(parts, queries, wanted)
    assert (found[wanted < 0] == -1).all()
    expected = np.take_along_axis(truth, wanted.clip(0), 1)
    assert np.abs(found - expected)[wanted >= 0].max() < CLOSE


# ---- recall ----


def test_recall_reported_is_recall_measured(
    index: SparseIndex, queries: sparse.csr_array, truth: np.ndarray
) -> None:
    found = index.query(queries, K, n_candidates=8, recall_sample=1000)
    hits = [np.isin(a, b).mean() for a, b in zip(found.row_ids, top(truth), strict=True)]
    assert found.recall is not None
    assert found.recall.n_queries == 40
    assert found.recall.value == pytest.approx(np.mean(hits))
    assert found.recall.low < found.recall.value < found.recall.high
    assert found.recall.value < 1  # else the test would show nothing
    every = index.query(queries, K, n_candidates=1200, recall_sample=20).recall
    assert every is not None and (every.value, every.n_queries) == (1.0, 20)
    assert index.query(queries, K).recall is None


def test_recall_interval() -> None:
    scores = np.ones((50, 4), dtype=np.float32)
    all_found = recall_of(scores, np.full(50, 0.5, dtype=np.float32))
    assert (all_found.value, all_found.high) == (1.0, 1.0)
    assert all_found.low == pytest.approx(1 - 1.959964**2 / (50 + 1.959964**2))  # Wilson, n = 50
    half = np.where(np.arange(50)[:, None] < 25, scores, 0)  # each query all or nothing: deff = k
    found = recall_of(half.astype(np.float32), np.full(50, 0.5, dtype=np.float32))
    assert found.value == 0.5
    assert found.high - found.low == pytest.approx(2 * 0.1335, abs=2e-3)  # Wilson, n = 50
    mixed = np.where(np.arange(4)[None] < 2, scores, 0)  # each query finds two of four: deff = 1
    narrow = recall_of(mixed.astype(np.float32), np.full(50, 0.5, dtype=np.float32))
    assert narrow.high - narrow.low < found.high - found.low


# ---- build, extend, save, load ----


@pytest.mark.parametrize("method", ["kernel", "minhash"])
def test_extended_index_is_the_one_built_at_once(
    method: str, rows: sparse.csr_array, queries: sparse.csr_array
) -> None:
    config = IndexConfig(method=method, dims=64)
    sample = rows[:600]
    whole = SparseIndex.build(rows, config, fit_on=sample)
    grown = SparseIndex.build([rows[:700], rows[700:900]], config, fit_on=sample)
    grown.add(rows[900:])
    a, b = (one.query(queries, K, n_candidates=50) for one in (whole, grown))
    assert (a.row_ids == b.row_ids).all() and (a.scores == b.scores).all()
    assert len(grown) == len(whole) == 1200
    few = SparseIndex.build(rows[:700], config, fit_on=sample).query(queries, K, n_candidates=50)
    assert (few.row_ids != a.row_ids).any()


@pytest.mark.parametrize("method", ["kernel", "minhash"])
def test_saved_index_answers_alike(
    method: str, rows: sparse.csr_array, queries: sparse.csr_array, tmp_path: Path
) -> None:
    config = IndexConfig(method=method, dims=64, seed=5)
    shards = [features(rows[:400], 1000), features(rows[400:], 3000)]
    streamed = SparseIndex.build(iter(shards), config, folder=tmp_path / "a")
    loaded = SparseIndex.load(tmp_path / "a")
    assert loaded.config == config and loaded.sae_hash == "sae"
    loaded.add(features(topical(10, 7), 9000))
    loaded.save(tmp_path / "b")
    loaded.save(tmp_path / "b", overwrite=True)
    again = SparseIndex.load(tmp_path / "b")
    memory = SparseIndex.build(shards, config)
    memory.add(features(topical(10, 7), 9000))
    expected = memory.query(queries, K, n_candidates=40)
    for one in (loaded, again):
        found = one.query(queries, K, n_candidates=40)
        assert (found.row_ids == expected.row_ids).all()
        assert (found.scores == expected.scores).all()
    assert len(streamed) == 1200 and set(expected.row_ids.ravel()) <= {
        *range(1000, 1400), *range(3000, 3800), *range(9000, 9010),
    }  # fmt: skip


def test_fine_codes_are_the_default_of_large_samples() -> None:
    rng = np.random.default_rng(0)
    dense = rng.random((1100, 500), dtype=np.float32) * (rng.random((1100, 500)) < 0.3)
    rows = sparse.csr_array(dense.astype(np.float32))
    codes = Codes.fit(rows, IndexConfig())
    codes.add(rows)
    assert isinstance(faiss.downcast_index(codes.index), faiss.IndexRefine)
    assert codes.n_rows == 1100
    # 56 + 448 bytes a row, padded to blocks of 32 rows, and tables that do not grow with the rows
    assert 504 <= codes.bytes_per_row < 700
    found, near = codes.candidates(rows[:50], 10, IndexConfig())
    assert (np.diff(near, axis=1) <= 0).all()
    assert (found == np.arange(50)[:, None]).any(axis=1).mean() > 0.95


def test_seed_decides_the_index(rows: sparse.csr_array) -> None:
    def matrix(seed: int) -> np.ndarray:
        codes = SparseIndex.build(rows[:200], IndexConfig(seed=seed, dims=16)).codes
        return codes.encode(rows[:5])

    assert (matrix(1) == matrix(1)).all()
    assert (matrix(1) != matrix(2)).any()


def test_sample_is_drawn_from_all_parts() -> None:
    parts = [
        Part.of(sparse.csr_array(np.eye(60, dtype=np.float32)[i : i + 20])) for i in (0, 20, 40)
    ]
    drawn = [sample_rows(parts, 60, 15, np.random.default_rng(seed)).indices for seed in range(200)]
    counts = np.bincount(np.concatenate(drawn), minlength=60)
    assert all(len(set(one)) == 15 for one in drawn)
    assert counts.min() > 25 and counts.max() < 80  # 50 each on average, standard deviation 6
    assert sample_rows(parts, 60, 100, np.random.default_rng(0)).shape == (60, 60)


# ---- empty codes, bad input ----


def test_empty_rows_and_queries_score_zero_and_are_counted(rows: sparse.csr_array) -> None:
    hollow = sparse.csr_array(sparse.vstack([rows[:50], sparse.csr_array((30, D_SAE))])).astype(
        np.float32
    )
    asked = sparse.csr_array(sparse.vstack([rows[:2], sparse.csr_array((1, D_SAE))])).astype(
        np.float32
    )
    for method in ("kernel", "minhash"):
        index = SparseIndex.build(hollow, IndexConfig(method=method, dims=32))
        found = index.query(asked, 60, recall_sample=3)
        assert found.n_empty == 1
        assert (found.scores[2] == 0).all()
        assert (found.scores[:2, 0] > 0.999).all() and (found.row_ids[:2, 0] == [0, 1]).all()
        assert found.recall is not None and found.recall.value == 1


def test_bad_queries_are_refused(index: SparseIndex, queries: sparse.csr_array) -> None:
    for k, message in ((0, "between 1 and 1200"), (1201, "between 1 and 1200.*got 1201")):
        with pytest.raises(UserError, match=message):
            index.query(queries, k)
    with pytest.raises(UserError, match="at least k = 5, got 4"):
        index.query(queries, 5, n_candidates=4)
    with pytest.raises(UserError, match="at least one query"):
        index.query(queries[:0], 5)
    with pytest.raises(UserError, match="d_sae 400, got 399"):
        index.query(queries[:, :399], 5)


def test_bad_rows_are_refused(rows: sparse.csr_array) -> None:
    small = IndexConfig(dims=16)
    with pytest.raises(UserError, match="at least one row to index, got none"):
        SparseIndex.build([], small)
    with pytest.raises(UserError, match="at least one row to index, got none"):
        SparseIndex.build(rows[:0], small)
    with pytest.raises(UserError, match="d_sae 400, got 300"):
        SparseIndex.build([rows[:100], rows[:100, :300]], small)
    with pytest.raises(UserError, match="got 105 2 times"):
        SparseIndex.build([features(rows[:20], 100), features(rows[:1], 105)], small)
    with pytest.raises(UserError, match="SAE one, got some of two"):
        SparseIndex.build([features(rows[:20], 0, "one"), features(rows[:20], 20, "two")], small)
    with pytest.raises(UserError, match="active latents, got 3 empty ones"):
        SparseIndex.build(sparse.csr_array((3, D_SAE), dtype=np.float32))
    index = SparseIndex.build(rows[:100], small)
    before = len(index)
    with pytest.raises(UserError, match="d_sae 400, got 300"):
        index.add(rows[:10, :300])
    with pytest.raises(UserError, match="got 3 2 times"):
        index.add(features(rows[:1], 3))
    with pytest.raises(UserError, match="at least one row to add"):
        index.add([])
    assert len(index) == before == index.codes.n_rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pca"}, "got 'pca'"),
        ({"dims": 0}, "dims of at least 1 or None, got 0"),
        ({"fit_rows": 0}, "fit_rows of at least 1, got 0"),
        ({"power": 0.0}, "power above 0"),
        ({"factory": "Nonsense"}, "got 'Nonsense'"),
        ({"dims": 500}, "dims between 1 and 100"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str, rows: sparse.csr_array) -> None:
    with pytest.raises(UserError, match=message):
        SparseIndex.build(rows[:100], IndexConfig(**settings))


def test_other_folders_and_versions_are_refused(rows: sparse.csr_array, tmp_path: Path) -> None:
    index = SparseIndex.build(rows[:100], IndexConfig(dims=16), folder=tmp_path / "index")
    with pytest.raises(UserError, match="already holds files"):
        index.save(tmp_path / "index")
    with pytest.raises(UserError, match="Expected a folder"):
        SparseIndex.load(tmp_path / "nothing")
    head = tmp_path / "index" / "index.json"
    text = head.read_text()
    _replace(head, json.dumps(json.loads(text) | {"version": 2}))
    with pytest.raises(UserError, match="version 1, got sae-apps-index version 2"):
        SparseIndex.load(tmp_path / "index")
    head.write_text(text.replace("400", "401"))
    with pytest.raises(CorruptFileError, match=r"index\.json"):
        SparseIndex.load(tmp_path / "index")


def _replace(file: Path, text: str) -> None:
    """Change a file of an atomic folder and its entry in the manifest."""
    import hashlib

    file.write_text(text)
    manifest = file.with_name("manifest.json")
    entries = json.loads(manifest.read_text())
    data = file.read_bytes()
    entries["files"][file.name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest.write_text(json.dumps(entries))
