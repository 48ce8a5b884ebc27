"""Speed: harvesting beside a bare forward pass, training beside the bare encoder product.

    python -m benchmarks.throughput [--size full] [--part memory | featurize]

1. Harvest: tokens/s of `stream_activations` and of the same batches through the model cut off
   behind the hooked layer, with nothing else done; both interleaved in one run. Goal: at most 5%
   more time.
2. Memory: peak resident size of a process that harvests a text, and of one that harvests ten
   times as much. Goal: no growth beyond noise (10%).
3. To disk: tokens/s of a harvest that writes its shards and of featurising (encode with a GBA SAE
   of 4,608 latents whose L0 is 32, pool, write), of whole rows, beside the bare pass of the same
   batches; all in turns. Goal: at least 0.9 of its tokens/s.
4. Training: tokens/s and seconds a step for every kind of SAE, as a multiple of the encoder
   product alone (pre = u W_enc) in the same type, interleaved.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.common import RESULTS, Goal, write_result
from sae_apps.tasks.evaluation import peak_memory
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.feature_shards import FeaturePlan, featurize_to
from sae_core.harvest import harvest_shards
from sae_core.models import LanguageModel, load_model
from sae_core.sae import SAE, SAEConfig
from sae_core.start import data_thresholds, start
from sae_core.state import TrainConfig
from sae_core.step import bias_step, count_firing, gradient_step
from sae_core.text import TextSource
from sae_core.tokens import TokenBatch, count_tokens, token_windows

HOOK, LAYERS = "layers.15.out", 16
SIZES = {"reduced": (20_000, 3, 5), "full": (60_000, 5, 20)}  # tokens, rounds, steps a round
KINDS = ("gba", "topk", "batch_topk", "jumprelu", "relu")


def main() -> None:
    """Run the parts and write results/throughput.json."""
    parser = argparse.ArgumentParser(description="Speed of harvest and training.")
    parser.add_argument("--size", choices=SIZES, default="reduced")
    parser.add_argument(
        "--part", choices=("memory", "featurize"), help="this part, into the last result"
    )
    parser.add_argument("--harvest-only", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.harvest_only:
        print(_peak_after_harvest(args.harvest_only))
        return
    started = time.time()
    tokens, rounds, steps = SIZES[args.size]
    if args.part:
        parts = {
            "memory": lambda: memory_rows(tokens // 4),
            "featurize": lambda: disk_rows(tokens // 2, rounds),
        }
        rows, goals = parts[args.part]()
        names = {goal.name for goal in goals}
        kept = json.loads((RESULTS / "throughput.json").read_text())["goals"]
        others = [Goal(**one) for one in kept if one["name"] not in names]
        write_result("throughput", rows, lambda _: [*others, *goals], started, merge=True)
        return
    rows, goals = harvest_rows(tokens, rounds)
    for more, further in (memory_rows(tokens // 4), disk_rows(tokens // 2, rounds)):
        rows, goals = rows + more, goals + further
    for d_sae in (4608, 18432) if args.size == "full" else (4608,):
        rows += training_rows(d_sae, rounds, steps)
    write_result("throughput", rows, lambda _: goals, started)


def _rows() -> Any:
    from sae_apps.tasks.text import open_text

    return open_text("demo")


def harvest_rows(tokens: int, rounds: int) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Seconds of a bare truncated pass and of harvesting, alternating, for two model types."""
    rows, goals = [], []
    for dtype in (torch.float32, torch.bfloat16):
        lm = load_model("smollm2-135m", dtype=dtype)
        config = HarvestConfig(max_tokens=tokens)
        batches = [b for w in token_windows(lm.tokenizer, _rows(), config) for b in w.batches]
        bare, ours = [], []
        for _ in range(rounds):
            bare.append(_timed(lambda: _bare(lm, batches)))  # noqa: B023 - used at once
            ours.append(_timed(lambda: _harvest(lm, config)))  # noqa: B023
        name = str(dtype).removeprefix("torch.")
        overhead = median(ours) / median(bare) - 1
        for what, seconds in (("bare forward", bare), ("harvest", ours)):
            typical = median(seconds)
            ratio = typical / median(bare)
            rows.append(_row(f"{what} {name}", tokens / typical, typical, ratio))
        goals.append(Goal(f"harvest overhead {name}", overhead, "<= 0.05", overhead <= 0.05))
    return rows, goals


