"""Parts of a training step on the processor, beside what they replaced.

    python -m benchmarks.cpu_kernels [--latents 4608 18432] [--rounds 9] [--dry]

One width alone goes into the last result.

One thread, batches of 2,048 random unit tokens of width 576, latents that fire with skewed
frequencies, 24 a token; processor milliseconds, median and range over rounds in turns. `times` is
the ratio of the medians to the bfloat16 product alone. `passed over` is the share of the entries
above 0 in float64 that a search does not find.

    active set     entries above 0 with exact values: a dense matrix, compared and searched by
                   torch; sae_core.kernels.active; sae_core.kernels.screen (int8)
    A W, A' G      rows of W summed by codes, and of G by latent: MKL's sparse product (A' sorted
                   for all), torch's embedding_bag, and the compiled loops (kernels/cpu.py)
    update         Adam's step on a matrix and unit norm of its rows: torch's kernels, ours
    k largest      32 of each token's pre-activations in bfloat16: torch.topk, ours
    step           GBA and TopK on sums of 32 of 2,048 directions, everything included, GBA once
                   its L0 (a column) is near the 32 asked for, or after 600 steps; "torch": rounds
                   of the same training without the loops
    optimiser      MiB that the first optimiser of a process adds: torch.optim.Adam and ours
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.common import ROOT, Goal, write_result
from benchmarks.peers_drivers import settled
from sae_core import nonlinearity
from sae_core.kernels import active, choice, screen, sparse
from sae_core.kernels.adam import Adam
from sae_core.kernels.codes import Codes, by_latent, codes_where
from sae_core.sae import SAE, Kind, SAEConfig
from sae_core.state import Precision, TrainConfig
from sae_core.train import StepRecord, train

WIDTHS = [4608, 18432]
N, D_IN, L0, K = 2048, 576, 24, 32
STEPS = 5  # of a round
N_BATCHES = 32  # that a training goes through again and again
EMPTY: dict[str, Any] = {"l0": None, "passed over": None, "MiB": None}
KINDS: tuple[Kind, ...] = ("gba", "topk")
Found = TypeVar("Found")
REPLACED = (
    ("active set", "dense"), ("A W", "MKL"), ("A W", "torch"), ("A' G", "MKL"), ("A' G", "torch"),
    ("k largest", "torch"), ("update", "torch"), ("step of GBA", "torch"),
    ("step of TopK", "torch"),
)  # fmt: skip
OPTIMISERS = {
    "torch.optim.Adam": "torch.optim.Adam([p], fused=True)",
    "sae_core.kernels.adam": "sae_core.kernels.adam.Adam([{'params': [p]}])",
}
MEMORY = """
import torch, sae_core.train, sae_core.kernels.adam
from benchmarks.longrun_memory import peak_mib
p = torch.nn.Parameter(torch.zeros(3))
before = peak_mib()
{made}
print(peak_mib() - before)
"""


def in_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor milliseconds of each, one after the other in every round; the first is left out."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            begin = time.process_time()
            work()
            times[name].append(1e3 * (time.process_time() - begin))
    return {name: found[1:] for name, found in times.items()}


def batch(d_sae: int) -> tuple[Tensor, Tensor, Tensor, Codes]:
    """Tokens, rows of an encoder, biases at which L0 latents fire, and codes with skewed firing."""
    generator = torch.Generator().manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(N, D_IN, generator=generator), dim=1)
    rows = torch.nn.functional.normalize(torch.randn(d_sae, D_IN, generator=generator), dim=1)
    largest = (rows @ u.T).topk(max(1, round(N * L0 / d_sae)) + 1, dim=1).values
    bias = -largest[:, -2:].mean(1)  # between the last that fires and the first that does not
    often = torch.rand(d_sae, generator=generator) ** 3
    fires = torch.rand(N, d_sae, generator=generator) < often * L0 / often.sum()
    return u, rows, bias, codes_where(fires, torch.rand(N, d_sae, generator=generator))


def dense_search(u: Tensor, rows: Tensor, bias: Tensor) -> Codes:
    """The active set by way of the whole matrix of pre-activations."""
    pre = torch.addmm(bias.bfloat16(), u.bfloat16(), rows.T.bfloat16())
    found = active.exact_values(u, rows.T, bias, codes_where(pre > 0, pre))
    return found.keep(found.values > 0)


def mkl(starts: Tensor, place: Tensor, values: Tensor, width: int, rows: Tensor) -> Tensor:
    """Weighted sums of rows by MKL."""
    return sparse.csr_tensor(starts, place, values, (len(starts) - 1, width)) @ rows


def mkl_transposed(codes: Codes, g: Tensor) -> Tensor:
    """A' G by MKL."""
    order, starts = by_latent(codes.col, codes.d_sae)
    return mkl(starts, codes.row[order], codes.values[order], codes.n, g)


