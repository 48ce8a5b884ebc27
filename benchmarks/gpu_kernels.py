"""Training steps on a GPU beside the encoder's product alone and the two floors of the hardware.

    python -m pytest -o addopts= tests/test_triton.py      (compiled there, not interpreted)
    python -m benchmarks.gpu_kernels [--tokens 8192 --d-in 2048 --d-sae 65536 --l0 64]

One call of the second does everything, meant for less than 8 minutes, and first compares every
kernel with its dense reference on the same card. Without CUDA or triton it says so and ends with
status 2.

1. What the card does: bytes/s of a copy (read and written counted) and operations/s of a square
   bfloat16 product, both measured here.
2. Parts of a step, each alone: the encoder's product by the library (`torch.mm`), product and
   threshold fused in several tile shapes, the library's product followed by the bits, entries and
   exact values, decoder with loss, the two weight gradients, the update.
3. Whole steps: ours (gba), the same with torch's sparse products in place of the kernels, and
   sparsify's TopK with its Triton decoder and Adam where it is installed; milliseconds, tokens/s,
   multiples of the encoder's product, peak memory.
4. The floors of our step. Operations: the encoder's product at the measured rate. Bytes: the least
   traffic of the optimiser, the weights and the tokens at the measured bandwidth.
5. One step with 131,072 latents of width 4,096.
"""

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import Goal, write_result
from benchmarks.gpu_check import DEVICE, check, planted, prepared, running
from sae_core.kernels import choice
from sae_core.kernels.codes import Codes

ENCODER = "encoder product (torch.mm)"
LARGE = "step: gba, Triton, 4096 x 131072"
OURS, PLAIN, RIVAL = "step: gba, Triton", "step: gba, torch sparse", "step: sparsify TopK, Triton"
TILES = [
    (128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4), (128, 256, 64, 16, 8, 3),
    (128, 128, 64, 8, 4, 4), (128, 128, 64, 8, 8, 4), (256, 128, 64, 8, 8, 3),
]  # fmt: skip
BLOCKS = [(4096, 512), (8192, 2048), (16384, 2048), (32768, 2048)]  # numbers at once, of one row
ROUNDS = 20


def main() -> None:
    """Check, measure, write results/gpu_kernels.json."""
    parser = argparse.ArgumentParser(description="GPU kernels beside the hardware's floors.")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a step")
    parser.add_argument("--d-in", type=int, default=2048, help="width of the activations")
    parser.add_argument("--d-sae", type=int, default=65536, help="latents")
    parser.add_argument("--l0", type=int, default=64, help="active latents a token")
    args = parser.parse_args()
    if not torch.cuda.is_available() or choice.triton_kernels() is None:
        print("This suite needs a CUDA device and triton; one of them is missing.", file=sys.stderr)
        sys.exit(2)
    started = time.time()
    check()
    card = measured_card()
    rows = [*card_rows(card), *part_rows(args, card), *step_rows(args, card), *large_row(args)]
    write_result("gpu_kernels", rows, goals, started)


# ---- measuring ----