def _row(what: str, rate: float | None, seconds: float | None, ratio: float | None, **more: Any):
    name = " ".join([what, *(str(n) for n in (more.get("d_sae"),) if n)])
    row = {"name": name, "what": what, "d_sae": None, "tokens_per_s": rate, "seconds": seconds}
    return row | {"times_floor": ratio, "peak_MiB": None} | more


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@torch.inference_mode()
def _bare(lm: LanguageModel, batches: list[TokenBatch]) -> None:
    base = lm.model.base_model
    layers = base.layers
    base.layers = layers[:LAYERS]
    try:
        for batch in batches:
            base(
                input_ids=batch.input_ids, position_ids=batch.position_ids,
                attention_mask=(batch.chunk >= 0).long(), use_cache=False,
            )  # fmt: skip
    finally:
        base.layers = layers


def _harvest(lm: LanguageModel, config: HarvestConfig) -> None:
    for _ in stream_activations(lm, _rows(), [HOOK], config):
        pass


def _peak_after_harvest(tokens: int) -> int:
    lm = load_model("smollm2-135m", dtype=torch.bfloat16)
    _harvest(lm, HarvestConfig(max_tokens=tokens))
    return peak_memory() // 2**20


def memory_rows(tokens: int) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Peak resident MiB of fresh processes that harvest `tokens` and ten times as many."""
    peaks = []
    for n in (tokens, 10 * tokens):
        command = [sys.executable, "-m", "benchmarks.throughput", "--harvest-only", str(n)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout.split()[-1]))
    rows = [
        _row(f"harvest of {n} tokens", None, None, peak / peaks[0], peak_MiB=peak)
        for n, peak in zip((tokens, 10 * tokens), peaks, strict=True)
    ]
    growth = peaks[1] / peaks[0] - 1
    return rows, [Goal("memory growth with 10x the text", growth, "<= 0.1", growth <= 0.1)]


def disk_rows(tokens: int, rounds: int) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Tokens/s of whole rows through the bare pass, harvested to disk, and featurised to disk."""
    rows, goals = [], []
    for dtype in (torch.float32, torch.bfloat16):
        lm = load_model("smollm2-135m", dtype=dtype)
        name, config = str(dtype).removeprefix("torch."), HarvestConfig()
        source, n = _whole_rows(lm, tokens, config)
        batches = [b for w in token_windows(lm.tokenizer, source, config) for b in w.batches]
        ways: dict[str, Callable[[Path], object]] = {
            "bare forward, whole rows": partial(_bare_pass, lm, batches),
            "harvest to disk": partial(_harvest_to_disk, lm, source, name),
        }
        sae = _encoder(lm)
        for pooling in ("max", "none"):
            ways[f"featurise to disk, pooling {pooling}"] = partial(
                _featurise_to_disk, lm, sae, source, pooling
            )
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for what, work in ways.items():
                with TemporaryDirectory() as folder:
                    seconds[what].append(_timed(partial(work, Path(folder) / "out")))
        bare = seconds["bare forward, whole rows"]
        for what, times in seconds.items():
            # of each round by itself, so that a slow minute of the machine hits both
            share = median(floor / ours for floor, ours in zip(bare, times, strict=True))
            rows.append(_row(f"{what} {name}", n / median(times), median(times), 1 / share))
            if not what.startswith("bare"):
                goals.append(Goal(f"{what} {name}, of bare", share, ">= 0.9", share >= 0.9))
    return rows, goals


def _whole_rows(lm: LanguageModel, tokens: int, config: HarvestConfig) -> tuple[TextSource, int]:
    """The first rows that hold so many tokens, and the number that they hold."""
    chosen, n = [], 0
    for row in _rows():
        chosen.append(row)
        n += count_tokens(lm.tokenizer, [row], config)
        if n >= tokens:
            break
    return TextSource(f"demo[first {len(chosen)} rows]", partial(iter, chosen)), n


