"""Activations of a text to a folder of shards, resumable after a kill (see shards.py).

A shard ends where a window of text ends: a run that was killed starts again behind the last line of
the journal and writes the same bytes. Several processes may share the forward passes (dealer.py).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from sae_core.activations import Activations, harvest_batches
from sae_core.dealer import Dealer
from sae_core.disk import disk_errors
from sae_core.errors import UserError
from sae_core.models import LanguageModel
from sae_core.shard_file import DTYPES
from sae_core.shard_folder import MANIFEST, Journal
from sae_core.shards import ShardedActivations
from sae_core.text import TextRow
from sae_core.tokens import START, Cursor, HarvestConfig, count_tokens, too_few_tokens


class Place(NamedTuple):
    """Where a harvest goes on."""

    start: Cursor
    """In the text."""
    left: int | None
    """Tokens that are still wanted; None: all there are."""


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
        lm, rows, hook_points, folder, config, dtype=dtype, shard_tokens=shard_tokens,
        data_id=data_id, prefetch=prefetch,
    ).write(progress)  # fmt: skip


@dataclass(frozen=True)
class Harvest:
    """A harvest that is checked, and not begun or not finished."""

    lm: LanguageModel
    rows: Iterable[TextRow]
    names: list[str]
    journal: Journal
    config: HarvestConfig
    prefetch: int

    @property
    def place(self) -> Place | None:
        """What is left of it; None: nothing."""
        if (self.journal.folder / MANIFEST).exists():
            return None
        shards, wanted = self.journal.shards, self.config.max_tokens
        start = Cursor(shards[-1].rows, shards[-1].chunks) if shards else START
        return Place(start, None if wanted is None else wanted - self._n_done)

    @property
    def _n_done(self) -> int:
        return sum(shard.tokens for shard in self.journal.shards)

    def write(
        self, progress: Callable[[int], None] | None = None, dealer: Dealer | None = None
    ) -> dict[str, ShardedActivations]:
        """See ``harvest_shards``.

        Args:
            dealer: the other processes, each in ``help_harvest``, run their share of the passes.
        """
        folder = self.journal.folder
        with disk_errors(folder):
            if (place := self.place) is not None:
                self._write(place, progress or (lambda _: None), dealer)
        return {name: ShardedActivations.open(folder, name) for name in self.names}

    def _write(
        self, place: Place, progress: Callable[[int], None], dealer: Dealer | None
    ) -> None:
        journal = self.journal
        if place.left != 0:
            batches = harvest_batches(
                self.lm, self.rows, self.names, replace(self.config, max_tokens=place.left),
                start=place.start, prefetch=self.prefetch, dtype=DTYPES[journal.settings["dtype"]],
                dealer=dealer,
            )  # fmt: skip
            journal.start()
            with closing(batches):
                _write_shards(batches, self.names, journal, self._n_done, progress)
        journal.finish()


def open_harvest(
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
) -> Harvest:
    """Check a harvest and read what is there of it; writes nothing.

    Arguments and errors are those of ``harvest_shards``.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if shard_tokens < 1:
        raise UserError(f"shard_tokens must be at least 1, got {shard_tokens}.")
    if iter(rows) is rows:
        raise UserError(
            "rows must be a source that can be read again (a list or a TextSource), got an "
            f"iterator of type {type(rows).__name__}."
        )
    data_id = data_id or getattr(rows, "id", None)
    if not data_id:
        raise UserError("harvest_shards() needs data_id, as these rows carry no id of their own.")
    names = list(dict.fromkeys(hook_points))
    settings = {
        "model_id": lm.model_id,
        "revision": lm.revision,
        "model_dtype": str(lm.model.dtype).removeprefix("torch."),
        "data_id": data_id,
        "hook_points": names,
        "dtype": dtype,
        "shard_tokens": shard_tokens,
        **asdict(config),
    }
    folder = Path(folder)
    with disk_errors(folder):
        journal = Journal.open(folder, settings)
    if not journal.shards and not (folder / MANIFEST).exists():
        _check_enough(lm, rows, config, data_id)
    return Harvest(lm, rows, names, journal, config, prefetch)


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
        place: that of the first process's ``Harvest``; the rest as there.
    """
    if place is None or place.left == 0:
        return
    dealer = Dealer()
    config = replace(config, max_tokens=place.left)
    names = list(dict.fromkeys(hook_points))
    for _ in harvest_batches(
        lm, rows, names, config, start=place.start, dtype=DTYPES[dtype], dealer=dealer
    ):
        pass
    dealer.finish()


def _check_enough(
    lm: LanguageModel, rows: Iterable[TextRow], config: HarvestConfig, data_id: str
) -> None:
    """Too little text is known before the first forward pass, not after hours of them."""
    wanted = config.max_tokens or 1
    available = count_tokens(lm.tokenizer, rows, config, wanted)
    if not available:
        raise UserError(f"The text {data_id!r} has no token to keep.")
    if available < wanted:
        raise too_few_tokens(wanted, available)


def _write_shards(
    batches: Iterator[tuple[dict[str, Activations], Cursor | None]],
    names: list[str],
    journal: Journal,
    done: int,
    progress: Callable[[int], None],
) -> None:
    parts: list[dict[str, Activations]] = []
    size = 0
    end: Cursor | None = None
    for values, end in batches:
        parts.append({name: _on_cpu(values[name]) for name in names})
        size += len(parts[-1][names[0]])
        progress(done + size)
        if end is not None and size >= journal.settings["shard_tokens"]:
            journal.add(parts, end)
            done, parts, size = done + size, [], 0
    if parts and end is not None:
        journal.add(parts, end)


def _on_cpu(item: Activations) -> Activations:
    return item if item.x.device.type == "cpu" else replace(item, x=item.x.cpu())