def milliseconds(work: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Device time of each of some runs, by events, after three to warm up."""
    for _ in range(3):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


def row(what: str, times: list[float], floor: float | None, **more: Any) -> dict[str, Any]:
    """A record: median and range in ms, multiple of the encoder's product, rates."""
    typical = median(times)
    base = {"what": what, "ms": typical, "ms_min": min(times), "ms_max": max(times)}
    base |= {"times_encoder": None if floor is None else typical / floor}
    return base | {"TFLOP_s": None, "GB_s": None, "tokens_s": None, "peak_GiB": None} | more


def measured_card() -> tuple[float, float]:
    """Bytes/s of a copy and operations/s of a square bfloat16 product."""
    a = torch.empty(1 << 30, dtype=torch.float32, device=DEVICE)
    b = torch.empty_like(a)
    bandwidth = 2 * a.nbytes / (median(milliseconds(lambda: b.copy_(a))) / 1e3)
    del a, b
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    rate = 2 * 8192**3 / (median(milliseconds(lambda: x @ x)) / 1e3)
    return bandwidth, rate


def card_rows(card: tuple[float, float]) -> list[dict[str, Any]]:
    """What the card does, as rows."""
    return [
        row("copy of 4 GiB", [8 * 2**30 / card[0] * 1e3], None, GB_s=card[0] / 1e9),
        row("bfloat16 product 8192^3", [2 * 8192**3 / card[1] * 1e3], None, TFLOP_s=card[1] / 1e12),
    ]


def free() -> None:
    """Give memory back, so that peaks are of one part alone."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


# ---- parts of a step ----


def part_rows(args: argparse.Namespace, card: tuple[float, float]) -> list[dict[str, Any]]:
    """Each part alone, at an active set of l0 latents a token."""
    fast = choice.triton_kernels()
    assert fast is not None
    from sae_core.kernels.triton_bits import Tiles, product_bits

    n, d, m = args.tokens, args.d_in, args.d_sae
    x = planted(n, d)
    x /= x.norm(dim=1, keepdim=True)
    w = torch.randn(m, d, device=DEVICE)
    w /= w.norm(dim=1, keepdim=True)
    xh, wh = x.bfloat16(), w.bfloat16()
    sample = (xh[:256] @ wh.T).float()
    cut = sample.flatten().kthvalue(sample.numel() - len(sample) * args.l0).values
    bias = -cut.expand(m)
    operations = 2 * n * d * m

    encoder = milliseconds(lambda: torch.mm(xh, wh.T))
    floor = median(encoder)

    routes: dict[str, Callable[[], Any]] = {
        f"product and bits {shape}": partial(product_bits, xh, wh.T, -bias, Tiles(*shape))
        for shape in TILES
    }
    routes["library's product, bits"] = partial(fast.active_bits, xh, wh.T, -bias, False)
    rows = [row(ENCODER, encoder, floor, TFLOP_s=operations / floor / 1e9)]
    for what, work in routes.items():
        try:
            times = milliseconds(work)
        except RuntimeError as error:  # a tile shape that asks for more than this card has
            print(f"{what} does not run here: {error}")
            continue
        rows.append(row(what, times, floor, TFLOP_s=operations / median(times) / 1e9))
    room = 2 * n * args.l0
    whole = milliseconds(lambda: fast.active_codes(x, w.T, bias, None, torch.bfloat16, room))
    rows.append(row("active codes, exact values", whole, floor))
    codes = fast.active_codes(x, w.T, bias, None, torch.bfloat16, room)
    rows += gather_rows(codes, x, w, floor)
    return rows


def gather_rows(codes: Codes, x: Tensor, w: Tensor, floor: float) -> list[dict[str, Any]]:
    """The sparse products on float32 and bfloat16 matrices; GB/s as if nothing were cached."""
    from sae_core.kernels import triton_loss, triton_products

    fast = choice.triton_kernels()
    assert fast is not None
    b = torch.zeros_like(x[0])
    rows = []
    for dtype, (cells, columns) in product((torch.float32, torch.bfloat16), BLOCKS):
        wd, xd = w.to(dtype), x.to(dtype)
        works = {
            "sampled product": (1, partial(fast.sampled, codes, x, wd)),
            "decoder": (1, partial(fast.matmul, codes, wd)),
            "decoder, loss, gradient of codes": (
                2, partial(fast.reconstruction, codes, wd, b, x, 1.0)
            ),
            "gradient of a weight matrix": (1, partial(fast.matmul_t, codes, xd)),
        }  # fmt: skip
        traffic = codes.col.shape[0] * x.shape[1] * dtype.itemsize
        for what, (passes, work) in works.items():
            with (
                patch.multiple(triton_products, CELLS=cells, COLUMNS=columns),
                patch.object(triton_loss, "CELLS", cells),
            ):
                times = milliseconds(work)
            name = f"{what}, {str(dtype).removeprefix('torch.')}, {cells} cells, {columns} columns"
            rows.append(row(name, times, floor, GB_s=passes * traffic / median(times) / 1e6))
    return rows


# ---- whole steps ----


def step_rows(args: argparse.Namespace, card: tuple[float, float]) -> list[dict[str, Any]]:
    """Whole steps and the floors of ours."""
    n, d, m = args.tokens, args.d_in, args.d_sae
    x = planted(n, d)
    xh, wh = x.bfloat16(), torch.randn(m, d, device=DEVICE).bfloat16()
    encoder = median(milliseconds(lambda: torch.mm(xh, wh.T)))
    del xh, wh
    rows = []
    for what, fast in ((OURS, choice.triton_kernels()), (PLAIN, None)):
        free()
        with running(fast):
            _, step = prepared(x, m, args.l0, "bfloat16")
            times = milliseconds(step)
            l0 = step()[2].col.shape[0] / n
            rows.append(whole_row(f"{what} (L0 {l0:.0f})", times, encoder, n))
            if fast is not None:
                print(f"operations that make the host wait, in 3 steps: {waits(step, 3)}")
                print_profile(step)
        del step
    rows += rival_row(x, args, encoder)
    operations = 2 * n * d * m / card[1] * 1e3
    parameters = 2 * m * d
    # float32: Adam reads 4 and writes 3 matrices, of which the gradient is written before and the
    # weights read once more for the codes; bfloat16: a copy for the product, written and read
    traffic = 4 * 9 * parameters + 2 * parameters + 4 * 4 * n * d
    rows.append(row("floor of operations", [operations], encoder, TFLOP_s=card[1] / 1e12))
    rows.append(row("floor of bytes", [traffic / card[0] * 1e3], encoder, GB_s=card[0] / 1e9))
    return rows


def whole_row(what: str, times: list[float], encoder: float | None, n: int) -> dict[str, Any]:
    """A row of a whole step, with the peak of memory since `free`.

    Means of tens: one step in ten looks at the demand, which a median of single steps would hide.
    """
    tens = [mean(times[i : i + 10]) for i in range(0, len(times), 10)]
    peak = torch.cuda.max_memory_allocated() / 2**30
    return row(what, tens, encoder, tokens_s=n / median(tens) * 1e3, peak_GiB=peak)


def waits(step: Callable[[], Any], steps: int) -> int:
    """Operations of torch that wait for the device, beside the one count a step that we ask for."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(steps):
            step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def print_profile(step: Callable[[], Any]) -> None:
    """The kernels of three steps by device time, for whoever looks for the next gain."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=25))


def rival_row(x: Tensor, args: argparse.Namespace, encoder: float) -> list[dict[str, Any]]:
    """sparsify's step: forward, backward, fused Adam, unit decoder; nothing where not installed."""
    try:
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore
    except ImportError as error:
        print(f"sparsify is not timed: {error}")
        return []
    free()
    config = SparseCoderConfig(num_latents=args.d_sae, k=args.l0)
    coder = SparseCoder(x.shape[1], config, device=DEVICE)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)
    u = x / x.norm(dim=1, keepdim=True)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(u)
        optimizer.zero_grad()
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()

    return [whole_row(RIVAL, milliseconds(step), encoder, len(x))]


