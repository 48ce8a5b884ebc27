"""Speed of exact similarity: bytes a second of `score` beside a bare read, and of `nearest`.

    python -m benchmarks.similarity_exact [--size full]

Rows are the pool of `benchmarks.selection_data` (SmolLM2, mean-pooled GBA codes, d_sae 4,608),
drawn with replacement. One million of them pass through; `reduced` holds 100,000 (1.2 GB, 40 times
the largest cache) and passes over them ten times, as over shards, `full` holds all.

Bytes counted are those a score needs: 4 for the index and 4 for the value of a nonzero, the row
pointers, and the scores. The bandwidth is that of adding up the same two arrays with the same
threads, by a compiled loop or by torch, whichever is faster; each round measures it anew, because
other programs share the memory. Medians over rounds. Beside the wall time stands the processor
time of the same calls (over all threads, divided by their number): on a machine that others load,
the wall time measures the others, and the two shares of the read differ.

"spread" are the same rows with their latents at random places of 131,072, to see what the width
costs: the values are real, the width is not.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from benchmarks.common import Goal, write_result
from benchmarks.selection_data import load
from sae_apps.selection import kernels
from sae_apps.selection.similarity import nearest, score
from sae_core.features import shape_of

ROWS = 1_000_000
HELD = {"reduced": 100_000, "full": ROWS}
ROUNDS = {"reduced": 5, "full": 9}
SEARCH = {"reduced": (20_000, 256), "full": (100_000, 1_024)}  # rows, queries
WIDE = 131_072
GOAL = 0.5  # of the read bandwidth


def main() -> None:
    """Time scores and searches, write results/similarity_exact.json."""
    parser = argparse.ArgumentParser(description="Speed of exact similarity.")
    parser.add_argument("--size", choices=HELD, default="reduced")
    size = parser.parse_args().size
    started = time.time()
    base = real_rows()
    rows = score_rows(base, HELD[size], ROUNDS[size]) + search_rows(base, *SEARCH[size])
    write_result("similarity_exact", rows, goals, started)


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """One prototype over a million rows, at every number of threads."""
    found = []
    for row in rows:
        if row["what"] == "score jaccard" and row["p"] == 1:
            share = row["share_of_read"]
            name = f"exact score, share of read bandwidth, {row['threads']} threads"
            note = (
                f"{row['gb_s']:.1f} of {row['read_gb_s']:.1f} GB/s; "
                f"{row['share_of_read_cpu']:.2f} by processor time"
            )
            found.append(Goal(name, share, f">= {GOAL}", share >= GOAL, note))
    return found


# ---- data ----


def real_rows() -> sparse.csr_array:
    """The codes of the benchmark's pool with int32 indices."""
    data = load("reduced")
    acts = data.representation("gba")[data.pool]
    return sparse.csr_array(
        (acts.data, acts.indices.astype(np.int32), acts.indptr.astype(np.int64)), shape_of(acts)
    )


def resampled(base: sparse.csr_array, n: int, seed: int = 0) -> sparse.csr_array:
    """n rows drawn with replacement: int32 indices and, as from int64, row pointers of 8 bytes."""
    drawn = np.random.default_rng(seed).integers(shape_of(base)[0], size=n)
    lengths = np.diff(base.indptr)[drawn]
    acts = sparse.csr_array((n, shape_of(base)[1]), dtype=np.float32)
    acts.indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    acts.indices = np.empty(acts.indptr[-1], dtype=np.int32)
    acts.data = np.empty(acts.indptr[-1], dtype=np.float32)
    for to, source in enumerate(drawn):
        here = slice(base.indptr[source], base.indptr[source + 1])
        there = slice(acts.indptr[to], acts.indptr[to + 1])
        acts.indices[there], acts.data[there] = base.indices[here], base.data[here]
    return acts


def spread(base: sparse.csr_array, d_sae: int, seed: int = 0) -> sparse.csr_array:
    """The same rows with the latents at random, ascending or not, places of a wider code."""
    places = np.random.default_rng(seed).choice(d_sae, shape_of(base)[1], replace=False)
    wide = sparse.csr_array(
        (base.data, places[base.indices], base.indptr), (len(base.indptr) - 1, d_sae)
    )
    wide.sort_indices()
    wide.indices = wide.indices.astype(np.int32)
    wide.indptr = wide.indptr.astype(np.int64)
    return wide


def prototypes(base: sparse.csr_array, p: int, seed: int = 0) -> np.ndarray:
    """Means of 48 rows each, dense [p, d_sae]."""
    generator = np.random.default_rng(seed)
    n = shape_of(base)[0]
    return np.stack([base[generator.choice(n, 48)].mean(axis=0) for _ in range(p)])


# ---- timing ----


