"""Search: which codes bring sparse rows to FAISS best, and k-nearest search at scale.

    python -m benchmarks.similarity [--size full] [--part codes|scale] [--rows N] [--targets M]

Rows are real (SmolLM2, mean-pooled GBA codes of benchmarks.selection_data, d_sae 4,608), resampled:
a new row is  m * thin(a, m) + (1 - m) * thin(b, 1 - m)  of two random rows a and b of the pool,
m uniform in [.5, 1], where thin keeps each of a latent's tokens (value / median value, rounded)
with that chance. So two new rows never share more than tokens of a parent, and the tenth neighbour
is about as near as in the real pool (row "hardness"). Targets are made the same way from the rows
that are held out of the pool.

1. codes: every kind of code over the same rows: recall of the exact ten nearest among the best C
   candidates, bytes of the FAISS index a row, encoding speed, time of a search without re-ranking.
2. scale: an index on disk over N rows (full: 1,000,000; memory holds one shard and the codes),
   M targets, k = 10, re-ranked exactly; the exact search is timed on the first targets only and
   recall is measured on those.

Beside the clock stands processor time (of all threads, over their number): on a machine that others
load the clock measures the others as well.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from benchmarks.common import Goal, write_result
from benchmarks.similarity_rows import DEPTHS, Clock, Source, clock, flat_row, narrow
from sae_apps.selection.codes import Codes, IndexConfig
from sae_apps.selection.index import SparseIndex
from sae_apps.selection.rerank import recall_of
from sae_apps.selection.similarity import nearest
from sae_apps.tasks.evaluation import peak_memory
from sae_core.features import shape_of

K = 10
GOAL_ROWS = 1_000_000
CODES = {"reduced": (20_000, 128), "full": (50_000, 256)}  # rows, targets
SCALE = {"reduced": (200_000, 1_000, 128), "full": (GOAL_ROWS, 10_000, 1024)}  # ..., timed exactly
FIT_ROWS = 4096  # of the part scale: more than the default, as a pool of that size deserves
# method, dims or bits, factory, further settings
SEARCHES: tuple[tuple[str, int, str, dict[str, Any]], ...] = (
    ("minhash", 2048, "BFlat", {}),
    ("minhash", 4096, "BFlat", {}),
    ("minhash", 4096, "BIVF128", {}),
    ("random", 256, "SQfp16", {}),
    ("svd", 256, "SQfp16", {"power": 1.0}),
    ("svd", 256, "SQfp16", {"power": 0.5}),
    ("svd", 256, "SQfp16", {}),
    ("svd", 128, "Flat", {}),
    ("svd", 512, "SQ8", {}),
    ("kernel", 256, "SQfp16", {}),
    ("kernel", 128, "Flat", {}),
    ("kernel", 512, "SQ8", {}),
    ("kernel", 256, "PQ128x4fs", {}),
    ("kernel", 256, "PQ128x4fs,Refine(SQ8)", {}),
    ("kernel", 448, "PQ112x4fs,Refine(SQ8)", {}),
    ("kernel", 256, "IVF128,SQ8", {}),
)
FULL_ONLY: tuple[tuple[str, int, str, dict[str, Any]], ...] = (
    ("minhash", 4096, "BHNSW32", {}),
    ("kernel", 256, "HNSW32,SQ8", {}),
    ("kernel", 448, "PQ112x4fs,Refine(SQ8)", {"fit_rows": 8192}),
)


def main() -> None:
    """Run one part or both, write results/similarity.json."""
    parser = argparse.ArgumentParser(description="Search of sparse rows through FAISS.")
    parser.add_argument("--size", choices=CODES, default="reduced")
    parser.add_argument("--part", choices=("codes", "scale"), help="one part, into the last result")
    parser.add_argument("--rows", type=int, help="of the part scale")
    parser.add_argument("--targets", type=int, help="of the part scale")
    parser.add_argument("--candidates", type=int, help="of the part scale; default: the index's")
    parser.add_argument("--folder", help="where the index of the part scale is made and removed")
    args = parser.parse_args()
    started = time.time()
    source = Source()
    rows = []
    if args.part != "scale":
        rows += code_rows(source, args.size)
    if args.part != "codes":
        n, m, timed = SCALE[args.size]
        scale = Scale(args.rows or n, args.targets or m, timed, args.candidates)
        rows += scale_rows(source, scale, args.folder)
    write_result("similarity", rows, goals, started, merge=args.part is not None)


# ---- 1. codes ----


def code_rows(source: Source, size: str) -> list[dict[str, Any]]:
    """Every kind of code over the same rows and targets."""
    n, m = CODES[size]
    rows, targets = narrow(sparse.vstack(list(source.shards(n)), format="csr")), source.targets(m)
    warm = SparseIndex.build(rows[:600], IndexConfig(dims=32))
    warm.query(targets[:4], K)  # compiles
    truth = nearest(rows, targets, 100)
    found = [
        hardness("made rows", truth.score, rows),
        hardness("real rows", nearest(source.pool, source.held_out[:m], 100).score, source.pool),
    ]
    sample = rows[np.sort(np.random.default_rng(0).choice(n, 8192, replace=False))]
    for method, dims, factory, more in SEARCHES + (FULL_ONLY if size == "full" else ()):
        config = IndexConfig(method=method, dims=dims, factory=factory, **more)
        found.append(code_row(rows, targets, truth.index[:, :K], sample, config))
        print(found[-1], flush=True)
    return found


def hardness(name: str, scores: np.ndarray, rows: sparse.csr_array) -> dict[str, Any]:
    """How near the neighbours are: medians over the targets."""
    values = {f"j_{rank}": float(np.median(scores[:, rank - 1])) for rank in (1, 10, 100)}
    n = shape_of(rows)[0]
    return flat_row("hardness", name, rows=n, nonzeros=len(rows.data) / n, **values)


def code_row(
    rows: sparse.csr_array,
    targets: sparse.csr_array,
    truth: np.ndarray,
    sample: sparse.csr_array,
    config: IndexConfig,
) -> dict[str, Any]:
    """Build, search, and look for the true neighbours among the first candidates."""
    n, m = shape_of(rows)[0], len(truth)
    with clock() as fit:
        codes = Codes.fit(sample[: config.fit_rows], config)
    codes.encode(rows[:256])  # compiles, fills tables
    with clock() as encode:
        codes.encode(rows)
    with clock() as build:
        codes.add(rows)
    recalls = {}
    for depth in DEPTHS:
        with clock() as search:
            found, _ = codes.candidates(targets, depth, config)
        hits = [np.isin(a, b).mean() for a, b in zip(truth, found, strict=True)]
        recalls[f"recall_{depth}"] = float(np.mean(hits))
    more = "".join(
        f" {key} {getattr(config, key)}"
        for key in ("power", "fit_rows")
        if getattr(config, key) != getattr(IndexConfig(), key)
    )
    return flat_row(
        "codes", f"{config.method} {config.dims} {config.factory}{more}",
        method=config.method, dims=config.dims, factory=config.factory, rows=n, targets=m,
        bytes_a_row=codes.bytes_per_row, encode_rows_s=n / encode.wall,
        encode_rows_s_cpu=n / encode.cpu, build_rows_s_cpu=n / build.cpu, fit_s_cpu=fit.cpu,
        build_rows_s=n / build.wall,
        search_ms=search.wall / m * 1e3, search_ms_cpu=search.cpu / m * 1e3, **recalls,
    )  # fmt: skip


# ---- 2. scale ----


class Scale(NamedTuple):
    """Sizes of the part scale."""

    n_rows: int
    n_targets: int
    n_timed: int
    """Targets that the exact search is timed on."""
    n_candidates: int | None


def scale_rows(source: Source, scale: Scale, folder: str | None) -> list[dict[str, Any]]:
    """The default index over rows on disk, the targets; exact search on the first of them."""
    place = Path(tempfile.mkdtemp(dir=folder, prefix="sae-apps-index-"))
    try:
        return [_scale_row(source, scale, place / "index")]
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _scale_row(source: Source, scale: Scale, place: Path) -> dict[str, Any]:
    n, m, timed = scale.n_rows, scale.n_targets, min(scale.n_timed, scale.n_targets)
    targets = source.targets(m)
    SparseIndex.build(source.shard(0, 600), IndexConfig(dims=32)).query(targets[:4], K)  # compiles
    nearest(source.shard(0, 500), targets[:timed], K)
    index = SparseIndex.build(source.shards(n), IndexConfig(fit_rows=FIT_ROWS), folder=place)
    # A build makes, checks and writes the rows as well; this is what encoding and adding take.
    again = index.codes.emptied()
    first = index.parts[0].matrix(index.d_sae)
    n_first = shape_of(first)[0]
    with clock() as encode:
        dims = again.encode(first).shape[1]
    with clock() as add:
        again.add(first)
    bars, exact = exact_bars(index, targets[:timed])
    with clock() as search:
        found = index.query(targets, K, n_candidates=scale.n_candidates)
    recall = recall_of(found.scores[:timed], bars)
    return flat_row(
        "scale", f"scale {n} rows", method=index.config.method, dims=dims, factory="default",
        rows=n, targets=m, bytes_a_row=index.codes.bytes_per_row,
        encode_rows_s=n_first / encode.wall, encode_rows_s_cpu=n_first / encode.cpu,
        build_rows_s=n_first / add.wall, build_rows_s_cpu=n_first / add.cpu,
        search_ms=search.wall / m * 1e3, search_ms_cpu=search.cpu / m * 1e3,
        n_candidates=found.n_candidates, recall=recall.value, recall_low=recall.low,
        exact_ms=exact.wall / timed * 1e3, exact_ms_cpu=exact.cpu / timed * 1e3,
        speedup=exact.wall / timed * m / search.wall,
        speedup_cpu=exact.cpu / timed * m / search.cpu,
        j_10=float(np.median(bars)), nonzeros=sum(len(p.data) for p in index.parts) / n,
        peak_gib=peak_memory() / 2**30,
    )  # fmt: skip


def exact_bars(index: SparseIndex, targets: sparse.csr_array) -> tuple[np.ndarray, Clock]:
    """The K-th best score of each target over all rows, by `nearest`, and its time."""
    best = np.full((shape_of(targets)[0], K), -1, dtype=np.float32)
    with clock() as taken:
        for part in index.parts:
            scores = nearest(part.matrix(index.d_sae), targets, K).score
            part.forget()
            best = np.sort(np.concatenate([best, scores], axis=1), axis=1)[:, -K:]
    return best[:, 0], taken


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """What the scale run and the table of codes promise."""
    found = []
    for row in (r for r in rows if r["what"] == "scale"):
        name = row["name"]
        checks: tuple[tuple[str, float, str, Callable[[float], bool], str], ...] = (
            ("speed-up over exact", row["speedup"], ">= 20", lambda v: v >= 20,
             f"{row['speedup_cpu']:.1f} by processor time; the goal is for {GOAL_ROWS:,} rows; "
             "exact timed on part of the targets"),
            ("recall after re-ranking", row["recall"], ">= 0.99", lambda v: v >= 0.99,
             f"95% interval from {row['recall_low']:.4f}"),
            ("bytes a row", row["bytes_a_row"], "<= 512", lambda v: v <= 512, ""),
            ("rows a second into the index", row["build_rows_s"], ">= 20000",
             lambda v: v >= 20_000,
             f"{row['build_rows_s_cpu']:.0f} by processor time; {row['threads']} threads, "
             f"{row['nonzeros']:.0f} nonzeros a row; without making and writing the rows"),
        )  # fmt: skip
        for what, value, goal, met, note in checks:
            found.append(Goal(f"{name}: {what}", value, goal, met(value), note))
    return found


if __name__ == "__main__":
    main()