def _encoder(lm: LanguageModel) -> SAE:
    """Random directions whose biases let 32 of 4,608 latents fire on a token of the text."""
    sae = SAE(SAEConfig(lm.d_model, 4608, k=32), generator=torch.Generator().manual_seed(0))
    found = list(stream_activations(lm, _rows(), [HOOK], HarvestConfig(max_tokens=4096)))
    u, _ = sae.normalise(torch.cat([batch[HOOK].x for batch in found]).float())
    freq = torch.full((4608,), 32 / 4608, dtype=torch.float64)
    sae.b_dec.data.copy_(u.mean(0))
    sae.b_enc.data.copy_(-data_thresholds(sae, u, freq))
    return sae.eval()


def _bare_pass(lm: LanguageModel, batches: list[TokenBatch], _out: Path) -> None:
    _bare(lm, batches)


def _harvest_to_disk(lm: LanguageModel, source: TextSource, dtype: str, out: Path) -> None:
    config = HarvestConfig()
    harvest_shards(lm, source, [HOOK], out, config, dtype=dtype, shard_tokens=8192)


def _featurise_to_disk(
    lm: LanguageModel, sae: SAE, source: TextSource, pooling: str, out: Path
) -> None:
    featurize_to(out, lm, sae, source, FeaturePlan(HOOK, source.id, pooling))


def training_rows(d_sae: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Seconds a step of every kind, interleaved with the encoder product alone.

    Activations are those of the planted-dictionary kind (unit-norm, 60 features a token), so the
    suite needs no harvest; L0 is set to 64 for every kind.
    """
    n, d_in = 2048, 576
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(8192, d_in, generator=generator)
    index = torch.randint(8192, (n * 4, 60), generator=generator)
    x = torch.stack([v[i].sum(0) for i in index])
    rows = []
    for precision in ("float32", "bfloat16"):
        runs = {kind: _prepare(kind, d_sae, precision, x) for kind in KINDS}
        seconds: dict[str, list[float]] = {name: [] for name in ("encoder product", *KINDS)}
        w = torch.randn(d_sae, d_in, generator=generator).T.to(getattr(torch, precision))
        u = x[:n].to(w.dtype)
        for _ in range(rounds):
            floor = _timed(lambda: [u @ w for _ in range(steps)])  # noqa: B023
            seconds["encoder product"].append(floor / steps)
            for kind, step in runs.items():
                seconds[kind].append(_timed(lambda: [step() for _ in range(steps)]) / steps)  # noqa: B023
        floor = median(seconds["encoder product"])
        for name, times in seconds.items():
            rate, what = n / median(times), f"{name} {precision}"
            rows.append(_row(what, rate, median(times), median(times) / floor, d_sae=d_sae))
    return rows


def _prepare(kind: str, d_sae: int, precision: str, x: torch.Tensor) -> Callable[[], None]:
    """A closure that does one whole training step (gradient, counts, bias) on 2,048 tokens."""
    n = 2048
    config = TrainConfig(steps=10_000, batch_size=n, precision=precision)  # type: ignore[arg-type]
    sae = SAE(SAEConfig(x.shape[1], d_sae, kind=kind, k=64))  # type: ignore[arg-type]
    sae.train()
    state = start(sae, x, config)
    if kind == "relu":  # the L1 weight needs many steps to bring L0 down: start at the wanted L0
        freq = torch.full((d_sae,), 64 / d_sae, dtype=torch.float64)
        sae.b_enc.data.copy_(-data_thresholds(sae, sae.normalise(x)[0], freq))

    def step() -> None:
        batch = x[(state.step % 4) * n : (state.step % 4 + 1) * n]
        u, _ = sae.normalise(batch)
        codes, _ = gradient_step(sae, u, state, config, 1e-4)
        count_firing(sae, codes, state, config)
        if kind == "gba" and state.step % config.gba.period == 0:
            bias_step(sae, state, config.gba)

    step()
    return step


if __name__ == "__main__":
    main()
