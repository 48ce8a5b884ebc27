"""Activations on disk: written once, resumable after a kill, read by memory map.

A folder holds ``shard-00000.safetensors`` and so on (``row_id``, ``position`` and one matrix per
hook point), ``progress.jsonl`` (the settings, then one line per finished shard) and, once complete,
``manifest.json``. A shard is renamed into place before its line is written, and ends where a window
of text ends: a run that was killed starts again behind the last line and writes the same bytes.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from sae_core.activations import Activations
from sae_core.disk import disk_errors
from sae_core.errors import CorruptFileError, UserError
from sae_core.models import LanguageModel
from sae_core.shard_file import DTYPES, check_digest, check_size, map_shard
from sae_core.shard_folder import MANIFEST, Journal, read_manifest
from sae_core.shard_writer import harvest_settings, write_all
from sae_core.text import TextRow
from sae_core.tokens import HarvestConfig


def harvest_shards(
    lm: LanguageModel,
    rows: Iterable[TextRow],
    hook_points: Sequence[str],
    folder: str | os.PathLike[str],
    config: HarvestConfig,
    *,
    dtype: str = "float32",
    shard_tokens: int = 65536,
    data_id: str | None = None,
    prefetch: int = 2,
    progress: Callable[[int], None] | None = None,
) -> dict[str, "ShardedActivations"]:
    """Write the activations of a text to a folder; complete, resumed or fresh, the bytes are equal.

    Args:
        lm: model and tokenizer.
        rows: text that can be iterated again, e.g. a ``TextSource`` or a list.
        hook_points: see ``resolve_hook_point``.
        folder: new, empty, or holding the same harvest in part or whole; one writer at a time.
        config: chunks, batches, which tokens are kept.
        dtype: ``float32``, ``bfloat16`` or ``float16`` on disk.
        shard_tokens: a shard ends with the first window that brings it to so many tokens; about
            ``shard_tokens * d_in * len(hook_points)`` numbers are held in memory.
        data_id: names the text; None takes ``rows.id``.
        prefetch: windows tokenised ahead.
        progress: called with the number of tokens so far, those of an earlier run included.

    Returns:
        The stored activations by hook point.

    Raises:
        UserError: the folder holds something else (the message says which setting differs), fewer
            tokens than ``config.max_tokens`` (nothing is written), NaN or inf, a full disk.
        CorruptFileError: a finished shard is gone or has another size.
    """
    names = list(dict.fromkeys(hook_points))
    settings = harvest_settings(lm, rows, names, config, dtype, shard_tokens, data_id)
    folder = Path(folder)
    with disk_errors(folder):
        journal = Journal.open(folder, settings)
        if not (folder / MANIFEST).exists():
            write_all(lm, rows, [journal], config, prefetch, progress or (lambda _: None))
    return {name: ShardedActivations.open(folder, name) for name in names}


def harvest_each(
    lm: LanguageModel,
    rows: Iterable[TextRow],
    folders: Mapping[str, str | os.PathLike[str]],
    config: HarvestConfig,
    *,
    dtype: str = "float32",
    shard_tokens: int = 65536,
    data_id: str | None = None,
    prefetch: int = 2,
    progress: Callable[[int], None] | None = None,
) -> dict[str, "ShardedActivations"]:
    """One folder for each hook point, out of one pass of the model behind the deepest of them.

    Every folder is the one that ``harvest_shards`` writes for its hook point alone, byte for byte.
    Folders that are complete cost nothing; a pass that was killed, or that has hook points more
    than the last, goes on behind the last shard that all unfinished folders have.

    Args:
        folders: where each hook point goes; new, empty, or holding its harvest in part or whole.

    The other arguments, what is returned and what is raised: see ``harvest_shards``.
    """
    paths = {name: Path(folder) for name, folder in folders.items()}
    if not paths or len(set(paths.values())) < len(paths):
        raise UserError(
            "Expected at least one hook point, each with a folder of its own, got "
            f"{ {name: str(path) for name, path in paths.items()} }."
        )
    journals = []
    for name, folder in paths.items():
        settings = harvest_settings(lm, rows, [name], config, dtype, shard_tokens, data_id)
        with disk_errors(folder):
            journal = Journal.open(folder, settings)
        if not (folder / MANIFEST).exists():
            journals.append(journal)
    if journals:
        with disk_errors(journals[0].folder):
            write_all(lm, rows, journals, config, prefetch, progress or (lambda _: None))
    return {name: ShardedActivations.open(folder, name) for name, folder in paths.items()}


@dataclass(frozen=True, eq=False)
class ShardedActivations:
    """Stored activations of one hook point, read by memory map: only the pages asked for."""

    folder: Path
    hook_point: str
    n_tokens: int
    d_in: int
    dtype: torch.dtype
    hook_points: tuple[str, ...]
    """All hook points in the folder."""
    manifest: dict[str, Any]
    """The settings, versions and shards (file, tokens, bytes, sha256) as stored."""
    starts: NDArray[np.int64]
    """First token of each shard, and the number of tokens at the end."""
    maps: tuple[tuple[np.memmap, np.memmap, np.memmap], ...]
    """x (as 16-bit integers for bfloat16), row_id and position of each shard."""

    @staticmethod
    def open(
        folder: str | os.PathLike[str], hook_point: str, *, verify: bool = False
    ) -> "ShardedActivations":
        """Open a complete folder.

        Args:
            folder: as written by ``harvest_shards``.
            hook_point: one of those in the folder.
            verify: read every shard once and compare its sha256.

        Raises:
            UserError: no such folder or hook point, or the harvest is not finished.
            CorruptFileError: the manifest or a shard is not what was written; names the file.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        settings, shards = manifest["settings"], manifest["shards"]
        if hook_point not in settings["hook_points"]:
            raise UserError(
                f"{folder} holds the hook points {', '.join(settings['hook_points'])}, "
                f"got {hook_point!r}."
            )
        maps = []
        for shard in shards:
            check_size(folder, shard)
            if verify:
                check_digest(folder, shard)
            maps.append(map_shard(folder / shard.file, shard.tokens, hook_point, settings["dtype"]))
            if (width := maps[-1][0].shape[1]) != (d_in := maps[0][0].shape[1]):
                raise CorruptFileError(
                    f"{folder / shard.file}: expected tokens of width {d_in} as in the first "
                    f"shard, got {width}."
                )
        stored = manifest | {"shards": [asdict(shard) for shard in shards]}
        starts = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)
        return ShardedActivations(
            folder=folder,
            hook_point=hook_point,
            n_tokens=int(starts[-1]),
            d_in=maps[0][0].shape[1],
            dtype=DTYPES[settings["dtype"]],
            hook_points=tuple(settings["hook_points"]),
            manifest=stored,
            starts=starts,
            maps=tuple(maps),
        )

    def __len__(self) -> int:
        return self.n_tokens

    def gather(self, indices: Int64[Tensor, " n"]) -> Activations:
        """The tokens at ``indices`` (repeats allowed), in that order; shards are read in order.

        Raises:
            UserError: an index is outside 0 .. n_tokens - 1.
        """
        wanted = indices.numpy()
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.n_tokens):
            raise UserError(
                f"Token indices must be in 0..{self.n_tokens - 1}, "
                f"got {wanted.min()}..{wanted.max()}."
            )
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
        bounds = np.searchsorted(ascending, self.starts)
        x = np.empty((wanted.size, self.d_in), dtype=self.maps[0][0].dtype)
        row_id = np.empty(wanted.size, dtype=np.int64)
        position = np.empty(wanted.size, dtype=np.int32)
        for shard in np.flatnonzero(np.diff(bounds)):
            part = slice(bounds[shard], bounds[shard + 1])
            local = ascending[part] - self.starts[shard]
            for out, stored in zip((x, row_id, position), self.maps[shard], strict=True):
                out[order[part]] = stored[local]
        return self._wrap(x, row_id, position)

    def iter_sequential(self, batch_size: int) -> Iterator[Activations]:
        """All tokens in stored order; the last batch may be smaller."""
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        for first in range(0, self.n_tokens, batch_size):
            yield self.gather(torch.arange(first, min(first + batch_size, self.n_tokens)))

    def _wrap(
        self, x: NDArray[Any], row_id: NDArray[np.int64], position: NDArray[np.int32]
    ) -> Activations:
        values = torch.from_numpy(x)
        if self.dtype == torch.bfloat16:
            values = values.view(torch.bfloat16)
        return Activations(values, torch.from_numpy(row_id), torch.from_numpy(position))
