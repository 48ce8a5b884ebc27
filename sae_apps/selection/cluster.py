"""The Ray Data engine: the shards of a pool, encoded by the workers of a cluster.

A shard is encoded on its own (see ``pool``), so that workers with as many threads as the local
engine, on processors of the same kind, write the same bits. How workers are started, watched and
replaced: ``sae_core.workers``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from sae_apps.selection.embed import EmbedConfig, Encoder, load_encoder
from sae_apps.selection.instructions import InstructionRow, InstructionSource
from sae_apps.selection.pool import FINISHED, SHARD_ROWS, PoolFeatures, write_pool, write_shard
from sae_core.workers import ShardJob, device_in_worker, import_ray, is_cuda, run_shards


@dataclass(frozen=True)
class EncoderSpec:
    """What a worker needs to load the encoder: names, and no weights."""

    path: str
    """Folder of the run or of the SAE, as every worker sees it."""
    model: str | None = None
    """See ``load_encoder``."""
    device: str | None = None
    """See ``load_encoder``; with cuda each worker gets a GPU of its own."""
    accept_terms: bool = False
    """Consent to the terms of a model that has some."""
    config: EmbedConfig = field(default_factory=EmbedConfig)
    """What is read and pooled."""

    def load(self) -> Encoder:
        """The encoder.

        Raises:
            UserError: see ``load_encoder``.
        """
        return load_encoder(
            self.path,
            model=self.model,
            device=self.device,
            accept_terms=self.accept_terms,
            config=self.config,
        )


def write_pool_ray(
    spec: EncoderSpec,
    source: InstructionSource,
    folder: str | Path,
    *,
    shard_rows: int = SHARD_ROWS,
    address: str | None = None,
    num_workers: int | None = None,
    threads: int | None = None,
    encoder: Encoder | None = None,
    progress: Callable[[int], None] | None = None,
) -> PoolFeatures:
    """As ``write_pool``, by the workers of a Ray cluster; the same shards to the bit.

    Shards that are there are kept, so a killed call is repeated. A worker that dies is replaced,
    and its shard made again, up to ``MAX_TRIES`` times.

    Args:
        spec: what the workers load; its folder, the model and the files of ``source`` must be
            where the workers find them.
        folder: as in ``write_pool``, on a disk that all workers and this process share.
        address: see ``run_shards``.
        num_workers: see ``run_shards``.
        threads: of each worker; None takes as many as torch has in this process, on which the
            last bits of an encoding may depend.
        encoder: what ``spec`` loads to, where this process has it already.
        progress: called with the rows of each finished shard, kept ones included.
    Raises:
        UserError: what ``write_pool`` refuses; a worker that fails or keeps dying; more workers
            than the cluster has room for. MissingExtraError: Ray is not installed.
    """
    ray = import_ray(address)
    folder = Path(folder).resolve()
    encoder = encoder or spec.load()
    write_pool(encoder, source, folder, shard_rows=shard_rows, only=())
    if not (folder / FINISHED).is_file():
        job = ShardJob(
            load=replace(spec, device=device_in_worker(spec.device)).load,
            write=partial(_write, folder, source.id),
            source=source,
            shard_rows=shard_rows,
            folder=folder,
            threads=threads or torch.get_num_threads(),
            is_cuda=is_cuda(spec.device),
        )
        n_shards = -(-sum(1 for _ in source) // shard_rows)
        run_shards(ray, job, n_shards, address=address, num_workers=num_workers, progress=progress)
    # finds every shard there, checks the row ids over all of them and calls the pool finished
    return write_pool(encoder, source, folder, shard_rows=shard_rows)


def _write(
    folder: Path, data_id: str, encoder: Encoder, rows: list[InstructionRow], number: int
) -> None:
    write_shard(encoder, rows, folder, number, data_id)