def large_row(args: argparse.Namespace) -> list[dict[str, Any]]:
    """131,072 latents of width 4,096: does a step fit, and how long does it take?"""
    free()
    x = planted(args.tokens, 4096)
    xh = x.bfloat16()
    try:
        wh = torch.randn(131072, 4096, device=DEVICE, dtype=torch.bfloat16)
        encoder = median(milliseconds(lambda: torch.mm(xh, wh.T), 5))
        del wh
        free()
        _, step = prepared(x, 131072, args.l0, "bfloat16")
        return [whole_row(LARGE, milliseconds(step, 10), encoder, len(x))]
    except torch.cuda.OutOfMemoryError as error:
        print(f"131,072 latents at width 4,096 do not fit: {error}")
        return []


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Issue 8, part 2."""
    of = {r["what"].partition(" (L0")[0]: r for r in rows}
    ours = of[OURS]
    times = ours["times_encoder"]
    found = [Goal("step / encoder product", times, "<= 1.6", times <= 1.6)]
    if RIVAL in of:
        ratio = of[RIVAL]["ms"] / ours["ms"]
        found.append(Goal("sparsify / ours", ratio, ">= 1.5", ratio >= 1.5, "Adam in both"))
    fits = LARGE in of
    found.append(Goal("131,072 latents at width 4,096 fit", float(fits), "1", fits))
    return found


if __name__ == "__main__":
    main()