@contextmanager
def threads(n: int) -> Iterator[None]:
    """So many threads for torch and for the compiled loops."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Taken(NamedTuple):
    """Seconds of one call."""

    wall: float
    """On the clock."""
    cpu: float
    """Of the processor, over all threads."""


def timed(work: Callable[[], object]) -> Taken:
    """Call once."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def bare_read(acts: sparse.csr_array) -> Callable[[], None]:
    """Add up both arrays in ranges of a megabyte, by a compiled loop."""
    from sae_apps.selection.jit import REORDER, jit

    @jit(fastmath=REORDER)
    def loop(indices, data):  # noqa: ANN001, ANN202
        total, count = np.float32(0), np.int32(0)
        for j in range(len(data)):
            total += data[j]
            count += indices[j]
        return total, count

    edges = range(0, len(acts.data), 1 << 20)
    parts = [(acts.indices[e : e + (1 << 20)], acts.data[e : e + (1 << 20)]) for e in edges]

    def read() -> None:
        for _ in kernels.in_threads(lambda part: loop(*part), parts):
            pass

    read()
    return read


def torch_read(acts: sparse.csr_array) -> Callable[[], None]:
    """Add up both arrays by torch, both as float32."""
    arrays = [torch.from_numpy(a.view(np.float32)) for a in (acts.indices, acts.data)]

    def read() -> None:
        for array in arrays:
            array.sum()

    return read


def score_rows(base: sparse.csr_array, held: int, rounds: int) -> list[dict[str, Any]]:
    """`score` beside reads of the same arrays, alternating."""
    rows = []
    for name, source in (("", base), (" spread", spread(base, WIDE))):
        acts = resampled(source, held)
        vectors = prototypes(source, 32)
        cases = [("jaccard", p) for p in (1, 8, 32)] + [("cosine", 1)]
        for n in sorted({1, torch.get_num_threads()}):
            with threads(n):
                for metric, p in cases if not name else cases[:3]:
                    rows.append(_score_row(acts, vectors[:p], metric, n, name, rounds))
        if not name:
            rows.append(_scipy_row(acts, vectors[0], rounds))
    return rows


def _score_row(
    acts: sparse.csr_array, vectors: np.ndarray, metric: str, n: int, name: str, rounds: int
) -> dict[str, Any]:
    reads = (bare_read(acts), torch_read(acts))
    score(acts[:1000], vectors, metric)  # compiles
    ours, bare = [], []
    for _ in range(rounds):
        bare.append(min((timed(read) for read in reads), key=lambda taken: taken.cpu))
        ours.append(timed(lambda: score(acts, vectors, metric)))
    return _row(f"score {metric}{name}", acts, len(vectors), n, ours, bare)


def _scipy_row(acts: sparse.csr_array, vector: np.ndarray, rounds: int) -> dict[str, Any]:
    """The product of scipy, which has one thread and no minimum: what a user would compare with."""
    read, vector = bare_read(acts), vector.astype(np.float32)
    ours, bare = [], []
    with threads(1):
        for _ in range(rounds):
            bare.append(timed(read))
            ours.append(timed(lambda: acts @ vector))
    return _row("scipy acts @ b", acts, 1, 1, ours, bare)


def _row(
    what: str, acts: sparse.csr_array, p: int, n: int, ours: list[Taken], bare: list[Taken]
) -> dict[str, Any]:
    (n_rows, d_sae), nonzeros = shape_of(acts), len(acts.data)
    needed = 8 * nonzeros + 8 * (n_rows + 1) + 4 * n_rows * p
    rate = needed / (8 * nonzeros)
    both = list(zip(ours, bare, strict=True))
    wall, cpu = (median(taken[i] for taken in ours) for i in (0, 1))
    return {
        "what": what, "d_sae": d_sae, "p": p, "threads": n, "nonzeros_a_row": nonzeros / n_rows,
        "seconds_1m_rows": wall * ROWS / n_rows, "ns_per_nonzero": wall / nonzeros * 1e9,
        "cpu_ns_per_nonzero": cpu / nonzeros * 1e9, "gb_s": needed / wall / 1e9,
        "read_gb_s": 8 * nonzeros / median(taken.wall for taken in bare) / 1e9,
        "share_of_read": median(rate * b.wall / o.wall for o, b in both),
        "share_of_read_cpu": median(rate * b.cpu / o.cpu for o, b in both),
        "cpu_ns_per_pair_nonzero": None, "cpu_hours_10k_on_1m": None,
    }  # fmt: skip


def search_rows(base: sparse.csr_array, n_rows: int, n_queries: int) -> list[dict[str, Any]]:
    """`nearest`, k = 10: nanoseconds per pair of a row's nonzero and a query."""
    rows = []
    for name, source in (("", base), (" spread", spread(base, WIDE))):
        acts, queries = resampled(source, n_rows), resampled(source, n_queries, seed=1)
        for n in sorted({1, torch.get_num_threads()}):
            with threads(n):
                nearest(acts[:500], queries, 10)  # compiles
                taken = timed(lambda: nearest(acts, queries, 10))  # noqa: B023 - used at once
            row = _row(f"nearest jaccard{name}", acts, n_queries, n, [taken], [taken])
            pairs = taken.cpu / len(acts.data) / n_queries
            row |= dict.fromkeys(("gb_s", "read_gb_s", "share_of_read", "share_of_read_cpu"))
            row["cpu_ns_per_pair_nonzero"] = pairs * 1e9
            row["cpu_hours_10k_on_1m"] = pairs * row["nonzeros_a_row"] * ROWS * 10_000 / 3600
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
