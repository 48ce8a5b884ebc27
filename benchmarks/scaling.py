"""Training in one and two processes here, and in up to eight GPUs on paper.

    python -m benchmarks.scaling [--latents 4608 18432] [--rounds 3]
    python -m benchmarks.scaling --paper

Measured: kind gba (int8), batches of 2,048 and 8,192 tokens of width 576 (sums of 32 of 2,048
directions, 16 batches of 2,048, shuffled), processes that torchrun starts, one thread
each; steps of a whole training with everything in it, timed by the first process between records
after WARM steps, in turns over rounds; peak memory of the largest process. `tokens` splits each
batch, `latents` the SAE. Beside them one process with two threads. FVU of the last record shows
that all of them train the same.

On paper, bfloat16 GBA at d_in 2,048, 65,536 latents, L0 64, 65,536 tokens a step in all:

    arithmetic = 2 n d m / (parts of both) / RATE
    memory     = (gathers + Adam and gradients + tokens) / BANDWIDTH
    exchange   = 2 (P - 1) / P bytes / LINK     a ring's sum over P processes; gradients of both
                 matrices in float32 where tokens are split, n / parts x d of the reconstruction in
                 float32 where latents are
    step       = arithmetic + memory + exchange, nothing overlapped

RATE, BANDWIDTH and LINK are assumptions, named in every row; none was measured for this table.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, Goal, write_result
from sae_apps.tasks.evaluation import peak_memory

N_DIRECTIONS, D_IN, ACTIVE, N_BATCHES, BATCH = 2048, 576, 32, 16, 2048
WARM, TIMED, EVERY = 10, 20, 10  # steps before the clock, on it, and of a record
SHAPES = {  # name: processes, latent parts, threads
    "1 process": (1, 1, 1),
    "1 process, 2 threads": (1, 1, 2),
    "2 processes, tokens": (2, 1, 1),
    "2 processes, latents": (2, 2, 1),
}
BATCHES = (2048, 8192)
EMPTY: dict[str, Any] = dict.fromkeys(
    ("low", "high", "tokens_s", "speedup", "MiB", "fvu", "exchange_MiB", "parts_ms")
)


# ---- the process that trains ----


def planted() -> Tensor:
    """Tokens [N_BATCHES * BATCH, D_IN]: sums of directions with random weights, and noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(N_DIRECTIONS, D_IN, generator=generator)
    made = []
    for _ in range(N_BATCHES):
        chosen = torch.randint(N_DIRECTIONS, (BATCH, ACTIVE), generator=generator)
        weight = torch.rand(BATCH, ACTIVE, generator=generator)
        made.append(torch.einsum("nk,nkd->nd", weight, directions[chosen]))
    x = torch.cat(made)
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def work(d_sae: int, batch: int, latent_parts: int) -> None:
    """Train as one of the processes; the first prints milliseconds, FVU and peak memory."""
    from sae_apps.tasks.processes import joined, leave
    from sae_core.buffer import batches
    from sae_core.parallel import world_layout
    from sae_core.sae import SAE, SAEConfig
    from sae_core.sharded import shard_of
    from sae_core.state import TrainConfig, TrainState
    from sae_core.train import train

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    steps = WARM + TIMED
    config = TrainConfig(steps=10 * steps, batch_size=batch, precision="int8", log_every=EVERY)
    with joined("cpu"):
        layout = world_layout(latent_parts)
        whole = SAE(SAEConfig(D_IN, d_sae, k=32), generator=torch.Generator().manual_seed(0))
        sae, state = shard_of(whole, TrainState(), config, layout)
        del whole
        part = (layout.part("tokens"), layout.parts("tokens"))
        stream = batches(planted(), batch, seed=0, part=part)
        marks, fvu = [], 0.0
        for record in train(sae, stream, config, state):
            marks.append(time.perf_counter())
            fvu = record.fvu
            if record.step == steps:
                break
        peak = layout.largest(torch.tensor(peak_memory()), "tokens", "latents")
        if layout.is_first:
            of = marks[WARM // EVERY - 1 :]
            ms = [1e3 * (b - a) / EVERY for a, b in zip(of, of[1:], strict=False)]
            print(json.dumps({"ms": ms, "fvu": fvu, "MiB": int(peak) >> 20}))
    leave(0)


# ---- the suite ----


def run(name: str, d_sae: int, batch: int) -> dict[str, Any]:
    """One training in its processes."""
    processes, latent_parts, threads = SHAPES[name]
    worker = ["-m", "benchmarks.scaling", "--work", str(d_sae), str(batch), str(latent_parts)]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    told = subprocess.run(
        [sys.executable, *start, *worker], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if told.returncode:
        raise RuntimeError(told.stderr)
    return json.loads(told.stdout.splitlines()[-1])


def exchange_bytes(d_in: int, d_sae: int, batch: int, tokens: int, latents: int) -> float:
    """Bytes that a process sends in one step: gradients, and reconstructions."""
    gradients = 4 * 2 * d_in * d_sae / latents * 2 * (tokens - 1) / tokens
    return gradients + 4 * batch / tokens * d_in * 2 * (latents - 1) / latents


def measured(widths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Rows of all shapes, in turns."""
    rows = []
    for d_sae in widths:
        for batch in BATCHES:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in SHAPES}
            for _ in range(rounds):
                for name in SHAPES:
                    found[name].append(run(name, d_sae, batch))
            alone = median(ms for one in found["1 process"] for ms in one["ms"])
            rows += [one_row(name, d_sae, batch, told, alone) for name, told in found.items()]
    return rows


def one_row(
    name: str, d_sae: int, batch: int, told: list[dict[str, Any]], alone: float
) -> dict[str, Any]:
    """Median and range over all timed records of all rounds."""
    times = [ms for one in told for ms in one["ms"]]
    processes, latents, _ = SHAPES[name]
    sent = exchange_bytes(D_IN, d_sae, batch, processes // latents, latents)
    return EMPTY | {
        "name": f"{name}, {d_sae}, {batch}", "what": name, "d_sae": d_sae, "batch": batch,
        "ms": median(times), "low": min(times), "high": max(times),
        "tokens_s": batch / median(times) * 1e3, "speedup": alone / median(times),
        "MiB": max(one["MiB"] for one in told), "fvu": told[0]["fvu"], "exchange_MiB": sent / 2**20,
    }  # fmt: skip


# ---- on paper ----


@dataclass(frozen=True)
class Card:
    """What a GPU is assumed to do."""

    rate: float = 600e12
    """Operations/s of a large bfloat16 product (H200: 989e12 on its data sheet)."""
    bandwidth: float = 4.0e12
    """Bytes/s of memory (data sheet: 4.8e12)."""
    link: float = 350e9
    """Bytes/s that a process sends to its neighbours over NVLink (data sheet: 450e9)."""


def paper_row(tokens: int, latents: int, card: Card) -> dict[str, Any]:
    """One step of eight GPUs or fewer; nothing overlaps."""
    d, m, l0, n = 2048, 65536, 64, 65536
    own_n, own_m = n / tokens, m / latents
    gathered = own_n * l0 / latents * d * (4 + 2 + 2 + 2 + 2)  # values, decoder, loss, 2 gradients
    matrices = 2 * own_m * d * 4 * (1 + 7) + own_m * d * 4  # written gradient, Adam, copy to bf16
    passes = 6 * own_n * d * 4
    parts = {
        "arithmetic": 2 * own_n * d * own_m / card.rate,
        "memory": (gathered + matrices + passes) / card.bandwidth,
        "exchange": exchange_bytes(d, m, n, tokens, latents) / card.link,
    }
    step = sum(parts.values())
    held = (4 * 4 * 2 * own_m * d + 2 * own_m * d + 4 * own_n * d * 4) / 2**20
    name = f"on paper: {tokens * latents} GPUs, tokens / {tokens}, latents / {latents}"
    told = ", ".join(f"{key} {1e3 * value:.1f}" for key, value in parts.items())
    return EMPTY | {
        "name": name, "what": name, "d_sae": m, "batch": n, "ms": 1e3 * step,
        "tokens_s": n / step, "MiB": held, "parts_ms": told,
        "exchange_MiB": exchange_bytes(d, m, n, tokens, latents) / 2**20,
    }  # fmt: skip


def paper(card: Card) -> list[dict[str, Any]]:
    """One, two, four and eight GPUs, every split of eight."""
    splits = [(1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (2, 4), (1, 8)]
    rows = [paper_row(*split, card) for split in splits]
    for row in rows:
        row["speedup"] = rows[0]["ms"] / row["ms"]
    return rows


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Two processes are quicker than one by half at least, and train the same."""
    found = []
    of = {row["name"]: row for row in rows if not row["name"].startswith("on paper")}
    for d_sae, batch in sorted({(row["d_sae"], row["batch"]) for row in of.values()}):
        alone = of[f"1 process, {d_sae}, {batch}"]
        for name in ("2 processes, tokens", "2 processes, latents"):
            row = of[f"{name}, {d_sae}, {batch}"]
            label = f"{name}: times one process, {d_sae} latents, batch {batch}"
            found.append(Goal(label, row["speedup"], ">= 1.5", row["speedup"] >= 1.5))
            gap = abs(row["fvu"] / alone["fvu"] - 1)
            label = f"{name}: FVU beside one process, {d_sae} latents, batch {batch}"
            found.append(Goal(label, gap, "<= 0.01", gap <= 0.01))
    return found


def main() -> None:
    """Measure, compute, write results/scaling.json."""
    parser = argparse.ArgumentParser(description="Training in several processes.")
    parser.add_argument("--latents", type=int, nargs="+", default=[4608, 18432])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paper", action="store_true", help="only the rows on paper, printed")
    parser.add_argument("--work", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return
    card = Card()
    if args.paper:
        print(*([asdict(card), *paper(card)]), sep="\n")
        return
    started = time.time()
    rows = measured(args.latents, args.rounds)
    write_result("scaling", [*rows, *paper(card)], goals, started)


if __name__ == "__main__":
    main()
