"""The pool, the targets and the embeddings of the selection benchmark: real data, labels by origin.

The pool mixes the instruction sets of ../shared/data: templates of T0 (34 source datasets), six
chain-of-thought tasks of Flan (its seventh, gsm8k_train, repeats the questions of gsm8k), three
sets of GPTeacher, GSM8K train, one half of MBPP, and one half of each BIG-Bench-Hard task. BBH is
there for retrieval alone: nothing is ever trained on it (``is_trainable``). Equal texts are
removed.

A target is a set of rows that are not in the pool, and the pool rows that count as hits:

    gsm8k       GSM8K test                      GSM8K train
    mbpp        the other half of MBPP          its half in the pool
    bbh:TASK    the other half of a BBH task    its half in the pool
    t0:DATASET  one T0 template, held out       the other templates of the same source dataset

``fresh`` makes other targets of the same rows, for methods that were chosen on those above: every
source dataset of T0, task of Flan and set of GPTeacher that is no target there; one half of its
rows leaves the pool for the examples, the other half are the hits.

Every method reads the same text, ``prompt newline response``, cut after 128 tokens of SmolLM2. One
pass of the model makes all representations of a row, each over its tokens without special ones and
without the first, an attention sink:

    gba, topk         mean of the SAE's codes, layers.15.out (SAEs of benchmarks.agreement, seed 0)
    gba_max, topk_max the maximum instead
    hidden            mean of the residual stream at layers.15.out
    hidden_last       the same at layers.29.out
    rds               position-weighted mean, w_i = i / sum i, at layers.29.out (RDS+, 2503.01807)
    mlp               mean of the positive part of SiLU(W_gate x), layer 15 (MONA's raw neurons)
    mlp_topk          the same with the 64 largest a token, the k of the SAEs

    python -m benchmarks.selection_data --size reduced     # builds the cache, prints the sizes
"""

import argparse
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from benchmarks.agreement_saes import make_variant, trained
from benchmarks.sae_quality import HOOK, prepare
from benchmarks.selection_sources import POOL_ROWS, SHARED, Row, Target, make_rows, make_targets
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.download import cache_dir
from sae_core.errors import UserError
from sae_core.kernels.codes import Codes, codes_at, codes_where
from sae_core.metrics import evaluating
from sae_core.models import LanguageModel, load_model
from sae_core.pooling import RowPooler
from sae_core.sae import SAE
from sae_core.text import TextRow

MAX_TOKENS = 128
LAST = "layers.29.out"
NEURONS = "model.layers.15.mlp.act_fn.out"
N_NEURONS = 64  # of 1,536 a token, the k of the SAEs
SPARSE = ("gba", "gba_max", "topk", "topk_max", "mlp", "mlp_topk")
DENSE = ("hidden", "hidden_last", "rds")


@dataclass(frozen=True, eq=False)
class Data:
    """Rows, pool, targets, and every row's embeddings."""

    size: str
    rows: list[Row]
    pool: np.ndarray
    """Places of the pool's rows."""
    targets: dict[str, Target]
    folder: Path
    """Where the embeddings are kept."""
    _kept: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def n_tokens(self) -> np.ndarray:
        """Tokens of each row's text, special ones counted, after the cut."""
        return np.load(self.folder / "n_tokens.npy")

    @property
    def is_trainable(self) -> np.ndarray:
        """Rows that may be trained on: BBH is for evaluation alone."""
        return np.array([row.source != "bbh" for row in self.rows])

    def representation(self, name: str) -> Any:
        """[n_rows, d] embeddings by name: csr_array float32 for SPARSE, ndarray for DENSE."""
        if name not in self._kept:
            if name in SPARSE:
                self._kept[name] = sparse.csr_array(sparse.load_npz(self.folder / f"{name}.npz"))
            elif name in DENSE:
                self._kept[name] = np.load(self.folder / f"{name}.npy")
            else:
                raise UserError(f"Expected one of {SPARSE + DENSE}, got {name!r}.")
        return self._kept[name]


# ---- rows ----


FRESH_ROWS = 40  # a label needs so many, half of them for examples


def fresh(data: Data) -> Data:
    """The same rows with targets that ``load`` does not have; see above."""
    labels = np.array([row.label for row in data.rows])
    rng = np.random.default_rng(8)
    targets = {}
    for name in sorted(set(labels[data.pool]) - set(data.targets)):
        places = rng.permutation(data.pool[labels[data.pool] == name])
        if len(places) >= FRESH_ROWS:
            half = len(places) // 2
            targets[str(name)] = Target(np.sort(places[:half]), np.sort(places[half:]))
    examples = np.concatenate([target.members for target in targets.values()])
    pool = np.setdiff1d(data.pool, examples)
    return replace(data, pool=pool, targets=targets)


# ---- embeddings ----


def cut(lm: LanguageModel, text: str) -> str:
    """The text up to the end of its 128th token."""
    offsets = lm.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= MAX_TOKENS else text[: offsets[MAX_TOKENS - 1][1]]


