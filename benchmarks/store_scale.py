"""The store of features at 10 million rows: time, disk and memory of writing and asking.

    python -m benchmarks.store_scale [--rows 10000000] [--shard-rows 65536] [--folder SCRATCH]

Rows are tokens: activations of SmolLM2 at layer 15 on held-out text (65,536 of those of
benchmarks.sae_quality), encoded by the GBA SAE of benchmarks.selection_data, some 60 of 4,608
latents each; a new row is one of them at random, times a factor in [.5, 1]. (Mean-pooled rows have
some 1,500 latents: ten million of them are 123 GB, more than there is room for here.) They are
written shard by shard as ``write_pool`` would, opened again, and asked. Every step runs in a
process of its own, whose peak of resident memory is read at its end; each reads and checks what it
needs.

    build        SparseFeatures made and saved, without the time to make up the rows
    open         ``open_pool``
    row table    row ids of all rows, each one once
    top rows     the 100 rows in which each of three latents is most active: one pass
    top latents  those of the last row
    frequencies  in how many rows each latent is active: one pass
    select       the 1,000 rows most like 64 targets, by the exact generalised Jaccard: one pass and
                 the ranking, with reasons
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy import sparse

from benchmarks.common import Goal, write_result
from benchmarks.longrun_memory import peak_mib
from sae_apps.selection.browse import top_latents, top_rows
from sae_apps.selection.config import SelectConfig
from sae_apps.selection.pool import FINISHED, FORMAT, MANIFEST, VERSION, PoolFeatures, open_pool
from sae_apps.selection.ranking import idf_weights
from sae_apps.selection.select import select
from sae_core.disk import atomic_write_text
from sae_core.features import SparseFeatures, shape_of
from sae_core.provenance import Provenance
from sae_core.sealed import sealed
from sae_core.store import load_features, save_features

ROWS, SHARD_ROWS = 10_000_000, 65_536
N_BASE, N_TARGETS = 65_536, 64
N_TOP, N_PICKS = 100, 1000
GROWTH, MOST_MIB = 0.02, 2048.0
EXACT = SelectConfig(metric="jaccard", prototypes="one", strategy="topk")
Step = Callable[[Path, int, int], dict[str, Any]]


def main() -> None:
    """Run every step, write results/store_scale.json, remove the store."""
    parser = argparse.ArgumentParser(description="The store of features at scale.")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--shard-rows", type=int, default=SHARD_ROWS)
    parser.add_argument("--folder", help="where the store is made and removed")
    parser.add_argument("--dry", action="store_true", help="print, write no result")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(measured(args.step, Path(args.folder), args.rows, args.shard_rows)))
        return
    started = time.time()
    place = Path(tempfile.mkdtemp(dir=args.folder, prefix="store-scale-"))
    try:
        write_base(place, *real_rows())
        rows = [in_process(step, place, args.rows, args.shard_rows) for step in STEPS]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if args.dry:
        print(*rows, *goals(rows), sep="\n")
    else:
        write_result("store_scale", rows, goals, started)


# ---- rows ----


def real_rows() -> tuple[sparse.csr_array, str]:
    """Codes of held-out tokens, and the hash of the SAE."""
    from benchmarks.sae_quality import prepare
    from benchmarks.selection_data import saes

    sae, stored = saes()["gba"].eval(), prepare("full").held_out
    codes = []
    with torch.no_grad():
        for batch in stored.iter_sequential(4096):
            codes.append(sparse.csr_array(sae.encode(batch.x.float()).numpy()))
            if sum(shape_of(part)[0] for part in codes) >= N_BASE + N_TARGETS:
                break
    return sparse.csr_array(sparse.vstack(codes, format="csr")), sae.hash()


def write_base(place: Path, acts: sparse.csr_array, sae_hash: str) -> None:
    """The real rows, the last ones as targets, where every process finds them."""
    n = shape_of(acts)[0] - N_TARGETS
    save_features(place / "base", features(acts[:n], 0, sae_hash))
    save_features(place / "targets", features(acts[n:], 0, sae_hash))


def features(acts: Any, first: int, sae_hash: str) -> SparseFeatures:
    """Token-level features with running row ids from ``first`` on."""
    acts = sparse.csr_array(acts, dtype=np.float32)
    acts.sort_indices()
    row_id = np.arange(first, first + shape_of(acts)[0], dtype=np.int64)
    table = pa.table({"row_id": row_id, "source_row_id": row_id // 64, "position": row_id % 64})
    origin = Provenance(
        model_id="smollm2-135m", model_revision="none", hook_point="layers.15.out",
        sae_hash=sae_hash, data_id="demo, held out, resampled", seed="0", versions="none",
    )  # fmt: skip
    return SparseFeatures(acts, table, origin)


def resampled(base: sparse.csr_array, number: int, n: int) -> sparse.csr_array:
    """The rows of one shard, always the same: rows of ``base``, each times a factor."""
    rng = np.random.default_rng(number)
    acts = sparse.csr_array(base[rng.integers(shape_of(base)[0], size=n)])
    factor = rng.uniform(0.5, 1, n).astype(np.float32)
    acts.data = acts.data * np.repeat(factor, np.diff(acts.indptr))
    return acts


# ---- steps ----


def build(place: Path, rows: int, shard_rows: int) -> dict[str, Any]:
    """Write the shards and what makes them a pool."""
    base, pool = load_features(place / "base"), place / "pool"
    manifest = {"format": FORMAT, "version": VERSION, "source": "resampled tokens"}
    manifest |= {"shard_rows": shard_rows, "identity": {}}
    atomic_write_text_in(pool, MANIFEST, manifest)
    seconds, nonzeros, half, n_shards = 0.0, 0, 0.0, -(-rows // shard_rows)
    for number in range(n_shards):
        first = number * shard_rows
        acts = resampled(base.acts, number, min(shard_rows, rows - first))
        begun = time.perf_counter()
        save_features(
            pool / f"shard-{number:05d}", features(acts, first, base.provenance.sae_hash)
        )
        seconds, nonzeros = seconds + time.perf_counter() - begun, nonzeros + len(acts.data)
        if number <= n_shards // 2:
            half = peak_mib()
    atomic_write_text_in(pool, FINISHED, {"n_rows": rows, "n_shards": n_shards})
    size = sum(file.stat().st_size for file in pool.rglob("*") if file.is_file())
    return {
        "seconds": seconds, "rows_per_s": rows / seconds, "bytes_a_row": size / rows,
        "GiB": size / 2**30, "nonzeros_a_row": nonzeros / rows, "half_peak_MiB": half,
    }  # fmt: skip


def atomic_write_text_in(folder: Path, name: str, content: dict[str, Any]) -> None:
    """One of the sealed files of a pool."""
    folder.mkdir(exist_ok=True)
    atomic_write_text(folder / name, json.dumps(sealed(content)) + "\n")


def _asked(ask: Callable[[PoolFeatures, Path, int], str]) -> Step:
    """A question to the opened pool, timed; what it answers in a few words."""

    def step(place: Path, rows: int, _: int) -> dict[str, Any]:
        pool = open_pool(place / "pool")
        begun = time.perf_counter()
        answer = ask(pool, place, rows)
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "rows_per_s": rows / seconds, "answer": answer}

    return step


def _opened(place: Path, rows: int, _: int) -> dict[str, Any]:
    begun = time.perf_counter()
    pool = open_pool(place / "pool")
    return {"seconds": time.perf_counter() - begun, "answer": f"{len(pool.shards)} shards"}


def _row_table(pool: PoolFeatures, _place: Path, _rows: int) -> str:
    return f"{pool.rows().num_rows} rows"


def _top_rows(pool: PoolFeatures, place: Path, _rows: int) -> str:
    freq = load_features(place / "base").freq
    order = np.argsort(freq)
    chosen = [int(order[int(share * (len(order) - 1))]) for share in (1.0, 0.9, 0.5)]
    found = top_rows(pool, chosen, N_TOP)
    return ", ".join(
        f"latent {latent}: {len(ids)} rows" for latent, (ids, _) in zip(chosen, found, strict=True)
    )


def _top_latents(pool: PoolFeatures, _place: Path, rows: int) -> str:
    latents, _ = top_latents(pool, rows - 1, N_TOP)
    return f"{len(latents)} latents of row {rows - 1}"


def _frequencies(pool: PoolFeatures, _place: Path, _rows: int) -> str:
    return f"{len(idf_weights(pool))} latents"


def _select(pool: PoolFeatures, place: Path, rows: int) -> str:
    targets = load_features(place / "targets")
    found = select(pool, targets, None, f"{min(N_PICKS, rows)} rows", config=EXACT)
    scores = found.picks["score"].to_numpy()
    return f"{len(scores)} picks, scores {scores[0]:.4f} to {scores[-1]:.4f}"


STEPS: dict[str, Step] = {
    "build": build,
    "open": _opened,
    "row table": _asked(_row_table),
    "top rows": _asked(_top_rows),
    "top latents": _asked(_top_latents),
    "frequencies": _asked(_frequencies),
    "select": _asked(_select),
}


# ---- measuring ----


def measured(step: str, place: Path, rows: int, shard_rows: int) -> dict[str, Any]:
    """One flat record; what a step does not have is null."""
    names = ("rows_per_s", "bytes_a_row", "GiB", "nonzeros_a_row", "half_peak_MiB", "answer")
    before = peak_mib()
    found = STEPS[step](place, rows, shard_rows)
    row = {"name": step, "rows": rows, "shard_rows": shard_rows, "seconds": None}
    row |= {"peak_MiB": peak_mib(), "imports_MiB": before, "threads": torch.get_num_threads()}
    row |= dict.fromkeys(names) | found
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def in_process(step: str, place: Path, rows: int, shard_rows: int) -> dict[str, Any]:
    """``measured`` in a new process."""
    argv = [sys.executable, "-m", "benchmarks.store_scale", "--step", step, "--folder", str(place)]
    argv += ["--rows", str(rows), "--shard-rows", str(shard_rows)]
    run = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(run.stdout.splitlines()[-1])
    print(row, flush=True)
    return row


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Memory: the second half of the rows adds nothing to building; nothing needs above 2 GiB."""
    found = []
    for row in rows:
        name, peak = row["name"], row["peak_MiB"]
        if row["half_peak_MiB"]:
            grown = peak / row["half_peak_MiB"] - 1
            note = f"{row['half_peak_MiB']:.0f} MiB after half of the rows, {peak:.0f} at the end"
            met = grown <= GROWTH
            what = f"growth of the peak in the second half, {name}"
            found.append(Goal(what, grown, f"<= {GROWTH}", met, note))
        found.append(Goal(f"peak MiB, {name}", peak, f"<= {MOST_MIB}", peak <= MOST_MIB,
                          f"{row['rows']} rows"))  # fmt: skip
    return found


if __name__ == "__main__":
    main()
