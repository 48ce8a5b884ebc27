"""Which planted features pass which null: the report on geography against its own definition."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from sae_apps.geospatial.moran import moran
from sae_apps.geospatial.places import Places
from sae_apps.geospatial.report import Nulls, adjusted, geo_report
from sae_apps.geospatial.weights import spatial_weights
from sae_core.errors import UserError
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance

NULLS = Nulls(permutations=199, permutations_screened=999)
N, BLOCK = 400, 100
LABEL, FINE, LONG, NOISE, MIXED, RARE, DEAD = range(7)


def make_places(labels: bool = True) -> Places:
    """A grid of 20 x 20 places in four square lands; names are longer in the north."""
    x, y = np.divmod(np.arange(N), 20)
    land = [f"land {2 * (i // 10) + j // 10}" for i, j in zip(x, y, strict=True)]
    table = {
        "row_id": pa.array(np.arange(N) + 1000),
        "name": pa.array([f"{'a' * (1 + j)}{i:02d}" for i, j in zip(x, y, strict=True)]),
        "lat": pa.array(y.astype(float)),
        "lon": pa.array(x.astype(float)),
    }
    if labels:
        table["admin"] = pa.array(land)
    return Places(pa.table(table), "a grid")


PLACES = make_places()
W = spatial_weights(PLACES)


def planted() -> np.ndarray:
    """Columns in the order LABEL .. DEAD."""
    rng = np.random.default_rng(0)
    x, y = np.divmod(np.arange(N), 20)
    out = np.zeros((N, 7), dtype=np.float32)
    out[:, LABEL] = np.array([0, 3, 1, 5])[[int(str(one)[-1]) for one in PLACES.label]]
    out[:, FINE] = (x % 10 < 5) * (y % 10 < 5) + 0.05 * rng.random(N)
    out[:, LONG] = y + 1
    out[:, NOISE] = rng.random(N) * (rng.random(N) < 0.3)
    out[:, MIXED] = out[:, LABEL] + 0.8 * rng.random(N)
    out[:4, RARE] = 1
    return out


def features_of(matrix: np.ndarray, rows=None) -> SparseFeatures:
    facts = {name: "x" for name in Provenance.__dataclass_fields__}
    table = rows or pa.table({"row_id": PLACES.row_id, "n_tokens": np.arange(N) % 3})
    return SparseFeatures(sparse.csr_array(matrix), table, Provenance(**facts))


@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(1)
    shuffled = planted()[rng.permutation(N)]
    baselines = {"shuffled": shuffled, "units": rng.normal(size=(N, 5)).astype(np.float32)}
    return geo_report(features_of(planted()), PLACES, W, baselines=baselines, nulls=NULLS)


def test_each_planted_feature_passes_the_nulls_it_should(report) -> None:
    assert report.passing("free") == [LABEL, FINE, LONG, MIXED]
    assert report.passing("within") == [FINE, LONG], "the label's own feature cannot be permuted"
    assert report.passing("after") == [LABEL, FINE, MIXED], "the length of the name explains LONG"
    assert report.passing() == [FINE] == report.passing("beyond")
    for null in ("free", "within", "after", "beyond", "survives"):
        assert report.passing(null, name="shuffled") == [] == report.passing(null, name="units")
    words = report.table["verdict"].to_pylist()[:7]
    assert words == [
        "labels alone", "beyond labels", "not after covariates", "not spatial", "labels alone",
        "not tested: rare", "not tested: dead",
    ]  # fmt: skip


def test_the_numbers_are_those_of_moran(report) -> None:
    table = report.table.slice(0, 7).to_pylist()
    free = moran(planted(), W, permutations=199, p_adjust="bh").table.to_pylist()
    covariates = {"n_tokens": np.arange(N) % 3, "n_chars": [len(one) for one in PLACES.name]}
    kept = planted()[:, [FINE, LONG]]
    within = moran(kept, W, permutations=999, strata=PLACES.label).table.to_pylist()
    after = moran(planted(), W, permutations=9, covariates=covariates).table.to_pylist()
    beyond = moran(
        planted(), W, permutations=9, strata=PLACES.label, strata_means=True,
        covariates=covariates,
    ).table.to_pylist()  # fmt: skip
    for row, one, *residuals in zip(table, free, after, beyond, strict=True):
        assert row["I"] == one["I"] and row["p_free"] == one["p_sim"]
        for name, residual in zip(("I_after", "I_beyond"), residuals, strict=True):
            assert row[name] == pytest.approx(residual["I"], abs=1e-12) or residual["I"] is None
    fine = moran(
        kept, W, permutations=999, strata=PLACES.label, strata_means=True, covariates=covariates
    ).table.to_pylist()  # fmt: skip
    assert table[FINE]["p_beyond"] == fine[0]["p_sim"]
    for column, one in zip((FINE, LONG), within, strict=True):
        assert table[column]["p_within"] == one["p_sim"]
        assert table[column]["EI_within"] == pytest.approx(one["EI_sim"])
    assert table[NOISE]["p_within"] is None and table[NOISE]["q_within"] is None
    assert not any(v != v for row in table for v in row.values() if isinstance(v, float))


def test_counts_and_shares_are_over_tested_features(report) -> None:
    rows = {row["set"]: row for row in report.summary.to_pylist()}
    mine = rows["features"]
    assert (mine["n_features"], mine["n_tested"]) == (7, 5)
    assert [mine[f"n_{null}_q"] for null in ("free", "within", "after", "beyond")] == [4, 2, 3, 1]
    assert mine["free_frac"] == 4 / 5 and mine["survives_frac"] == 1 / 5
    assert mine["n_free_p"] == 4 and mine["n_survives_p"] == 1
    assert rows["shuffled"]["n_free_p"] == 0 and rows["shuffled"]["n_tested"] == 5
    assert rows["units"]["n_features"] == 5 and rows["units"]["max_I"] < 0.2


def test_the_leading_features_are_described(report) -> None:
    rows = report.leading.to_pylist()
    largest = sorted(rows, key=lambda row: -row["I"])
    assert rows == largest and rows[0]["I"] > 0.9 and len(rows) == 5
    (label,) = [row for row in rows if row["feature"] == LABEL]
    assert label["label"] == "land 3" and label["label_share"] == pytest.approx(5 / 9)
    assert label["label_base"] == 0.25
    (long,) = [row for row in rows if row["feature"] == LONG]
    assert all(name.startswith("a" * 20) for name in long["top_places"])
    assert long["top_row_ids"][0] == 1000 + 19 and long["top_values"][0] == 20


def test_places_without_label_are_no_label() -> None:
    """Most of the feature lies where no label is known."""
    labels = [None if one == "land 3" else one for one in PLACES.label]
    found = geo_report(features_of(planted()), PLACES, W, labels=labels, nulls=NULLS)
    (row,) = [row for row in found.leading.to_pylist() if row["feature"] == LABEL]
    assert (row["label"], row["label_base"]) == ("land 1", 0.25)
    assert row["label_share"] == pytest.approx(3 / 9), "of all that the feature has"


def test_without_labels_there_is_no_null_within_them() -> None:
    bare = make_places(labels=False)
    got = geo_report(planted(), bare, W, nulls=NULLS)
    assert not {"p_within", "p_beyond"} & set(got.table.column_names)
    assert got.how["n_labels"] == 0 and got.summary["n_within_q"].to_pylist() == [None]
    assert got.passing() == [LABEL, FINE, MIXED], "control: labels took these two away"
    same = geo_report(planted(), PLACES, W, labels=["one"] * N, nulls=NULLS)
    assert same.passing() == got.passing()


def test_rows_find_their_places_by_id(report) -> None:
    order = np.random.default_rng(2).permutation(N)
    rows = pa.table({"row_id": PLACES.row_id[order], "n_tokens": (np.arange(N) % 3)[order]})
    mixed = geo_report(features_of(planted()[order], rows), PLACES, W, nulls=NULLS)
    assert mixed.table.equals(report.table.slice(0, 7))
    assert mixed.leading.equals(report.leading)


def test_further_covariates_take_effect(report) -> None:
    x, y = np.divmod(np.arange(N), 20)
    corner = ((x % 10 < 5) * (y % 10 < 5)).astype(float)
    got = geo_report(features_of(planted()), PLACES, W, covariates={"corner": corner}, nulls=NULLS)
    assert got.passing("beyond") == [] != report.passing("beyond")
    assert got.how["covariates"] == ["corner", "n_chars", "n_tokens"]


def test_a_covariate_can_hide_what_the_residuals_show() -> None:
    noise = np.random.default_rng(4).normal(size=N).astype(np.float32)
    hidden = (planted()[:, FINE] + 3 * noise)[:, None]
    got = geo_report(hidden, PLACES, W, covariates={"noise": noise}, nulls=NULLS)
    assert got.table["I"][0].as_py() < 0.3 < got.table["I_after"][0].as_py()
    assert got.passing("after") == [0] and got.passing("free") == [] == got.passing()


def test_adjustment_counts_what_was_not_permuted_as_one() -> None:
    p = np.array([0.001, np.nan, 0.004, np.nan, 0.002])
    tested = np.array([True, True, True, False, True])
    got = adjusted(p, tested, "bh")
    np.testing.assert_allclose(got[[0, 2, 4]], [0.004, 0.004 * 4 / 3, 0.004])
    assert np.isnan(got[[1, 3]]).all()
    assert adjusted(p, tested, "by")[0] == pytest.approx(0.004 * (1 + 1 / 2 + 1 / 3 + 1 / 4))
    np.testing.assert_array_equal(adjusted(p, tested, None), p)


def test_a_p_at_its_floor_gets_the_permutations_that_its_q_needs() -> None:
    """One compact feature of 10 places among 60 of noise: 199 permutations cannot show q < .01."""
    rng = np.random.default_rng(3)
    x = (rng.random((N, 61)) < 0.1).astype(np.float32)
    x[:, 0] = 0
    x[[0, 1, 2, 20, 21, 22, 40, 41, 42, 43], 0] = 1  # too few for the Pearson III tail

    def one(**settings) -> tuple:
        nulls = Nulls(permutations=199, permutations_screened=199, **settings)
        got = geo_report(x, PLACES, W, nulls=nulls)
        row = got.table.slice(0, 1).to_pylist()[0]
        return row["p_within"], row["q_within"], got.how["sets"]["features"]["within"]

    p, q, how = one(permutations_most=199)
    assert (p, q) == (1 / 200, pytest.approx(61 / 200)) and "permutations_longer" not in how
    p, q, how = one()
    assert how["permutations_longer"] == 6101 and how["n_permuted_longer"] == 1
    assert p == 1 / 6102 and q < 0.01


def test_a_report_is_saved_whole(tmp_path, report) -> None:
    report.save(tmp_path / "geo")
    table = pq.read_table(tmp_path / "geo" / "moran.parquet")
    assert table.equals(report.table)
    how = json.loads(table.schema.metadata[b"how"])
    assert how["alpha"] == 0.01 and how["sets"]["features"]["within"]["permutations"] == 999
    assert pq.read_table(tmp_path / "geo" / "leading.parquet").equals(report.leading)
    summary = json.loads((tmp_path / "geo" / "summary.json").read_text())
    assert summary["sets"] == report.summary.to_pylist()
    with pytest.raises(UserError, match="already holds files"):
        report.save(tmp_path / "geo")
    report.save(tmp_path / "geo", overwrite=True)


def test_seeds_decide_the_permutations() -> None:
    def p(seed: int) -> list:
        nulls = Nulls(permutations=199, permutations_screened=199, seed=seed)
        return geo_report(planted(), PLACES, W, nulls=nulls).table["p_free"].to_pylist()

    assert p(3) == p(3) != p(4)


def test_what_does_not_fit_is_refused() -> None:
    x = planted()
    other = pa.table({"row_id": PLACES.row_id + 1})
    for call, said in (
        (lambda: geo_report(x[:9], PLACES, W), r"features as a matrix of 400 rows, got .*\(9, 7"),
        (lambda: geo_report(features_of(x, other), PLACES, W), "features of 400 rows with other"),
        (lambda: geo_report(x, PLACES, W, baselines={"features": x}), "called 'features'"),
        (lambda: geo_report(x, PLACES, W, labels=["a"]), "label for each of 400 places, got 1"),
        (lambda: geo_report(x, PLACES.take(range(300)), W), "300"),
        (lambda: Nulls(p_adjust="max"), "p_adjust in .*, got 'max'"),
        (lambda: Nulls(alpha=1.5), "alpha between 0 and 1, got 1.5"),
        (lambda: Nulls(permutations=99), "permutations above 99, .* alpha 0.01, got 99"),
    ):
        with pytest.raises(UserError, match=said):
            call()
