"""The Ray Data engine: the shards of a pool, encoded by the workers of a cluster.

    shard numbers -> map over a pool of actors, each with the model and the SAE loaded once ->
    folders shard-00000, shard-00001, ... in one place that all workers reach

Only shard numbers travel through Ray: each worker reads the rows of its shard from the source and
writes the shard itself. A shard is encoded on its own (see ``pool``), so that workers with as many
threads as the local engine, on processors of the same kind, write the same bits.
"""

import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_apps.selection.embed import EmbedConfig, Encoder, load_encoder
from sae_apps.selection.instructions import InstructionRow, InstructionSource
from sae_apps.selection.pool import FINISHED, SHARD_ROWS, PoolFeatures, write_pool, write_shard
from sae_core.disk import owner_tag, remove_stale
from sae_core.errors import UserError
from sae_core.extras import require

MAX_TRIES = 3
"""Workers that may die on one shard before the call gives up."""
_KEPT = "Finished shards are kept: the same call continues with the others."
_STORE_BYTES = 128 * 2**20  # of a cluster started here: nothing but numbers passes through it


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

    @property
    def is_cuda(self) -> bool:
        """Whether the encoder runs on a GPU."""
        return (self.device or "cpu").startswith("cuda")


@dataclass(frozen=True)
class _Job:
    """What every worker is told."""

    spec: EncoderSpec
    source: InstructionSource
    folder: Path
    shard_rows: int
    threads: int
    tries: Path
    """Folder with one file per begun and unfinished attempt at a shard."""


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
        address: of a running cluster, e.g. ``auto``; None uses the Ray of this process if there
            is one, else the cluster that RAY_ADDRESS names, else starts one on this machine, on
            its loopback interface, and stops it at the end.
        num_workers: None takes as many as the cluster has processors (or GPUs) for.
        threads: of each worker; None takes as many as torch has in this process, on which the
            last bits of an encoding may depend.
        encoder: what ``spec`` loads to, where this process has it already.
        progress: called with the rows of each finished shard, kept ones included.
    Raises:
        UserError: what ``write_pool`` refuses; a worker that fails or keeps dying; more workers
            than the cluster has room for. MissingExtraError: Ray is not installed.
    """
    ray = _import(address)
    folder = Path(folder).resolve()
    threads = threads or torch.get_num_threads()
    encoder = encoder or spec.load()
    write_pool(encoder, source, folder, shard_rows=shard_rows, only=())
    if not (folder / FINISHED).is_file():
        remove_stale(folder)
        n_shards = -(-sum(1 for _ in source) // shard_rows)
        tries = folder.with_name(f".{folder.name}.{owner_tag('tmp')}")
        job = _Job(spec, source, folder, shard_rows, threads, tries)
        tries.mkdir()
        try:
            with _cluster(ray, address):
                n_workers = _room(ray, num_workers, threads, n_shards, spec.is_cuda)
                # closed at once where a signal comes, so that the workers end with this call
                with closing(_results(ray, job, n_shards, n_workers)) as results:
                    for n_rows in results:
                        if progress is not None:
                            progress(n_rows)
        finally:
            shutil.rmtree(tries, ignore_errors=True)
    # finds every shard there, checks the row ids over all of them and calls the pool finished
    return write_pool(encoder, source, folder, shard_rows=shard_rows)


class _ShardWriter:
    """A worker: loads the encoder at its first shard, and writes one shard a call.

    It raises nothing: an error becomes a record, since Ray wraps what a worker raises in pages.
    """

    def __init__(self, job: _Job) -> None:
        torch.set_num_threads(job.threads)
        self._job = job
        self._encoder: Encoder | None = None
        self._rows: Iterator[InstructionRow] = iter(job.source)
        self._at = 0

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (number,) = batch["item"].tolist()
        try:
            n_rows, error = self._write(number), ""
        except UserError as refused:
            n_rows, error = 0, str(refused)
        except Exception as other:  # whatever a model or a disk raises
            n_rows, error = 0, f"A worker failed on shard {number} with {_said(other)} {_KEPT}"
        return {"n_rows": np.array([n_rows]), "error": np.array([error], dtype=object)}

    def _write(self, number: int) -> int:
        job = self._job
        died = len(list(job.tries.glob(f"{number}.*")))
        if died >= MAX_TRIES:
            raise UserError(
                f"Expected a worker to live through shard {number}, got {died} that died on it, "
                "perhaps for want of memory: take fewer workers, or smaller shards in a new folder."
            )
        attempt = job.tries / f"{number}.{died}"
        attempt.touch()
        if self._encoder is None:
            device = "cuda" if job.spec.is_cuda else job.spec.device  # Ray shows it one GPU only
            self._encoder = replace(job.spec, device=device).load()
        rows = self._take(number)
        write_shard(self._encoder, rows, job.folder, number, job.source.id)
        attempt.unlink()
        return len(rows)

    def _take(self, number: int) -> list[InstructionRow]:
        """The rows of a shard. Numbers mostly rise, so one pass over the source serves many."""
        start = number * self._job.shard_rows
        if start < self._at:
            self._rows, self._at = iter(self._job.source), 0
        rows = list(islice(self._rows, start - self._at, start - self._at + self._job.shard_rows))
        self._at = start + len(rows)
        return rows


def _results(ray: Any, job: _Job, n_shards: int, n_workers: int) -> Generator[int, None, None]:
    """Rows of the shards, as they are finished."""
    numbers = ray.data.from_items(list(range(n_shards)), override_num_blocks=n_shards)
    done = numbers.map_batches(
        _ShardWriter,
        fn_constructor_kwargs={"job": job},
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=n_workers),
        num_cpus=job.threads,
        num_gpus=1 if job.spec.is_cuda else None,
    )
    try:
        for batch in done.iter_batches(batch_size=None, prefetch_batches=0):
            for n_rows, error in zip(batch["n_rows"], batch["error"], strict=True):
                if error:
                    raise UserError(str(error))
                yield int(n_rows)
    except ray.exceptions.RayError as error:
        raise UserError(f"The Ray cluster failed with {_said(error)} {_KEPT}") from error


def _room(ray: Any, wanted: int | None, threads: int, n_shards: int, is_cuda: bool) -> int:
    """Number of workers: as asked for, or as many as fit, and no more than there are shards."""
    has = ray.cluster_resources()
    room = int(has.get("CPU", 0) // threads)
    if is_cuda:
        room = min(room, int(has.get("GPU", 0)))
    if room < (wanted or 1):
        raise UserError(
            f"Expected room for {wanted or 1} workers of {threads} threads{' and a GPU' * is_cuda} "
            f"each, got a cluster with {has.get('CPU', 0):.0f} processors and "
            f"{has.get('GPU', 0):.0f} GPUs."
        )
    if wanted is not None and wanted < 1:
        raise UserError(f"Expected at least 1 worker, got {wanted}.")
    return min(wanted or room, n_shards)


@contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start one; end what was begun here, and give back the signals.

    Ray replaces the handler of SIGTERM when it connects, and prints much by itself.
    """
    is_mine = not ray.is_initialized()
    before = signal.getsignal(signal.SIGTERM)
    log = logging.getLogger("ray.data")
    level = log.level
    try:
        if is_mine:
            _connect(ray, address)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)
        with warnings.catch_warnings():
            # its own settings warn of their own deprecation when they are first made
            warnings.simplefilter("ignore", DeprecationWarning)
            context = ray.data.DataContext.get_current()
        was_shown, context.enable_progress_bars = context.enable_progress_bars, False
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            context.enable_progress_bars = was_shown
    finally:
        log.setLevel(level)
        if is_mine:
            ray.shutdown()


def _import(address: str | None) -> Any:
    """Ray, made to use the loopback interface where it will start a cluster of its own.

    Elsewhere its servers listen on every interface of the machine. The name speaks of other
    systems, where this is Ray's default; it is read when Ray is first imported.
    """
    if not (address or os.environ.get("RAY_ADDRESS")) and "ray" not in sys.modules:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", "ray")
    require("ray.data", "ray")
    return ray


def _connect(ray: Any, address: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address or os.environ.get("RAY_ADDRESS"):
            ray.init(address=address, **quiet)
            return
        ray.init(include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        place = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise UserError(f"Expected a Ray cluster at {place}, got {_said(error)}") from error


def _said(error: BaseException) -> str:
    """Kind and first line of an error, with a full stop."""
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return f"{type(error).__name__}: {reason.rstrip('.')}."
