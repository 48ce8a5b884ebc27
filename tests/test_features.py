"""SparseFeatures: what is refused, and top rows and latents against a dense sort."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sae_core.errors import UserError
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance

ORIGIN = Provenance("model", "main", "layers.1.out", "none", "demo", "0", "torch 2")


def rows(n: int, *, first: int = 0) -> pa.Table:
    return pa.table({"row_id": np.arange(first, first + n), "text": [f"row {i}" for i in range(n)]})


def csr(data, indices, indptr, shape, dtype=np.float32) -> sparse.csr_array:
    return sparse.csr_array((np.array(data, dtype), np.array(indices), np.array(indptr)), shape)


GOOD = csr([1, 2, 3], [0, 2, 1], [0, 2, 2, 3], (3, 3))


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Dense activations with many ties and zeros, and row ids in no order."""
    n_rows, d_sae = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    values = st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.5, 2.0])
    row = st.lists(values, min_size=d_sae, max_size=d_sae)
    dense = np.array(draw(st.lists(row, min_size=n_rows, max_size=n_rows)), dtype=np.float32)
    ids = draw(st.lists(st.integers(-50, 50), min_size=n_rows, max_size=n_rows, unique=True))
    return dense, np.array(ids)


def by_sorting(values: np.ndarray, n: int) -> list[int]:
    """Places of the n largest, by plain Python: descending value, then ascending place."""
    active = [(-value, place) for place, value in enumerate(values) if value > 0]
    return [place for _, place in sorted(active)[:n]]


@settings(max_examples=150, deadline=None)
@given(tables(), st.integers(0, 9))
def test_top_rows_and_top_latents_are_those_of_a_dense_sort(table, n: int) -> None:
    dense, ids = table
    features = SparseFeatures(sparse.csr_array(dense), pa.table({"row_id": ids}), ORIGIN)
    for latent in range(dense.shape[1]):
        best = by_sorting(dense[:, latent], n)
        row_ids, values = features.top_rows(latent, n)
        assert row_ids.tolist() == ids[best].tolist()
        assert values.tolist() == dense[best, latent].tolist()
    for place, row_id in enumerate(ids.tolist()):
        best = by_sorting(dense[place], n)
        latents, values = features.top_latents(row_id, n)
        assert latents.tolist() == best
        assert values.tolist() == dense[place, best].tolist()
    np.testing.assert_array_equal(features.freq, (dense > 0).mean(axis=0))
    np.testing.assert_array_equal(features.row_index(ids[::-1]), np.arange(len(ids))[::-1])


def test_asking_changes_nothing() -> None:
    features = SparseFeatures(GOOD.copy(), rows(3), ORIGIN)
    first = [a.tolist() for a in features.top_rows(0, 3)]
    assert [a.tolist() for a in features.top_rows(0, 3)] == first == [[0], [1.0]]
    np.testing.assert_array_equal(features.acts.toarray(), GOOD.toarray())
    with pytest.raises(AttributeError):
        features.acts = GOOD


@pytest.mark.parametrize(
    ("acts", "message"),
    [
        (GOOD.astype(np.float64), "float32, got float64"),
        (csr([], [], [0], (0, 3)), "at least one row and one latent, got 0 x 3"),
        (csr([1, 2, 3], [2, 0, 1], [0, 2, 2, 3], (3, 3)), "ascending order .* in line 0"),
        (csr([1, 2, 3], [0, 1, 1], [0, 1, 3, 3], (3, 3)), "none twice, got others in line 1"),
        (csr([1, 0, 3], [0, 2, 1], [0, 2, 2, 3], (3, 3)), "got 0.0 for latent 2 .* row_id 10"),
        (csr([1, 2, -3], [0, 2, 1], [0, 2, 2, 3], (3, 3)), "got -3.0 for latent 1 .* row_id 12"),
        (csr([1, np.nan, 3], [0, 2, 1], [0, 2, 2, 3], (3, 3)), "got nan .* row_id 10"),
        (csr([1, 2, np.inf], [0, 2, 1], [0, 2, 2, 3], (3, 3)), "got inf .* row_id 12"),
    ],
)
def test_bad_activations_are_refused(acts, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SparseFeatures(acts, rows(3, first=10), ORIGIN)


def test_latents_out_of_range_and_broken_pointers_are_refused() -> None:
    outside = GOOD.copy()
    outside.indices[1] = 3  # scipy does not look again
    with pytest.raises(UserError, match="between 0 and 2, got 0 to 3"):
        SparseFeatures(outside, rows(3), ORIGIN)
    falling = GOOD.copy()
    falling.indptr[1:3] = [2, 1]
    with pytest.raises(UserError, match="never fall"):
        SparseFeatures(falling, rows(3), ORIGIN)
    short = GOOD.copy()
    short.indptr[-1] = 2
    with pytest.raises(UserError, match="row pointers from 0 to 3"):
        SparseFeatures(short, rows(3), ORIGIN)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"id": [1, 2, 3]}), r"column row_id, got the columns \['id'\]"),
        (rows(2), "row table of 3 rows, got 2"),
        (pa.table({"row_id": pa.array([1, 2, 3], pa.int32())}), "int64 without nulls, got int32"),
        (pa.table({"row_id": pa.array([1, None, 3], pa.int64())}), "with 1 nulls"),
        (pa.table({"row_id": [4, 9, 9]}), "got 9 2 times"),
    ],
)
def test_bad_row_tables_are_refused(table: pa.Table, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SparseFeatures(GOOD, table, ORIGIN)


def test_provenance_must_be_complete() -> None:
    with pytest.raises(UserError, match="data_id must be a non-empty string"):
        Provenance("model", "main", "layers.1.out", "none", "", "0", "torch 2")


def test_unknown_rows_and_latents_are_refused_with_the_range() -> None:
    features = SparseFeatures(GOOD, rows(3, first=10), ORIGIN)
    for latent in (-1, 3):
        with pytest.raises(UserError, match=f"between 0 and 2, got {latent}"):
            features.top_rows(latent, 1)
    for row_id in (9, 13):
        with pytest.raises(UserError, match=f"3 row ids between 10 and 12, got {row_id}"):
            features.top_latents(row_id, 1)
    with pytest.raises(UserError, match="at least 0, got -1"):
        features.top_rows(0, -1)
