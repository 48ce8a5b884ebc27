"""Selection by layer and by K: the two ablations of MONA that need other codes.

    python -m benchmarks.selection_layers [--part layer|k]

layer: a GBA SAE on each of four layers, all trained on the same 262,144 tokens (a quarter of those
       behind benchmarks.selection, because every layer needs its own), and the hidden states there
k:     the TopK SAE of benchmarks.selection (layer 15, K = 64), its codes cut to the K largest
       latents of a token; MONA found more to be better up to the SAE's own K (paper: 24 to 192)

Pool, targets, draws and precisions are those of benchmarks.selection; measures: the published
Jaccard, cosine, and what `select` does. results/selection_layers.json has a row per code and
measure.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from benchmarks.common import write_result
from benchmarks.sae_quality import BATCH, D_SAE, HOOK
from benchmarks.selection import cut_texts
from benchmarks.selection_data import Data, Means, load, saes
from benchmarks.selection_measures import Measure
from benchmarks.selection_methods import from_measure, select_method
from benchmarks.selection_table import Bench, Method, evaluate, make_aims, method_rows
from sae_apps.tasks.text import open_text
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.buffer import batches
from sae_core.download import cache_dir
from sae_core.gba import GBAConfig
from sae_core.harvest import harvest_shards
from sae_core.kernels.codes import Codes
from sae_core.metrics import evaluating
from sae_core.models import LanguageModel, load_model
from sae_core.pooling import RowPooler
from sae_core.sae import SAE, SAEConfig, load_sae, save_sae
from sae_core.state import TrainConfig, default_lr
from sae_core.text import TextRow, split_rows
from sae_core.train import train

LAYERS = (6, 15, 22, 28)
TOKENS, CALIBRATE = 262_144, 32_768
KS = (8, 16, 32, 64)
SHOWN = (
    "name", "method", "family", "representation", "r_precision", "r_precision_low",
    "r_precision_high", "p1", "p5", "p10", "r_gsm8k", "r_mbpp", "r_bbh", "r_t0",
)  # fmt: skip
LOG = logging.getLogger(__name__)


def largest(codes: Codes, k: int) -> Codes:
    """The k largest activations of every token; equal ones by latent."""
    order = torch.argsort(codes.values, descending=True, stable=True)
    order = order[torch.argsort(codes.row[order], stable=True)]
    rank = torch.empty_like(codes.row)
    rank[order] = torch.arange(len(order)) - codes.crow[codes.row[order]]
    return codes.keep(rank < k)


def layer_saes(lm: LanguageModel, folder: Path) -> dict[str, SAE]:
    """An SAE for each layer, trained alike; those of an earlier run are read."""
    hooks = {f"layer{n}": f"layers.{n}.out" for n in LAYERS}
    found = {name: folder / name for name in hooks}
    if not all(place.exists() for place in found.values()):
        rows, _ = split_rows(open_text("demo"), 0.1, 0)
        config = HarvestConfig(max_tokens=TOKENS + CALIBRATE)
        names = list(hooks.values())
        shards = harvest_shards(lm, rows, names, folder / "shards", config, dtype="bfloat16")
        for name, hook in hooks.items():
            sae = SAE(
                SAEConfig(lm.d_model, D_SAE, k=64), generator=torch.Generator().manual_seed(0)
            )
            settings = TrainConfig(
                steps=TOKENS // BATCH, batch_size=BATCH, lr=default_lr("gba", D_SAE),
                precision="bfloat16", gba=GBAConfig(calibrate_tokens=CALIBRATE),
            )  # fmt: skip
            *_, last = train(sae, batches(shards[hook], BATCH, seed=0), settings)
            LOG.info("%s: %s", name, last)
            save_sae(found[name], sae, {"hook_point": hook}, overwrite=True)
    return {name: load_sae(place)[0] for name, place in found.items()}


def pooled(
    lm: LanguageModel,
    texts: Sequence[str],
    encoders: dict[str, tuple[str, Callable[[torch.Tensor], Codes]]],
) -> dict[str, Any]:
    """Mean-pooled codes of the texts by name, and under ``HOOK hidden`` the mean activation.

    Args:
        encoders: name to (hook point, activations to codes of d_sae D_SAE).
    """
    hooks = list(dict.fromkeys(hook for hook, _ in encoders.values()))
    poolers = {name: RowPooler(D_SAE, "mean") for name in encoders}
    means = {hook: Means(len(texts), lm.d_model) for hook in hooks}
    rows = [TextRow(i, text, {}) for i, text in enumerate(texts)]
    for found in stream_activations(lm, rows, hooks, HarvestConfig()):
        for hook, batch in found.items():
            means[hook].update(batch.x, batch.row_id.numpy(), batch.position.numpy())
        for name, (hook, encode) in encoders.items():
            batch = found[hook]
            poolers[name].update(encode(batch.x.float()), batch.row_id, batch.position)
    every = np.arange(len(texts))
    codes: dict[str, Any] = {name: pooler.compute(every)[0] for name, pooler in poolers.items()}
    return codes | {f"{hook} hidden": means[hook].compute() for hook in hooks}


def encode(sae: SAE, k: int | None, x: torch.Tensor) -> Codes:
    """Codes of tokens, the k largest where k is given."""
    with evaluating(sae):
        codes = sae.encode_sparse(x)
    return codes if k is None else largest(codes, k)


def methods_of(matrices: dict[str, Any]) -> Iterator[Method]:
    """The three measures on every code, the centred cosine on hidden states."""
    for name, matrix in matrices.items():
        if sparse.issparse(matrix):
            jaccard = Measure(f"{name}-jaccard", name, metric="jaccard", family="published")
            yield from_measure(jaccard)
            yield from_measure(Measure(f"{name}-cosine", name))
            yield select_method(name, "")
        else:
            yield from_measure(
                Measure(f"{name}-centred", name, steps=("centre",), family="baseline")
            )


def bench_of(data: Data, texts: tuple[str, ...], matrices: dict[str, Any]) -> Bench:
    """The benchmark on these codes."""
    return Bench(data, texts, make_aims(data), matrices.__getitem__)


def main() -> None:
    """Embed the rows with the codes of a part and measure them."""
    parser = argparse.ArgumentParser(description="Selection by layer and by K.")
    parser.add_argument("--part", choices=("layer", "k"))
    part = parser.parse_args().part
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started, data = time.time(), load("reduced")
    texts = cut_texts(data)
    lm = load_model("smollm2-135m", dtype=torch.bfloat16)
    encoders = {}
    if part != "layer":
        sae = saes()["topk"]
        encoders |= {f"K{k}": (HOOK, partial(encode, sae, k)) for k in KS}
    if part != "k":
        layers = layer_saes(lm, cache_dir() / "benchmarks" / "selection-layers")
        encoders |= {
            name: (f"layers.{name[5:]}.out", partial(encode, one, None))
            for name, one in layers.items()
        }
    matrices = pooled(lm, texts, encoders)
    bench, methods = bench_of(data, texts, matrices), list(methods_of(matrices))
    rows = method_rows(bench, methods, evaluate(bench, methods), "reduced")
    write_result(
        "selection_layers", [{key: row[key] for key in SHOWN} for row in rows], lambda _: [],
        started, merge=part is not None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
