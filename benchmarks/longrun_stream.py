"""The streamed route of ``longrun``: the README's pass with nothing on disk, without end.

    python -m benchmarks.longrun_stream --model MODEL --text TEXT OUT

Writes OUT/metrics.jsonl; SIGTERM writes a checkpoint to OUT/checkpoints and exits with 143.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from sae_apps.tasks.common import Interrupted, catch_signals
from sae_apps.tasks.text import open_text
from sae_core import (
    SAE,
    HarvestConfig,
    SAEConfig,
    TrainConfig,
    load_model,
    shuffle_stream,
    stream_activations,
    train,
)
from sae_core.checkpoint import save_checkpoint
from sae_core.disk import append_jsonl
from sae_core.state import TrainState
from sae_core.text import TextRow, TextSource

BLOCK = 4096  # rows held at once to change their order
BATCH, BUFFER = 1024, 32768  # tokens
STEPS = 10**9  # never reached


def endless(source: TextSource, seed: int = 0) -> Iterator[TextRow]:
    """The rows again and again, each time in another order within blocks, with new row ids."""
    rng = np.random.default_rng(seed)
    n = 0
    while True:
        block: list[TextRow] = []
        for row in source:
            block.append(row)
            if len(block) == BLOCK:
                yield from _renumbered(block, rng, n)
                n, block = n + len(block), []
        yield from _renumbered(block, rng, n)
        n += len(block)


def _renumbered(block: list[TextRow], rng: np.random.Generator, n: int) -> Iterator[TextRow]:
    for k, i in enumerate(rng.permutation(len(block))):
        yield block[i]._replace(row_id=n + k)


def stream(model: str, text: str, out: Path) -> int:
    """Train until a signal comes; the exit code."""
    lm = load_model(model)
    hook = f"layers.{lm.n_layers // 2}.out"
    found = stream_activations(lm, endless(open_text(text)), [hook], HarvestConfig())
    batches = shuffle_stream((item[hook] for item in found), BATCH, BUFFER, seed=0)
    sae = SAE(SAEConfig(d_in=lm.d_model, d_sae=8 * lm.d_model), generator=_generator())
    state, config = TrainState(), TrainConfig(steps=STEPS, batch_size=BATCH)
    out.mkdir(parents=True)
    with catch_signals() as stop:
        try:
            with stop.deferred():
                for record in train(sae, batches, config, state):
                    append_jsonl(out / "metrics.jsonl", asdict(record))
                    if stop.signum is not None:
                        save_checkpoint(out / "checkpoints", sae, state, config)
                    stop.check()
        except Interrupted as end:
            return 128 + end.signum
    return 0


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    sys.exit(stream(given.model, given.text, given.out))