def passed_over(codes: Codes, rows: Tensor, u: Tensor, bias: Tensor) -> float:
    """Share of the entries above 0 that are not among the codes."""
    above = u.double() @ rows.T.double() + bias.double() > 0
    n_above = int(above.sum())
    above[codes.row, codes.col] = False
    return int(above.sum()) / n_above


def planted() -> list[Tensor]:
    """Batches of unit tokens, each a sum of 32 of 2,048 random directions."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(2048, D_IN, generator=generator)
    found = []
    for _ in range(N_BATCHES):
        which = torch.randint(len(directions), (N, 32), generator=generator)
        weight = torch.rand(N, 32, generator=generator)
        sums = torch.nn.functional.embedding_bag(
            which, directions, per_sample_weights=weight, mode="sum"
        )
        found.append(torch.nn.functional.normalize(sums, dim=1))
    return found


def steps(
    d_sae: int, batches: list[Tensor], precision: Precision, kind: Kind
) -> Callable[[], StepRecord]:
    """A round of steps; of GBA once its controller has come to its targets."""
    sae = SAE(SAEConfig(D_IN, d_sae, kind, k=K), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(steps=10_000, batch_size=N, log_every=STEPS, precision=precision)
    records = train(sae, cycle(batches), config)
    if kind == "gba":
        settled(lambda: next(records), sae.config.k, STEPS)
    return lambda: next(records)


def by_torch(work: Callable[[], Found]) -> Callable[[], Found]:
    """The same without the compiled loops."""

    def run() -> Found:
        before, choice.LARGE = choice.LARGE, sys.maxsize
        try:
            return work()
        finally:
            choice.LARGE = before

    return run


def updates(rows: Tensor) -> dict[str, Callable[[], object]]:
    """Adam's step and unit norm of the rows of a matrix, by torch and by the loops."""
    optimizer = Adam([{"params": [weights := torch.nn.Parameter(rows.clone())]}], lr=1e-3)

    def update(step: Callable[[Tensor], None]) -> None:
        weights.grad = rows
        step(weights)

    found: dict[str, Callable[[], object]] = {"update, torch": lambda: update(optimizer.unit_rows)}
    if (fast := choice.products(rows, len(rows))) is not None:
        found["update"] = lambda: update(partial(fast.adam_unit_rows, optimizer))
    return found


