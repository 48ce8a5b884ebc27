"""Products with 8-bit codes: the same as FAISS's own refinement."""

from typing import Any

import faiss
import numpy as np
import pytest

from sae_apps.selection.refine import fine_codes, refined
from sae_core.errors import CorruptFileError

DIMS, ROWS = 32, 1201


def unit(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, DIMS)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def built(factory: str, metric: int = faiss.METRIC_INNER_PRODUCT) -> Any:
    index = faiss.index_factory(DIMS, factory, metric)
    index.train(unit(ROWS, 0))
    index.add(unit(ROWS, 1))
    return index


@pytest.mark.parametrize("n", [1, 7, 50, 400])
@pytest.mark.parametrize("factory", ["PQ16x4fs,Refine(SQ8)", "IVF16,SQ4,Refine(SQ8)"])
def test_candidates_are_those_of_faiss(factory: str, n: int) -> None:
    index = built(factory)
    queries = unit(40, 2)
    faiss.downcast_index(index).k_factor = 3.0
    expected, places = index.search(queries, n)
    found = fine_codes(faiss, index)
    assert found is not None
    products, mine = refined(*found, queries, n, 3)
    assert np.abs(products - expected).max() < 1e-5
    assert ((mine < 0) == (places < 0)).all()
    assert np.mean([len(set(a) ^ set(b)) for a, b in zip(mine, places, strict=True)]) < 0.2
    assert (products[:, :-1] >= products[:, 1:]).all()


def test_few_visited_cells_leave_places_open() -> None:
    """IVF with one cell visited finds fewer rows than it is asked for: the rest is -1."""
    index = built("IVF16,SQ4,Refine(SQ8)")
    faiss.extract_index_ivf(faiss.downcast_index(index).base_index).nprobe = 1
    found = fine_codes(faiss, index)
    assert found is not None
    products, places = refined(*found, unit(5, 2), 403, 2)
    assert (places[:, -1] == -1).all() and (places[:, 0] >= 0).all()
    assert (products[places < 0] == np.finfo(np.float32).min).all()
    assert np.abs(products[places >= 0]).max() < 1.1


@pytest.mark.parametrize("factory", ["PQ16x4fs", "Flat", "PQ16x4fs,Refine(Flat)", "SQ8"])
def test_other_indexes_are_left_to_faiss(factory: str) -> None:
    assert fine_codes(faiss, built(factory)) is None
    assert fine_codes(faiss, built("Flat,Refine(SQ8)", faiss.METRIC_L2)) is None
    assert fine_codes(faiss, faiss.index_binary_factory(64, "BFlat")) is None


def test_codes_that_do_not_fit_the_scan_are_refused() -> None:
    index = built("Flat,Refine(SQ8)")
    faiss.downcast_index(index).base_index.add(unit(1, 3))
    with pytest.raises(CorruptFileError, match="Expected 1202 codes of 32 bytes"):
        fine_codes(faiss, index)
