"""Featurising by the workers of a Ray cluster: each encodes shards of rows, the caller joins them.

A shard is encoded on its own (see ``feature_shards``), so that workers with as many threads as the
local engine, on processors of the same kind, give the same features to the bit.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sae_core.errors import UserError
from sae_core.feature_shards import (
    FeaturePlan,
    Featurizer,
    join_shards,
    partial_folder,
    unfinished,
)
from sae_core.features import SparseFeatures
from sae_core.featurize import RowTable
from sae_core.models import load_model
from sae_core.sae import load_sae
from sae_core.text import TextRow
from sae_core.workers import ShardJob, device_in_worker, import_ray, is_cuda, run_shards


@dataclass(frozen=True)
class FeaturizerSpec:
    """What a worker needs to load a model and an SAE: names, and no weights."""

    sae: str
    """Folder that ``save_sae`` wrote, as every worker sees it."""
    model: str
    """See ``load_model``; a path as every worker sees it."""
    dtype: str = "float32"
    """Precision of the forward pass: float32, bfloat16 or float16."""
    device: str = "cpu"
    """Where model and SAE run; with cuda each worker gets a GPU of its own."""
    accept_terms: bool = False
    """Consent to the terms of a model that has some."""

    def load(self, plan: FeaturePlan) -> Featurizer:
        """Model and SAE, on the device as a worker names it.

        Raises:
            UserError: see ``load_model`` and ``load_sae``.
        """
        device = device_in_worker(self.device) or "cpu"
        lm = load_model(
            self.model,
            dtype=getattr(torch, self.dtype),
            device=device,
            accept_terms=self.accept_terms,
        )
        return Featurizer.of(lm, load_sae(self.sae)[0].to(device), plan)


def featurize_ray(
    out: str | os.PathLike[str],
    spec: FeaturizerSpec,
    rows: Iterable[TextRow],
    plan: FeaturePlan,
    *,
    address: str | None = None,
    num_workers: int | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> SparseFeatures:
    """As ``featurize_to``, by the workers of a Ray cluster; the same features to the bit.

    Shards that are there are kept, whichever engine made them, so a killed call is repeated. A
    worker that dies is replaced, and its shard made again, up to ``MAX_TRIES`` times.

    Args:
        out: as in ``featurize_to``, on a disk that all workers and this process share.
        spec: what the workers load; its folder, the model and the files of ``rows`` must be where
            the workers find them.
        rows: can be read again and again in one order, e.g. a ``TextSource``.
        address: see ``run_shards``.
        num_workers: see ``run_shards``.
        threads: of each worker; None takes as many as torch has in this process, on which the
            last bits of a code may depend.
        progress: called with the rows of each finished shard, kept ones included.
    Raises:
        UserError: what ``featurize_to`` refuses; a worker that fails or keeps dying; more workers
            than the cluster has room for. MissingExtraError: Ray is not installed.
    """
    ray = import_ray(address)
    if iter(rows) is rows:
        raise UserError(
            "Expected rows that every worker can read again (a TextSource or a list), got an "
            f"iterator of type {type(rows).__name__}."
        )
    table = RowTable()
    for _ in table.record(rows):
        pass
    sae_hash = load_sae(spec.sae)[0].hash()
    with unfinished(out, plan.identity(spec.model, spec.dtype, spec.device, sae_hash)) as folder:
        job = ShardJob(
            load=partial(spec.load, plan),
            write=partial(_write, folder),
            source=rows,
            shard_rows=plan.shard_rows,
            folder=partial_folder(out),
            threads=threads or torch.get_num_threads(),
            is_cuda=is_cuda(spec.device),
        )
        n_shards = -(-len(table.row_id) // plan.shard_rows)
        if n_shards:
            run_shards(
                ray, job, n_shards, address=address, num_workers=num_workers, progress=progress
            )
        return join_shards(folder, table, plan, out)


def _write(folder: Path, maker: Featurizer, rows: list[TextRow], number: int) -> None:
    maker.write(folder, rows, number)