def kernel_rows(d_sae: int, rounds: int) -> list[dict[str, Any]]:
    """All parts but the optimiser's memory at one width."""
    u, w, bias, codes = batch(d_sae)
    narrow = u.bfloat16(), w.T.bfloat16()
    pre = narrow[0] @ narrow[1]
    searches: dict[str, Callable[[], Codes]] = {
        "active set, dense": lambda: dense_search(u, w, bias),
        "active set": lambda: active.active_codes(u, w.T, bias, dtype=torch.bfloat16),
        "active set, int8": lambda: screen.active_codes(u, w.T, bias),
    }
    tokens = planted()
    gba, topk = (steps(d_sae, tokens, "bfloat16", kind) for kind in KINDS)
    trainings = {
        "step of GBA, torch": by_torch(gba), "step of GBA": gba,
        "step of TopK, torch": by_torch(topk), "step of TopK": topk,
    }  # fmt: skip
    if screen.serves(u):
        trainings["step of GBA, int8"] = steps(d_sae, tokens, "int8", "gba")
    else:
        del searches["active set, int8"]
    works: dict[str, Callable[[], object]] = {
        "product bfloat16": lambda: narrow[0] @ narrow[1],
        **searches,
        "k largest, torch": by_torch(lambda: nonlinearity.topk(pre, K)),
        "k largest": lambda: nonlinearity.topk(pre, K),
        **updates(w),
        "A W, MKL": lambda: mkl(codes.crow, codes.col, codes.values, d_sae, w),
        "A W, torch": by_torch(lambda: sparse.matmul(codes, w)),
        "A W": lambda: sparse.matmul(codes, w),
        "A' G, MKL": lambda: mkl_transposed(codes, u),
        "A' G, torch": by_torch(lambda: sparse.matmul_t(codes, u)),
        "A' G": lambda: sparse.matmul_t(codes, u),
        **trainings,
    }
    times = in_turns(works, rounds)
    for name in trainings:
        times[name] = [one / STEPS for one in times[name]]
    more = {name: {"passed over": passed_over(f(), w, u, bias)} for name, f in searches.items()}
    more |= {name: {"l0": f().l0} for name, f in trainings.items()}
    floor = median(times["product bfloat16"])
    return [
        {"name": f"{what}, {d_sae}", "what": what, "d_sae": d_sae, "ms": median(found),
         "low": min(found), "high": max(found), "times": median(found) / floor, **EMPTY,
         **more.get(what, {})}
        for what, found in times.items()
    ]  # fmt: skip


def memory_rows() -> list[dict[str, Any]]:
    """What the first optimiser of a process adds to its peak."""
    found = []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, made in OPTIMISERS.items():
        told = subprocess.run(
            [sys.executable, "-c", MEMORY.format(made=made)], cwd=ROOT, env=environment,
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        what = f"first optimiser, {name}"
        empty = dict.fromkeys(("d_sae", "ms", "low", "high", "times"))
        found.append({"name": what, "what": what, **empty, **EMPTY, "MiB": float(told)})
    return found


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """A step is at most twice the product, nothing slower or less exact than what it replaced."""
    ms = {one["name"]: one["ms"] for one in rows if one["ms"] is not None}
    found = []
    missed = {one["name"]: one["passed over"] for one in rows}
    for one in (r for r in rows if r["what"] == "step of GBA"):
        times, d_sae = one["times"], one["d_sae"]
        found.append(Goal(f"step over the product, {d_sae}", times, "<= 2", times <= 2))
        if (small := f"active set, int8, {d_sae}") in ms:
            for what in ("active set", "step of GBA"):
                share = ms[f"{what}, int8, {d_sae}"] / ms[f"{what}, {d_sae}"]
                name = f"{what}, int8 over bfloat16, {d_sae}"
                found.append(Goal(name, share, "<= 1", share <= 1))
            share = missed[small]
            name = f"share that int8 passes over, {d_sae}"
            found.append(Goal(name, share, "<= 0.0002", share <= 2e-4))
        for what, old in REPLACED:
            new, before = f"{what}, {d_sae}", f"{what}, {old}, {d_sae}"
            if {new, before} <= ms.keys():
                share = ms[new] / ms[before]
                found.append(Goal(f"{what} over {old}, {d_sae}", share, "<= 1", share <= 1))
    return found


def main() -> None:
    """Measure, write results/cpu_kernels.json."""
    parser = argparse.ArgumentParser(description="Parts of a training step on the processor.")
    parser.add_argument("--latents", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry", action="store_true", help="print, write no result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    rows = [row for d_sae in args.latents for row in kernel_rows(d_sae, args.rounds)]
    rows += memory_rows()
    if args.dry:
        print(*rows, *goals(rows), sep="\n")
    else:
        write_result("cpu_kernels", rows, goals, started, merge=args.latents != WIDTHS)


if __name__ == "__main__":
    main()
