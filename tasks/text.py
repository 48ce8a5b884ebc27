"""Text by name: the built-in ``demo`` text, a local file, or a dataset of the hub.

The demo text is made once, from three sources, and kept in the cache: Wikipedia passages and IMDB
film reviews (see ``demo_sources`` for both and their licences), and Python source, the standard
library of the running interpreter (PSF License 2.0).
"""

import ast
import hashlib
import io
import json
import logging
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sae_core.disk import disk_errors
from sae_core.download import cache_dir, scratch_folder
from sae_core.errors import MissingExtraError, UserError
from sae_core.records import FORMATS, Record, read_records
from sae_core.text import (
    TextSource,
    is_text_path,
    pick_column,
    read_text_file,
    source_from_records,
    splitmix64,
)

from .demo_sources import REVIEWS, WIKIPEDIA, Source, fetch

_LOG = logging.getLogger(__name__)
DEMO = "demo"
_DEMO_FORMAT = 1  # part of the cache's file name: raise it when the making of the text changes
_SKIPPED = {  # tests, generated tables and packages that are not the standard library
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
_BLOCK_LINES = 40
_MIN_CHARS = 80
"""Shorter pieces of source, such as a lone import, say little about their domain."""


def open_text(spec: str, *, column: str | None = None, split: str = "train") -> TextSource:
    """Open a text source by name, in this order of meaning: ``demo``, an existing file, a hub id.

    Args:
        spec: ``demo``; a jsonl, json, csv, tsv, parquet or txt file (see ``read_text_file``); or
            the id of a dataset on the hub, as ``owner/name`` or ``owner/name:configuration``.
            Write ``./demo`` for a file called demo.
        column: which column is the text; None takes ``text``, else the only string column.
        split: which split of a hub dataset.
    Returns:
        A source that streams; rows of ``demo`` have the label ``domain`` (wikipedia, reviews or
        python) and any prefix mixes the three.
    Raises:
        UserError: no such file or dataset, no such column, an empty or undecodable file, or the
            demo text cannot be downloaded.
        MissingExtraError: a hub dataset without the package `datasets`.
    """
    if spec == DEMO:
        return _demo(column)
    path = Path(spec).expanduser()
    if path.exists():
        return read_text_file(path, column=column)
    if looks_like_path(spec):
        raise UserError(
            f"File not found: {path}; expected {DEMO}, an existing file "
            f"({', '.join(FORMATS)}, also with .gz) or the id of a dataset on the hub."
        )
    return _hub_dataset(spec, column, split)


def looks_like_path(spec: str) -> bool:
    """Whether a name is meant as a path, not as a dataset of the hub."""
    return spec.startswith(("/", ".", "~")) or spec.count("/") > 1 or is_text_path(spec)


# The demo text


def _demo(column: str | None) -> TextSource:
    import pyarrow.parquet as pq

    path = demo_path()
    if not path.is_file():
        with scratch_folder(path.parent) as temp, disk_errors(path):
            make_demo(path, fetch((WIKIPEDIA, REVIEWS), temp), temp)
    read = partial(read_records, path)
    column = pick_column(read(), column, f"The text {DEMO}")
    digest = pq.read_schema(path).metadata[b"digest"].decode()
    return source_from_records(f"{DEMO}-python{platform.python_version()}@{digest}", read, column)


def demo_path() -> Path:
    """Where the demo text is kept; the name changes with everything that it is made from."""
    made_from = [_DEMO_FORMAT, WIKIPEDIA, REVIEWS, platform.python_version()]
    name = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    return cache_dir() / "text" / f"{DEMO}-{name}.parquet"


def make_demo(path: Path, found: Mapping[Source, Path], temp: Path) -> None:
    """Write the demo text as one parquet file, by rename, with a digest of its rows inside.

    Args:
        found: the files of WIKIPEDIA and REVIEWS.
        temp: scratch folder on the same disk.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with disk_errors(path):
        domains = {
            "wikipedia": passages(found[WIKIPEDIA]),
            "reviews": _film_reviews(found[REVIEWS]),
            "python": python_chunks(Path(sysconfig.get_path("stdlib"))),
        }
        rows = interleave(domains)
        _LOG.info("Built the demo text: %d rows", len(rows))
        table = pa.table({"text": [text for text, _ in rows], "domain": [one for _, one in rows]})
        digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:12]
        pq.write_table(table.replace_schema_metadata({"digest": digest}), temp / path.name)
        (temp / path.name).replace(path)


def passages(path: Path) -> list[str]:
    """Wikipedia passages of BoolQ."""
    return [record["passage"] for _, record in read_records(path)]


def _film_reviews(path: Path) -> list[str]:
    """IMDB reviews; their HTML line breaks become newlines."""
    records = (record for _, record in read_records(path))
    return [r["text"].replace("<br />", "\n") for r in records if r["source"] == "imdb"]


def interleave(domains: dict[str, Iterable[str]]) -> list[tuple[str, str]]:
    """Equally many distinct texts of each domain, shuffled, in rounds of one text of each.

    The order depends on the texts alone: each gets the key ``splitmix64(splitmix64(d) + i)``, d the
    number of its domain and i its place there. A domain's texts come in the order of their keys,
    the domains of one round in the order of the keys' hashes, so any prefix holds equal shares to
    within one text.

    Args:
        domains: name of the domain to its texts; repeated texts count once.
    Returns:
        (text, domain) pairs: the smallest domain's number of each.
    """
    keyed: list[list[tuple[int, str, str]]] = []
    for number, (domain, texts) in enumerate(domains.items()):
        base = splitmix64(number)
        distinct = enumerate(dict.fromkeys(texts))
        keyed.append(sorted((splitmix64((base + i) % 2**64), t, domain) for i, t in distinct))
    rows: list[tuple[str, str]] = []
    for one_round in zip(*keyed, strict=False):  # ends with the smallest domain
        shuffled = sorted(one_round, key=lambda row: splitmix64(row[0]))
        rows += [(text, domain) for _, text, domain in shuffled]
    return rows


def python_chunks(folder: Path) -> Iterator[str]:
    """Pieces of the Python files below a folder: functions, classes and blocks of ~40 lines.

    Files come in the order of their paths; tests, generated tables and files that do not parse as
    UTF-8 Python are left out, as are pieces of fewer than 80 characters.
    """
    for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).as_posix()):
        inside = path.relative_to(folder).parts
        # _sysconfigdata holds the paths of the machine on which the interpreter was built.
        if _SKIPPED.intersection(inside) or inside[-1].startswith("_sysconfigdata"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue
        for chunk in split_source(source, tree):
            if len(chunk) >= _MIN_CHARS:
                yield chunk


def split_source(source: str, tree: ast.Module) -> Iterator[str]:
    """Cut a module before and behind each top-level function and class, then every 40 lines.

    A decorator and the comment lines right above belong to their definition. The pieces joined
    give the module's lines back, save blank lines at the cuts.
    """
    lines = io.StringIO(source).readlines()  # str.splitlines would also cut at form feeds
    cuts = {0, len(lines)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            top = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
            while top > 0 and lines[top - 1].startswith("#"):
                top -= 1
            cuts |= {top, node.end_lineno or node.lineno}
    bounds = sorted(cuts)
    for start, end in zip(bounds, bounds[1:], strict=False):
        n_blocks = max(1, round((end - start) / _BLOCK_LINES))
        edges = [start + (end - start) * i // n_blocks for i in range(n_blocks + 1)]
        for first, last in zip(edges, edges[1:], strict=False):
            if chunk := "".join(lines[first:last]).strip("\n"):
                yield chunk


# Datasets of the hub


def _hub_dataset(spec: str, column: str | None, split: str) -> TextSource:
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingExtraError(
            f"Reading the dataset {spec!r} from the hub needs `datasets`: pip install datasets."
        ) from error
    name, _, configuration = spec.partition(":")
    where = f"{spec} ({split})"
    try:
        # A fixed commit gives the same rows at every reading, whatever is pushed in between.
        commit = HfApi().dataset_info(name).sha
        data = datasets.load_dataset(
            name, configuration or None, split=split, streaming=True, revision=commit
        )
        records = partial(_numbered, data, where)
        column = pick_column(records(), column, f"The dataset {where}")
    except UserError:
        raise
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"Cannot open the text {spec!r}: it is neither {DEMO!r} nor an existing file, and as a "
            f"dataset of the hub with the split {split!r} it gave: {reason[0]}"
        ) from error
    return source_from_records(f"{spec}/{split}@{str(commit)[:12]}", records, column)


def _numbered(data: Any, name: str) -> Iterator[tuple[str, Record]]:
    return ((f"{name} row {i}", record) for i, record in enumerate(data))
