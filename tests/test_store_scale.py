"""A store of many rows: every answer is that of all rows at once, and its memory is measured."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse

from benchmarks import store_scale
from benchmarks.longrun_memory import peak_mib
from sae_apps.selection import similarity
from sae_apps.selection.browse import top_latents, top_rows
from sae_apps.selection.pool import PoolFeatures, open_pool
from sae_core.errors import UserError
from sae_core.features import SparseFeatures

ROWS, SHARD_ROWS, D_SAE = 20_000, 3000, 96


def base_rows(n: int, seed: int = 0) -> sparse.csr_array:
    """Rows of some six latents, a tenth of which hold few values, so that there are ties."""
    rng = np.random.default_rng(seed)
    made = sparse.random_array((n, D_SAE), density=0.06, dtype=np.float32, rng=rng)
    acts = sparse.csr_array(made)
    acts.data = np.where(acts.indices % 10 == 0, 1 + np.rint(acts.data), acts.data + 0.01)
    acts.data = acts.data.astype(np.float32)
    return acts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A scratch folder with a store of 20,000 rows."""
    folder = tmp_path_factory.mktemp("store")
    store_scale.write_base(folder, base_rows(2000 + store_scale.N_TARGETS), "sae")
    row = store_scale.measured("build", folder, ROWS, SHARD_ROWS)
    (folder / "row.json").write_text(json.dumps(row))
    return folder


@pytest.fixture(scope="module")
def whole(place) -> SparseFeatures:
    """The same rows in memory."""
    shards = list(open_pool(place / "pool"))
    return store_scale.features(sparse.vstack([one.acts for one in shards]), 0, "sae")


# ---- browse ----


def test_a_pool_answers_as_all_its_rows_at_once(place, whole) -> None:
    pool = open_pool(place / "pool")
    assert pool.sizes() == [3000] * 6 + [2000]
    latents = [10, 3, 0, 95]
    for n in (0, 1, 40, ROWS):
        for latent, (row_ids, values) in zip(latents, top_rows(pool, latents, n), strict=True):
            wanted_ids, wanted = whole.top_rows(latent, n)
            np.testing.assert_array_equal(row_ids, wanted_ids)
            np.testing.assert_array_equal(values, wanted)
    for row_id in (0, 2999, 3000, ROWS - 1):
        for found, wanted in zip(
            top_latents(pool, row_id, 4), whole.top_latents(row_id, 4), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)


def test_equal_values_come_in_the_order_of_the_pool() -> None:
    shards = [
        store_scale.features(sparse.csr_array([[1.0, 0], [2, 0], [1, 0]]), 10 * i, "sae")
        for i in range(3)
    ]
    ((row_ids, values), (nothing, _)) = top_rows(PoolFeatures.of(*shards), [0, 1], 5)
    assert row_ids.tolist() == [1, 11, 21, 0, 2] and values.tolist() == [2, 2, 2, 1, 1]
    assert nothing.size == 0
    assert top_latents(PoolFeatures.of(*shards), 21, 3)[0].tolist() == [0]


def test_unknown_rows_and_latents_are_refused(place) -> None:
    pool = open_pool(place / "pool")
    with pytest.raises(UserError, match="row id of the pool resampled tokens, got 20000"):
        top_latents(pool, ROWS, 3)
    with pytest.raises(UserError, match="a latent between 0 and 95, got 96"):
        top_rows(pool, [96], 3)
    with pytest.raises(UserError, match="at least 0, got -1"):
        top_rows(pool, [1], -1)


# ---- the suite ----


def test_resampled_rows_are_real_rows_times_a_factor() -> None:
    base = base_rows(50)
    acts = store_scale.resampled(base, 3, 400)
    same = store_scale.resampled(base, 3, 400)
    np.testing.assert_array_equal(acts.toarray(), same.toarray())
    assert (acts.toarray() != store_scale.resampled(base, 4, 400).toarray()).any()
    unit = [row / row.sum() for row in base.toarray() if row.any()]
    for row in acts.toarray():
        if row.any():
            assert np.abs(np.array(unit) - row / row.sum()).sum(axis=1).min() < 1e-5
    sums = base.toarray().sum(axis=1)
    assert acts.toarray().sum(axis=1).max() <= sums.max()


def test_building_counts_rows_bytes_and_memory(place, whole) -> None:
    row = json.loads((place / "row.json").read_text())
    size = sum(f.stat().st_size for f in (place / "pool").rglob("*") if f.is_file())
    assert row["bytes_a_row"] == pytest.approx(size / ROWS, abs=1e-3)
    assert row["nonzeros_a_row"] == pytest.approx(len(whole.acts.data) / ROWS, abs=1e-3)
    assert row["rows_per_s"] == pytest.approx(ROWS / row["seconds"], rel=0.1)
    slack = 1.0  # MiB: the kernel counts pages in batches
    assert row["peak_MiB"] + slack > row["half_peak_MiB"] > row["imports_MiB"] - slack > 0


@pytest.mark.parametrize(
    ("step", "answer"),
    [
        ("open", "7 shards"),
        ("row table", "20000 rows"),
        ("top rows", "100 rows, latent"),
        ("top latents", "latents of row 19999"),
        ("frequencies", "96 latents"),
    ],
)
def test_every_question_is_timed(place, step: str, answer: str) -> None:
    row = store_scale.measured(step, place, ROWS, SHARD_ROWS)
    assert answer in row["answer"] and row["seconds"] >= 0 and row["name"] == step
    assert [goal.met for goal in store_scale.goals([row])] == [row["peak_MiB"] <= 2048]


def test_the_selection_is_the_exact_one(place, whole) -> None:
    row = store_scale.measured("select", place, ROWS, SHARD_ROWS)
    targets = base_rows(2000 + store_scale.N_TARGETS)[2000:]
    mean = np.asarray(targets.mean(axis=0), dtype=np.float32).reshape(1, -1)
    scores = np.sort(similarity.score(whole.acts, mean, "jaccard")[:, 0])[::-1]
    assert row["answer"] == f"1000 picks, scores {scores[0]:.4f} to {scores[999]:.4f}"


def test_the_peak_of_a_new_process_is_its_own() -> None:
    """``ru_maxrss`` of a child begins with what its parent held; the peak that is read does not."""
    held = np.ones(96 * 2**20, dtype=np.uint8)
    code = "from benchmarks.longrun_memory import peak_mib; print(peak_mib())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 < float(run.stdout) < 64
    assert peak_mib() > held.nbytes / 2**20


def test_goals_say_what_grew_and_what_is_too_large() -> None:
    row = {"name": "build", "rows": 10, "peak_MiB": 1000.0, "half_peak_MiB": 990.0}
    assert [goal.met for goal in store_scale.goals([row])] == [True, True]
    assert [goal.met for goal in store_scale.goals([row | {"half_peak_MiB": 900.0}])] == [
        False,
        True,
    ]
    row = {"name": "open", "rows": 10, "peak_MiB": 4000.0, "half_peak_MiB": None}
    assert [goal.met for goal in store_scale.goals([row])] == [False]
