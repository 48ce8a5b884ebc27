"""Pooling against plain loops, and features of a real model that do not depend on the batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sae_core import pooling as pooling_module
from sae_core.activations import HarvestConfig
from sae_core.errors import UserError
from sae_core.featurize import RowTable, featurize
from sae_core.kernels.codes import Codes, codes_where
from sae_core.pooling import POOLINGS, RowPooler, pool_tokens
from sae_core.sae import SAE, SAEConfig
from sae_core.text import TextRow, rows_from_texts

HOOK_POINT = "layers.2.out"
TEXTS = (
    "Once upon a time there was a little girl named Lily. She loved to play with her red ball.",
    "",
    "Tom saw a big dog in the park.\n\nHe was very happy and ran to the dog. " * 4,
    "The end.",
    'Sara and Ben like the bird. "Look, a bird!" says Ben. The bird flies away.',
)
# Activations of one token differ by rounding between batches of different width.
ROUNDING = 1e-4


def codes_of(dense: np.ndarray) -> Codes:
    values = torch.from_numpy(dense)
    return codes_where(values > 0, values)


def by_loops(dense: np.ndarray, position: np.ndarray, pooling: str) -> np.ndarray:
    """The pool of one row's tokens, [d_sae], from the definition."""
    if pooling == "last":
        return dense[position.argmax()]
    return {"max": dense.max, "mean": dense.mean, "sum": dense.sum}[pooling](axis=0)


