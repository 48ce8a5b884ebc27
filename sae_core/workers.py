"""Shards made by the workers of a Ray cluster: one that dies is replaced, and nothing is lost.

    shard numbers -> map over a pool of actors, each with its tools loaded once ->
    shards in one place that all workers reach

Only shard numbers travel through Ray Data: each worker reads the rows of its shard from the source
and writes the shard itself, so what is finished stays, whoever dies. Ray is imported here alone,
and when it is asked for.
"""

import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_core.disk import owner_tag, remove_stale
from sae_core.errors import UserError
from sae_core.extras import require

MAX_TRIES = 3
"""Workers that may die on one shard before the call gives up."""
_KEPT = "Finished shards are kept: the same call continues with the others."
_STORE_BYTES = 128 * 2**20  # of a cluster started here: nothing but numbers passes through it


@dataclass(frozen=True)
class ShardJob:
    """What every worker is told. It travels whole, so it holds names of weights and no weights."""

    load: Callable[[], Any]
    """Makes what ``write`` needs; called once in each worker, at its first shard."""
    write: Callable[[Any, list[Any], int], None]
    """Makes a shard of what was loaded, its rows and its number, unless it is there."""
    source: Iterable[Any]
    """The rows, which every worker can read again and again, in one order."""
    shard_rows: int
    """Rows of a shard; the last one has what is left."""
    folder: Path
    """Where the shards are written; attempts are noted beside it."""
    threads: int
    """Of each worker."""
    is_cuda: bool = False
    """Whether each worker gets a GPU of its own."""


@dataclass(frozen=True)
class _Told:
    """A job, and the folder with one file per begun and unfinished attempt at a shard."""

    job: ShardJob
    tries: Path


def is_cuda(device: str | None) -> bool:
    """Whether a device is a GPU."""
    return (device or "cpu").startswith("cuda")


def device_in_worker(device: str | None) -> str | None:
    """The device as a worker names it: Ray shows it one GPU only."""
    return "cuda" if is_cuda(device) else device


def run_shards(
    ray: Any,
    job: ShardJob,
    n_shards: int,
    *,
    address: str | None = None,
    num_workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Make the shards 0 to ``n_shards - 1``. A worker that dies is replaced, and its shard made
    again, up to ``MAX_TRIES`` times.

    Args:
        ray: from ``import_ray``.
        address: of a running cluster, e.g. ``auto``; None uses the Ray of this process if there
            is one, else the cluster that RAY_ADDRESS names, else starts one on this machine, on
            its loopback interface, and stops it at the end.
        num_workers: None takes as many as the cluster has processors (or GPUs) for.
        progress: called with the rows of each finished shard, kept ones included.
    Raises:
        UserError: a worker that fails or keeps dying; more workers than the cluster has room for.
    """
    remove_stale(job.folder)
    tries = job.folder.with_name(f".{job.folder.name}.{owner_tag('tmp')}")
    tries.mkdir()
    try:
        with _cluster(ray, address):
            n_workers = _room(ray, num_workers, job.threads, n_shards, job.is_cuda)
            # closed at once where a signal comes, so that the workers end with this call
            with closing(_results(ray, _Told(job, tries), n_shards, n_workers)) as results:
                for n_rows in results:
                    if progress is not None:
                        progress(n_rows)
    finally:
        shutil.rmtree(tries, ignore_errors=True)


class _ShardWriter:
    """A worker: loads its tools at its first shard, and makes one shard a call.

    It raises nothing: an error becomes a record, since Ray wraps what a worker raises in pages.
    """

    def __init__(self, told: _Told) -> None:
        self._job, self._tries = told.job, told.tries
        torch.set_num_threads(self._job.threads)
        self._loaded: Any = None
        self._rows: Iterator[Any] = iter(self._job.source)
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
        died = len(list(self._tries.glob(f"{number}.*")))
        if died >= MAX_TRIES:
            raise UserError(
                f"Expected a worker to live through shard {number}, got {died} that died on it, "
                "perhaps for want of memory: take fewer workers, or smaller shards in a new folder."
            )
        attempt = self._tries / f"{number}.{died}"
        attempt.touch()
        if self._loaded is None:
            self._loaded = self._job.load()
        rows = self._take(number)
        self._job.write(self._loaded, rows, number)
        attempt.unlink()
        return len(rows)

    def _take(self, number: int) -> list[Any]:
        """The rows of a shard. Numbers mostly rise, so one pass over the source serves many."""
        start = number * self._job.shard_rows
        if start < self._at:
            self._rows, self._at = iter(self._job.source), 0
        rows = list(islice(self._rows, start - self._at, start - self._at + self._job.shard_rows))
        self._at = start + len(rows)
        return rows


def _results(ray: Any, told: _Told, n_shards: int, n_workers: int) -> Generator[int, None, None]:
    """Rows of the shards, as they are finished."""
    numbers = ray.data.from_items(list(range(n_shards)), override_num_blocks=n_shards)
    done = numbers.map_batches(
        _ShardWriter,
        fn_constructor_kwargs={"told": told},
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=n_workers),
        num_cpus=told.job.threads,
        num_gpus=1 if told.job.is_cuda else None,
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


def import_ray(address: str | None) -> Any:
    """Ray, made to use the loopback interface where it will start a cluster of its own.

    Elsewhere its servers listen on every interface of the machine. The name speaks of other
    systems, where this is Ray's default; it is read when Ray is first imported.

    Raises:
        MissingExtraError: Ray is not installed.
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
