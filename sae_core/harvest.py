"""Activations of a text to folders of shards, resumable after a kill (see shards.py).

A shard ends where a window of text ends: a run that was killed starts again behind the last line of
the journal and writes the same bytes. One pass of the model serves several folders (a hook point
each), and several processes may share its forward passes (dealer.py).
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from sae_core.activations import harvest_batches
from sae_core.dealer import Dealer
from sae_core.disk import disk_errors
from sae_core.errors import UserError
from sae_core.models import LanguageModel
from sae_core.shard_file import DTYPES
from sae_core.shard_folder import MANIFEST, Journal
from sae_core.shard_writer import check_enough, harvest_settings, write_shards
from sae_core.shards import ShardedActivations
from sae_core.text import TextRow
from sae_core.tokens import START, Cursor, HarvestConfig


class Place(NamedTuple):
    """Where a harvest goes on."""

    start: Cursor
    """In the text."""
    left: int | None
    """Tokens that are still wanted; None: all there are."""


@dataclass(frozen=True)
class Harvest:
    """A harvest that is checked, and not begun or not finished."""

    lm: LanguageModel
    rows: Iterable[TextRow]
    folders: Mapping[Path, list[str]]
    """Hook points of each folder."""
    journals: list[Journal]
    """Of the folders that are not complete; they differ in their hook points alone."""
    config: HarvestConfig
    prefetch: int

    @property
    def names(self) -> list[str]:
        """Hook points of the folders that are not complete."""
        return [name for journal in self.journals for name in journal.settings["hook_points"]]

    @property
    def _behind(self) -> Journal:
        """Of the folder with the fewest shards: a kill may have left others one ahead."""
        return min(self.journals, key=lambda journal: len(journal.shards))

    @property
    def _n_done(self) -> int:
        return sum(shard.tokens for shard in self._behind.shards)

    @property
    def place(self) -> Place | None:
        """What is left of it, from the folder with the fewest shards on; None: nothing."""
        if not self.journals:
            return None
        shards, wanted = self._behind.shards, self.config.max_tokens
        start = Cursor(shards[-1].rows, shards[-1].chunks) if shards else START
        return Place(start, None if wanted is None else wanted - self._n_done)

    def write(
        self, progress: Callable[[int], None] | None = None, dealer: Dealer | None = None
    ) -> dict[str, ShardedActivations]:
        """Bring the folders to their end, in one pass; see ``harvest_shards``.

        Args:
            dealer: the other processes, each in ``help_harvest``, run their share of the passes.
        """
        if (place := self.place) is not None:
            with disk_errors(self._behind.folder):
                if place.left != 0:
                    self._write(place, progress or (lambda _: None), dealer)
                for journal in self.journals:
                    journal.finish()
        return {
            name: ShardedActivations.open(folder, name)
            for folder, names in self.folders.items()
            for name in names
        }

    def _write(self, place: Place, progress: Callable[[int], None], dealer: Dealer | None) -> None:
        batches = harvest_batches(
            self.lm, self.rows, self.names, replace(self.config, max_tokens=place.left),
            start=place.start, prefetch=self.prefetch, dealer=dealer,
            dtype=DTYPES[self._behind.settings["dtype"]],
        )  # fmt: skip
        number, n_done = len(self._behind.shards), self._n_done
        for journal in self.journals:
            journal.start()
        with closing(batches):
            write_shards(batches, self.journals, number, n_done, progress)


def open_harvest(
    lm: LanguageModel,
    rows: Iterable[TextRow],
    folders: Mapping[Path, Sequence[str]],
    config: HarvestConfig,
    *,
    dtype: str = "float32",
    shard_tokens: int = 65536,
    data_id: str | None = None,
    prefetch: int = 2,
) -> Harvest:
    """Check a harvest and read what is there of it; writes nothing.

    Args:
        folders: the hook points that go into each folder.

    The other arguments, and what is raised: see ``harvest_shards``.
    """
    wanted = {folder: list(dict.fromkeys(names)) for folder, names in folders.items()}
    journals = []
    for folder, names in wanted.items():
        settings = harvest_settings(lm, rows, names, config, dtype, shard_tokens, data_id)
        with disk_errors(folder):
            journal = Journal.open(folder, settings)
        if not (folder / MANIFEST).exists():
            journals.append(journal)
    found = Harvest(lm, rows, wanted, journals, config, prefetch)
    if found.place is not None and found.place.start == START:
        check_enough(lm, rows, config, journals[0].settings["data_id"])
    return found


def help_harvest(
    lm: LanguageModel,
    rows: Iterable[TextRow],
    hook_points: Sequence[str],
    config: HarvestConfig,
    place: Place | None,
    *,
    dtype: str = "float32",
) -> None:
    """Run this process's share of the forward passes of a harvest that the first one writes.

    Args:
        hook_points: the ``names`` of the first process's ``Harvest``.
        place: likewise; the rest as there.
    """
    if place is None or place.left == 0:
        return
    dealer = Dealer()
    batches = harvest_batches(
        lm, rows, hook_points, replace(config, max_tokens=place.left),
        start=place.start, dtype=DTYPES[dtype], dealer=dealer,
    )  # fmt: skip
    for _ in batches:
        pass
    dealer.finish()


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
) -> dict[str, ShardedActivations]:
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
    return open_harvest(
        lm, rows, {Path(folder): hook_points}, config,
        dtype=dtype, shard_tokens=shard_tokens, data_id=data_id, prefetch=prefetch,
    ).write(progress)  # fmt: skip


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
) -> dict[str, ShardedActivations]:
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
    return open_harvest(
        lm, rows, {folder: [name] for name, folder in paths.items()}, config,
        dtype=dtype, shard_tokens=shard_tokens, data_id=data_id, prefetch=prefetch,
    ).write(progress)  # fmt: skip