@st.composite
def token_batches(draw: st.DrawFn) -> tuple[list[tuple], np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of a few rows in random order, cut into batches; and the same in one piece."""
    n, d_sae = draw(st.integers(1, 14)), draw(st.integers(1, 5))
    # multiples of 1/8 below 4: sums are exact in any order, so that tests can ask for equality
    value = st.one_of(st.just(0.0), st.integers(1, 31).map(lambda i: i / 8))
    row = st.lists(value, min_size=d_sae, max_size=d_sae)
    dense = np.array(draw(st.lists(row, min_size=n, max_size=n)), dtype=np.float32)
    row_id = np.array(draw(st.lists(st.sampled_from([40, 7, 19]), min_size=n, max_size=n)))
    position = np.array(draw(st.permutations(range(n))), dtype=np.int32)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=3)))
    pieces = [
        (codes_of(dense[a:b]), torch.from_numpy(row_id[a:b]), torch.from_numpy(position[a:b]))
        for a, b in zip([0, *cuts], [*cuts, n], strict=True)
    ]
    return pieces, dense, row_id, position


@settings(max_examples=60)
@given(token_batches(), st.sampled_from(POOLINGS), st.booleans())
def test_streamed_pools_are_those_of_the_definition(case, pooling: str, compact: bool) -> None:
    pieces, dense, row_id, position = case
    with pytest.MonkeyPatch.context() as patch:
        if compact:
            patch.setattr(pooling_module, "_COMPACT_AFTER", 0)
        pooler = RowPooler(dense.shape[1], pooling)
        for piece in pieces:
            pooler.update(*piece)
    ids = np.array([19, 5, 40, 7])  # row 5 has no token
    acts, n_tokens = pooler.compute(ids)
    assert n_tokens.tolist() == [(row_id == i).sum() for i in ids]
    for place, i in enumerate(ids):
        mine = row_id == i
        expected = by_loops(dense[mine], position[mine], pooling) if mine.any() else 0 * dense[0]
        np.testing.assert_allclose(acts[[place]].toarray()[0], expected, rtol=1e-6)
    assert acts.dtype == np.float32 and (acts.data > 0).all() and acts.has_canonical_format


@settings(max_examples=60)
@given(token_batches(), st.sampled_from(POOLINGS))
def test_merging_is_associative_and_commutative(case, pooling: str) -> None:
    pieces = (case[0] * 3)[:3]
    a, b, c = (pool_tokens(*piece, pooling) for piece in pieces)
    left = a.merge(b).merge(c)
    for other in (a.merge(b.merge(c)), c.merge(a).merge(b)):
        for name in ("row_id", "n_tokens", "last"):
            np.testing.assert_array_equal(getattr(left, name), getattr(other, name))
        np.testing.assert_array_equal(left.acts.toarray(), other.acts.toarray())


def test_two_poolers_merge_to_one_that_saw_everything() -> None:
    rng = np.random.default_rng(0)
    dense = np.maximum(rng.standard_normal((40, 6)), 0).astype(np.float32)
    row_id = torch.from_numpy(rng.integers(0, 5, 40))
    position = torch.arange(40, dtype=torch.int32)
    one, first, second = (RowPooler(6, "mean") for _ in range(3))
    one.update(codes_of(dense), row_id, position)
    first.update(codes_of(dense[:15]), row_id[:15], position[:15])
    second.update(codes_of(dense[15:]), row_id[15:], position[15:])
    second.merge(first)
    acts, _ = one.compute(np.arange(5))
    assert acts.indices.dtype == acts.indptr.dtype == np.int32
    for left, right in zip(one.compute(np.arange(5)), second.compute(np.arange(5)), strict=True):
        left, right = (a.toarray() if sparse.issparse(a) else a for a in (left, right))
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_pools_that_do_not_fit_are_refused() -> None:
    codes = codes_of(np.ones((2, 3), dtype=np.float32))
    ids, place = torch.tensor([4, 9]), torch.tensor([0, 0])
    with pytest.raises(UserError, match="got 'median'"):
        pool_tokens(codes, ids, place, "median")
    with pytest.raises(UserError, match="each of 2 tokens, got 1 and 1"):
        pool_tokens(codes, ids[:1], place[:1], "max")
    with pytest.raises(UserError, match="one kind"):
        pool_tokens(codes, ids, place, "max").merge(pool_tokens(codes, ids, place, "sum"))
    pooler = RowPooler(3, "max")
    pooler.update(codes, ids, place)
    with pytest.raises(UserError, match="2 rows given, got row_id 9"):
        pooler.compute(np.array([4, 5]))
    with pytest.raises(UserError, match="got 9 more than once"):
        pooler.compute(np.array([9, 4, 9]))


def test_labels_get_one_type_a_column() -> None:
    table = RowTable()
    meta = [
        {"year": 1901, "score": 1, "name": "a", "mixed": 1, "flag": True, "text": "x", "nan": 1.5},
        {"year": 1902, "score": 0.5, "name": "b", "mixed": "z", "flag": False, "big": 2**70},
        {"late": 3, "nan": float("nan")},
    ]
    rows = [TextRow(i * 10, f"text {i}", m) for i, m in enumerate(meta)]
    assert list(table.record(rows)) == rows
    got = table.table(np.array([3, 0, 2], dtype=np.int32))
    assert got.to_pydict() == {
        "row_id": [0, 10, 20],
        "text": ["text 0", "text 1", "text 2"],
        "n_tokens": [3, 0, 2],
        "year": [1901, 1902, None],
        "score": [1.0, 0.5, None],
        "name": ["a", "b", None],
        "mixed": ["1", "z", None],
        "flag": [True, False, None],
        "meta.text": ["x", None, None],
        "nan": [1.5, None, None],
        "big": [None, str(2**70), None],
        "late": [None, None, 3],
    }
    types = {name: str(got.schema.field(name).type) for name in got.column_names}
    assert types["year"] == "int64" and types["score"] == "double" and types["mixed"] == "string"


@pytest.fixture(scope="module")
def sae() -> SAE:
    config = SAEConfig(64, 96, kind="relu")
    model = SAE(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        model.b_enc -= 0.15  # sparse, and no latent switches by rounding at a rank
    return model


def features(lm, sae, texts=TEXTS, **options):
    options = {"data_id": "texts"} | options
    return featurize(lm, sae, rows_from_texts(texts), HOOK_POINT, **options)


@pytest.mark.parametrize("pooling", [*POOLINGS, "none"])
def test_batches_make_no_difference(tiny_lm, sae: SAE, pooling: str) -> None:
    config = HarvestConfig(context_size=32)
    whole = features(tiny_lm, sae, pooling=pooling, config=config)
    for other in (
        replace(config, batch_tokens=32),
        replace(config, window_rows=1),
        replace(config, batching="pack"),
    ):
        again = features(tiny_lm, sae, pooling=pooling, config=other)
        assert again.rows.equals(whole.rows)
        np.testing.assert_allclose(
            again.acts.toarray(), whole.acts.toarray(), atol=ROUNDING * TEXTS[2].count(" ")
        )
    assert 0.005 < whole.acts.nnz / np.prod(whole.acts.shape) < 0.9


def test_pooled_rows_are_pools_of_the_token_level_features(tiny_lm, sae: SAE) -> None:
    config = HarvestConfig(context_size=32)  # the third text takes several chunks
    tokens = features(tiny_lm, sae, pooling="none", config=config)
    source = tokens.rows["source_row_id"].to_numpy()
    position = tokens.rows["position"].to_numpy()
    assert (np.diff(source * 10_000 + position) > 0).all(), "sorted by row and position"
    dense = tokens.acts.toarray()
    for pooling in POOLINGS:
        pooled = features(tiny_lm, sae, pooling=pooling, config=config)
        assert pooled.rows["text"].to_pylist() == list(TEXTS)
        assert pooled.rows["n_tokens"].to_pylist() == [(source == i).sum() for i in range(5)]
        for i in (0, 2, 3, 4):
            expected = by_loops(dense[source == i], position[source == i], pooling)
            np.testing.assert_allclose(pooled.acts[[i]].toarray()[0], expected, rtol=1e-5)
        assert pooled.acts[[1]].nnz == 0, "the empty text has an empty code"
    assert (source == 2).sum() > 32


def test_batch_topk_does_not_depend_on_its_batch(tiny_lm) -> None:
    sae = SAE(SAEConfig(64, 96, kind="batch_topk", k=4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.threshold += 0.2
    trained, evaluated = sae.train(), features(tiny_lm, sae)
    assert trained.training, "the mode is given back"
    np.testing.assert_array_equal(
        features(tiny_lm, sae.eval()).acts.toarray(), evaluated.acts.toarray()
    )
    assert evaluated.acts.nnz > 0


def test_the_origin_and_the_progress_are_told(tiny_lm, sae: SAE) -> None:
    counts: list[int] = []
    got = features(tiny_lm, sae, data_id="five texts", seed=3, progress=counts.append)
    origin = got.provenance
    assert (origin.hook_point, origin.sae_hash) == (HOOK_POINT, sae.hash())
    assert (origin.data_id, origin.seed) == ("five texts", "3")
    assert origin.model_id == tiny_lm.model_id and origin.model_revision == tiny_lm.revision
    assert sum(counts) == sum(got.rows["n_tokens"].to_pylist()) > 0


def test_bad_requests_are_refused(tiny_lm, sae: SAE) -> None:
    narrow = SAE(SAEConfig(63, 96, kind="relu"))
    with pytest.raises(UserError, match="width d_in 63, but layers.2.out of .* has 64"):
        features(tiny_lm, narrow)
    with pytest.raises(UserError, match="max_tokens None, got 5"):
        features(tiny_lm, sae, config=HarvestConfig(max_tokens=5))
    with pytest.raises(UserError, match="got 'median'"):
        features(tiny_lm, sae, pooling="median")
    with pytest.raises(UserError, match="at least one row of text"):
        featurize(tiny_lm, sae, [], HOOK_POINT, data_id="none")
    with pytest.raises(UserError, match="got none in 1 rows"):
        features(tiny_lm, sae, texts=("",), pooling="none")
    twice = [TextRow(1, "The cat sat.", {}), TextRow(1, "The dog ran.", {})]
    with pytest.raises(UserError, match="got 1 more than once"):
        featurize(tiny_lm, sae, twice, HOOK_POINT, data_id="twice")
