"""Pools and targets by name: a local file or a dataset of the hub, with the columns to read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_core.errors import MissingExtraError, UserError

from .text import looks_like_path

if TYPE_CHECKING:
    from sae_apps.selection.instructions import InstructionRow, InstructionSource


@dataclass(frozen=True)
class PoolOptions:
    """The pool: the data to pick from."""

    source: list[str] | str | None = None
    """jsonl, json, csv, tsv, txt or parquet file, or the id of a dataset on the hub, as owner/name
    or owner/name:configuration; --pool P for short."""
    prompt: str | None = None
    """Column of the prompt, or several as a,b (null: recognised by its name)."""
    response: str | None = None
    """Column of the response (null: recognised by its name)."""
    messages: str | None = None
    """Column of chat messages."""
    template: str | None = None
    """Text with columns in braces; the response starts at {response}."""
    group: str | None = None
    """Column that names the group of a row."""
    id: str | None = None
    """Column of unique ids; integers become the row_id (null: rows are numbered)."""
    split: str = "train"
    """Split of a dataset on the hub."""


@dataclass(frozen=True)
class TargetOptions:
    """The targets: examples of what is wanted."""

    source: list[str] | str | None = None
    """As for the pool; --target T for short, several times for several targets, each of which is
    then a group (see --prototypes)."""
    prompt: str | None = None
    """As for the pool; these columns are also those of the evaluation set."""
    response: str | None = None
    """As for the pool."""
    messages: str | None = None
    """As for the pool."""
    template: str | None = None
    """As for the pool."""
    group: str | None = None
    """Column that names the group, e.g. the task of a benchmark (see --prototypes)."""
    id: str | None = None
    """As for the pool."""
    split: str = "train"
    """As for the pool."""


DataOptions = PoolOptions | TargetOptions


def names(options: DataOptions, flag: str) -> list[str]:
    """The sources asked for.

    Raises:
        UserError: none.
    """
    given = options.source
    # a list of a configuration file arrives as a tuple
    found = [given] if isinstance(given, str) else [str(one) for one in given or ()]
    if not found or not all(found):
        raise UserError(f"Expected a file or a dataset's id, got none: add {flag}.")
    return found


def is_local(spec: str) -> bool:
    """Whether reading it needs no network."""
    return Path(spec).expanduser().exists() or looks_like_path(spec)


def open_one(spec: str, options: DataOptions, *, target: bool = False) -> "InstructionSource":
    """One file or dataset.

    Raises:
        UserError: no such file or dataset, or columns that cannot be understood; see
            ``open_instructions``. MissingExtraError: a dataset without the package `datasets`.
    """
    from sae_apps.selection.instructions import open_instructions

    prompt = options.prompt
    data, name = (Path(spec), None) if is_local(spec) else _hub(spec, options.split)
    return open_instructions(
        data,
        prompt=prompt.split(",") if prompt and "," in prompt else prompt,
        response=options.response,
        messages=options.messages,
        template=options.template,
        group=options.group,
        id_column=options.id,
        target=target,
        name=name,
    )


def open_targets(options: TargetOptions) -> "InstructionSource":
    """All targets as one source; of several, each becomes a group, named by its file or dataset.

    With a group column too, the group is ``name/value``. Rows of several targets are numbered.

    Raises:
        UserError: see ``open_one``; two targets of one name.
    """
    from sae_apps.selection.instructions import source_from_rows

    specs = names(options, "--target FILE")
    sources = [open_one(spec, options, target=True) for spec in specs]
    if len(sources) == 1:
        return sources[0]
    labels = [_label(spec) for spec in specs]
    for number, label in enumerate(labels):
        if label in labels[:number]:
            raise UserError(
                f"Expected targets of different names, since each is a group, got {label!r} twice: "
                f"{specs[labels.index(label)]} and {specs[number]}."
            )

    def rows() -> "Iterator[InstructionRow]":
        for label, source in zip(labels, sources, strict=True):
            for row in source:
                yield row._replace(group=label if row.group is None else f"{label}/{row.group}")

    numbered = [row._replace(row_id=number) for number, row in enumerate(rows())]
    return source_from_rows(" + ".join(source.id for source in sources), numbered)


def _label(spec: str) -> str:
    if not is_local(spec):
        return spec
    path = Path(spec)
    return Path(path.name.removesuffix(".gz")).stem


def _hub(spec: str, split: str) -> tuple[Any, str]:
    """(dataset, its identity). It is stored in the cache of `datasets`: a pool is read thrice."""
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingExtraError(
            f"Reading the dataset {spec!r} from the hub needs `datasets`: pip install datasets."
        ) from error
    name, _, configuration = spec.partition(":")
    try:
        # A fixed commit gives the same rows at every reading, whatever is pushed in between.
        commit = str(HfApi().dataset_info(name).sha)
        data = datasets.load_dataset(name, configuration or None, split=split, revision=commit)
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"Cannot open the data {spec!r}: it is no existing file, and as a dataset of the hub "
            f"with the split {split!r} it gave: {reason[0]}"
        ) from error
    return data, f"{spec}/{split}@{commit[:12]}"
