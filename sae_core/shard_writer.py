"""What a folder of shards says of itself, and its shards out of a stream of activations."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from sae_core.activations import Activations
from sae_core.errors import UserError
from sae_core.models import LanguageModel
from sae_core.shard_file import DTYPES
from sae_core.shard_folder import Journal
from sae_core.text import TextRow
from sae_core.tokens import Cursor, HarvestConfig, count_tokens, too_few_tokens


def harvest_settings(
    lm: LanguageModel,
    rows: Iterable[TextRow],
    hook_points: list[str],
    config: HarvestConfig,
    dtype: str,
    shard_tokens: int,
    data_id: str | None,
) -> dict[str, Any]:
    """What a folder of shards says of itself; see ``harvest_shards``.

    Raises:
        UserError: a setting that cannot be, or rows that can be read only once.
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
        raise UserError("A harvest needs data_id, as these rows carry no id of their own.")
    return {
        "model_id": lm.model_id,
        "revision": lm.revision,
        "model_dtype": str(lm.model.dtype).removeprefix("torch."),
        "data_id": data_id,
        "hook_points": hook_points,
        "dtype": dtype,
        "shard_tokens": shard_tokens,
        **asdict(config),
    }


def check_enough(
    lm: LanguageModel, rows: Iterable[TextRow], config: HarvestConfig, data_id: str
) -> None:
    """Too little text is known before the first forward pass, not after hours of them."""
    wanted = config.max_tokens or 1
    available = count_tokens(lm.tokenizer, rows, config, wanted)
    if not available:
        raise UserError(f"The text {data_id!r} has no token to keep.")
    if available < wanted:
        raise too_few_tokens(wanted, available)


def write_shards(
    batches: Iterator[tuple[dict[str, Activations], Cursor | None]],
    journals: Sequence[Journal],
    number: int,
    done: int,
    progress: Callable[[int], None],
) -> None:
    """Write the shards from ``number`` on, each into every folder that lacks it."""
    parts: list[dict[str, Activations]] = []
    size = 0
    end: Cursor | None = None
    for values, end in batches:
        parts.append({name: _on_cpu(item) for name, item in values.items()})
        size += len(next(iter(values.values())))
        progress(done + size)
        if end is not None and size >= journals[0].settings["shard_tokens"]:
            _add(journals, number, parts, end)
            number, done, parts, size = number + 1, done + size, [], 0
    if parts and end is not None:
        _add(journals, number, parts, end)


def _add(
    journals: Sequence[Journal], number: int, parts: list[dict[str, Activations]], end: Cursor
) -> None:
    for journal in journals:
        if len(journal.shards) == number:
            names = journal.settings["hook_points"]
            journal.add([{name: part[name] for name in names} for part in parts], end)


def _on_cpu(item: Activations) -> Activations:
    return item if item.x.device.type == "cpu" else replace(item, x=item.x.cpu())