def saes() -> dict[str, SAE]:
    """The GBA and the TopK SAE of benchmarks.agreement, seed 0: trained if they are not there."""
    data = prepare("full")
    folder = cache_dir() / "benchmarks" / "agreement"
    return {
        kind: trained(data.train, make_variant(kind, "default", "full"), 0, folder)
        for kind in ("gba", "topk")
    }


class Means:
    """Sums of vectors by row: plain, and weighted by the position in the row."""

    def __init__(self, n_rows: int, d: int, weighted: bool = False) -> None:
        self.total = np.zeros((n_rows, d))
        self.weight = np.zeros(n_rows)
        self.weighted = weighted

    def update(self, x: torch.Tensor, row: np.ndarray, position: np.ndarray) -> None:
        weight = position.astype(np.float64) if self.weighted else np.ones(len(row))
        np.add.at(self.total, row, x.double().numpy() * weight[:, None])
        np.add.at(self.weight, row, weight)

    def compute(self) -> np.ndarray:
        return (self.total / np.maximum(self.weight, 1e-12)[:, None]).astype(np.float32)


def neuron_codes(x: torch.Tensor, k: int | None) -> Codes:
    """Positive part of the neurons as sparse codes, the k largest of a token."""
    x = x.float().relu()
    if k is None:
        return codes_where(x > 0, x)
    values, index = x.topk(k, dim=1)
    return codes_at(index, values, x.shape[1])


def embed(rows: list[Row], folder: Path) -> None:
    """All representations of all rows into the folder, in one pass of the model."""
    lm = load_model("smollm2-135m", dtype=torch.bfloat16)
    kinds = saes()
    texts = [cut(lm, row.text) for row in rows]
    source = [TextRow(i, text, {}) for i, text in enumerate(texts)]
    n, width = len(rows), lm.d_model
    sums = {"hidden": Means(n, width), "hidden_last": Means(n, width), "rds": Means(n, width, True)}
    poolers = {
        f"{kind}{end}": RowPooler(sae.d_sae, pooling)
        for kind, sae in kinds.items()
        for end, pooling in (("", "mean"), ("_max", "max"))
    }
    n_neurons = lm.model.config.intermediate_size
    neurons = {"mlp": None, "mlp_topk": N_NEURONS}
    poolers |= {name: RowPooler(n_neurons, "mean") for name in neurons}
    config = HarvestConfig(context_size=MAX_TOKENS)
    done = 0
    for found in stream_activations(lm, source, [HOOK, LAST, NEURONS], config):
        middle, last, gates = found[HOOK], found[LAST], found[NEURONS]
        ids, position = middle.row_id, middle.position
        for name, batch in (("hidden", middle), ("hidden_last", last), ("rds", last)):
            sums[name].update(batch.x, ids.numpy(), position.numpy())
        for kind, sae in kinds.items():
            with evaluating(sae):
                codes = sae.encode_sparse(middle.x.float())
            for end in ("", "_max"):
                poolers[f"{kind}{end}"].update(codes, ids, position)
        for name, k in neurons.items():
            poolers[name].update(neuron_codes(gates.x, k), ids, position)
        done += len(middle)
        print(f"\r{done:,} tokens", end="", flush=True)
    print()
    every = np.arange(n)
    for name, stats in sums.items():
        np.save(folder / f"{name}.npy", stats.compute())
    for name, pooler in poolers.items():
        acts, _ = pooler.compute(every)
        sparse.save_npz(folder / f"{name}.npz", acts)
    lengths = [len(lm.tokenizer(text)["input_ids"]) for text in texts]
    np.save(folder / "n_tokens.npy", np.array(lengths))


def load(size: str = "reduced") -> Data:
    """The benchmark's data; the first call embeds the rows and keeps them in the cache folder.

    Raises:
        UserError: ../shared/data is absent.
    """
    if not SHARED.is_dir():
        raise UserError(f"Expected the data sets at {SHARED}, got no such folder.")
    rows = make_rows(size)
    folder = cache_dir() / "benchmarks" / f"selection-{size}"
    if not (folder / "n_tokens.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        embed(rows, folder)
    pool = np.flatnonzero([not row.held_out for row in rows])
    data = Data(size, rows, pool, make_targets(rows), folder)
    if len(data.n_tokens) != len(rows):
        raise UserError(f"Expected embeddings of {len(rows)} rows in {folder}; delete the folder.")
    return data


def main() -> None:
    """Build the cache and print what is in it."""
    parser = argparse.ArgumentParser(description="Data of the selection benchmark.")
    parser.add_argument("--size", choices=POOL_ROWS, default="reduced")
    data = load(parser.parse_args().size)
    print(f"{len(data.pool):,} pool rows, {len(data.rows) - len(data.pool):,} target rows")
    print(f"{data.n_tokens.mean():.0f} tokens a row, {len(data.targets)} targets")
    for name, target in data.targets.items():
        print(f"  {name}: {len(target.members)} examples, {len(target.relevant)} hits")
    print(f"{os.path.relpath(data.folder, Path.home())} below the home folder")


if __name__ == "__main__":
    main()
