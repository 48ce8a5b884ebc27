"""Real rows of features, and as many made from them as wished; clocks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy import sparse

from benchmarks.selection_data import load
from sae_core.features import shape_of

DEPTHS = (100, 200, 500, 1000)

SHARD = 16_384


class Source:
    """Real rows, and as many made from them as wished."""

    def __init__(self) -> None:
        data = load("reduced")
        acts = data.representation("gba")
        members = np.unique(np.concatenate([t.members for t in data.targets.values()]))
        self.pool = narrow(acts[data.pool])
        self.held_out = narrow(acts[np.setdiff1d(members, data.pool)])
        self.token = float(np.median(self.pool.data))

    def shard(self, number: int, n: int = SHARD) -> sparse.csr_array:
        """Rows of one shard of the pool, always the same."""
        return self._mixed(self.pool, n, np.random.default_rng([1, number]))

    def targets(self, n: int) -> sparse.csr_array:
        """Rows to search for."""
        return self._mixed(self.held_out, n, np.random.default_rng([2]))

    def shards(self, n: int) -> Iterator[sparse.csr_array]:
        """n rows, shard by shard."""
        for start in range(0, n, SHARD):
            yield self.shard(start // SHARD, min(SHARD, n - start))

    def _mixed(self, base: sparse.csr_array, n: int, rng: np.random.Generator) -> sparse.csr_array:
        share = rng.uniform(0.5, 1, n)
        first, second = (rng.integers(shape_of(base)[0], size=n) for _ in range(2))
        parts = [
            self._thinned(sparse.csr_array(base[rows]), weight, rng)
            for rows, weight in ((first, share), (second, 1 - share))
        ]
        return narrow(sparse.csr_array(parts[0] + parts[1]))

    def _thinned(
        self, rows: sparse.csr_array, share: np.ndarray, rng: np.random.Generator
    ) -> sparse.csr_array:
        values: np.ndarray = rows.data
        tokens = np.maximum(1, np.rint(values / self.token)).astype(np.int64)
        kept = rng.binomial(tokens, np.repeat(share, np.diff(rows.indptr)))
        # a is a mean over tokens, of which the share stays: a * kept / tokens is share * its mean
        rows.data = (values * kept / tokens).astype(np.float32)
        rows.eliminate_zeros()
        return rows


def narrow(acts: Any) -> sparse.csr_array:
    """float32 with int32 indices, canonical."""
    acts = sparse.csr_array(acts).astype(np.float32)
    acts.sort_indices()
    acts.indices = acts.indices.astype(np.int32)
    acts.indptr = acts.indptr.astype(np.int32)
    return acts


class Clock:
    """Seconds on the clock and of the processor (over all threads, divided by their number)."""

    wall = cpu = 0.0


@contextmanager
def clock() -> Iterator[Clock]:
    """Time a block."""
    found = Clock()
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found.wall = time.perf_counter() - wall
    found.cpu = (time.process_time() - cpu) / torch.get_num_threads()


def flat_row(what: str, name: str, **values: Any) -> dict[str, Any]:
    """All rows have the same columns."""
    columns = (
        "method", "dims", "factory", "rows", "targets", "threads", "bytes_a_row", "encode_rows_s",
        "encode_rows_s_cpu", "build_rows_s", "build_rows_s_cpu",
        "fit_s_cpu", "search_ms", "search_ms_cpu",
        *(f"recall_{depth}" for depth in DEPTHS), "n_candidates", "recall", "recall_low",
        "exact_ms", "exact_ms_cpu", "speedup", "speedup_cpu",
        "j_1", "j_10", "j_100", "nonzeros", "peak_gib",
    )  # fmt: skip
    empty = dict.fromkeys(columns)
    unknown = set(values) - set(empty)
    assert not unknown, unknown
    return {"name": name, "what": what, **empty, "threads": torch.get_num_threads(), **values}
