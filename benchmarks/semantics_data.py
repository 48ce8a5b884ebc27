"""Labelled texts for the semantic consistency of latents: parts of speech and emotions."""

import gzip
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from benchmarks.common import ROOT
from sae_core.download import sha256_file
from sae_core.errors import UserError
from sae_core.harvest import harvest_shards
from sae_core.models import LanguageModel
from sae_core.shards import ShardedActivations
from sae_core.text import TextRow, TextSource
from sae_core.tokens import HarvestConfig

BATCH = 8192

UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN",
    "PUNCT", "SCONJ", "SYM", "VERB", "X",
)  # fmt: skip
N_MIN = 20
# 61,807 tokens of SmolLM2 in 4,078 sentences, 5,940 comments
PARTS = {"full": ("dev", "test"), "reduced": ("dev",)}


@dataclass(frozen=True, eq=False)
class Labelled:
    """Stored activations of a labelled text."""

    name: str
    """pos or emotion."""
    names: tuple[str, ...]
    """Label names; a label is an index into them."""
    activations: ShardedActivations
    """Activations of the tokens."""
    label: Int[np.ndarray, " n_items"]
    """Label of each stored token in stored order, or of each row; -1: none, left out."""
    row_id: Int[np.ndarray, " n_items"] | None = None
    """Rows that are the items; None: the tokens are."""


def shared_data() -> Path:
    """The folder of labelled texts: ../shared/data beside the repository, or as told.

    Raises:
        UserError: there is none.
    """
    told = os.environ.get("SAE_APPS_SHARED_DATA")
    folder = Path(told) if told else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        raise UserError(
            f"Expected the labelled texts in {folder}, got no such folder: "
            "set SAE_APPS_SHARED_DATA to the folder that holds ud_english_ewt and goemotions."
        )
    return folder


class Sentence(NamedTuple):
    """A text and the stretches of it that are words of one part of speech."""

    text: str
    spans: tuple[tuple[int, int, int], ...]
    """(first character, one behind the last, UPOS index) in the order of the text."""


def read_conllu(path: Path) -> Iterator[Sentence]:
    """Sentences of a CoNLL-U file (gzipped) with the place of each word in the raw text.

    The words of a contraction (`don't` = do + n't) get their own stretches where their forms make
    up its surface; otherwise the contraction has none.

    Raises:
        UserError: a word is not where the text should have it, or has no known part of speech.
    """
    text, words = "", []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("# text = "):
                text = line.removeprefix("# text = ").rstrip("\n")
            elif line.strip() and not line.startswith("#"):
                words.append(line.rstrip("\n").split("\t"))
            elif not line.strip() and words:
                yield Sentence(text, tuple(_spans(text, words, path.name)))
                text, words = "", []
    if words:
        yield Sentence(text, tuple(_spans(text, words, path.name)))


def _spans(text: str, words: list[list[str]], file: str) -> Iterator[tuple[int, int, int]]:
    """Walk the words along the text; ids are 7, 7-8 (a contraction) or 7.1 (not in the text)."""
    at = inside_until = 0
    parts_fit = True
    forms = {word[0]: word[1] for word in words}
    for word_id, form, _, upos, *_ in words:
        if "." in word_id:
            continue
        if "-" not in word_id and int(word_id) <= inside_until:
            if parts_fit:
                yield at, at + len(form), _upos(upos, file)
                at += len(form)
            continue
        while at < len(text) and text[at].isspace():
            at += 1
        if not text.startswith(form, at):
            raise UserError(f"{file}: expected {form!r} at character {at} of {text!r}.")
        if "-" in word_id:
            first, inside_until = (int(n) for n in word_id.split("-"))
            parts = "".join(forms[str(n)] for n in range(first, inside_until + 1))
            parts_fit = parts == form
            at += 0 if parts_fit else len(form)
        else:
            yield at, at + len(form), _upos(upos, file)
            at += len(form)


def _upos(name: str, file: str) -> int:
    if name not in UPOS:
        raise UserError(f"{file}: expected a part of speech of {', '.join(UPOS)}, got {name!r}.")
    return UPOS.index(name)


def token_labels(
    offsets: Sequence[tuple[int, int]], sentence: Sentence
) -> Int[np.ndarray, " n_tokens"]:
    """UPOS of the word each token lies in; -1 where it covers none, or parts of unlike words.

    Args:
        offsets: (first character, one behind the last) of each token; space around a word that
            belongs to a token does not count.
    """
    owner = np.full(len(sentence.text), -1)
    for start, stop, upos in sentence.spans:
        owner[start:stop] = upos
    solid = np.array([not char.isspace() for char in sentence.text], dtype=bool)
    labels = np.full(len(offsets), -1)
    for number, (start, stop) in enumerate(offsets):
        found = np.unique(owner[start:stop][solid[start:stop]])
        if len(found) == 1:
            labels[number] = found[0]
    return labels


def source(name: str, files: Sequence[Path], texts: Sequence[str]) -> TextSource:
    """Rows numbered from 0, under an id that changes with the files."""
    rows = [TextRow(number, text, {}) for number, text in enumerate(texts)]
    return TextSource(f"{name}@{sha256_file(*files)[:12]}", lambda: iter(rows))


def prepare_pos(
    lm: LanguageModel, hook_point: str, size: str, folder: Path, n_rows: int | None = None
) -> Labelled:
    """Parts of speech by token; harvested into `folder` unless it is there.

    Args:
        n_rows: only the first sentences; None: all.
    """
    data = shared_data() / "ud_english_ewt"
    files = [data / f"en_ewt-{part}.conllu.gz" for part in PARTS[size]]
    sentences = [s for file in files for s in read_conllu(file)][:n_rows]
    texts = [s.text for s in sentences]
    rows = source(f"ud_english_ewt-{len(texts)}", files, texts)
    shards = _harvest(lm, rows, hook_point, folder)
    encoded: Any = lm.tokenizer(texts, return_offsets_mapping=True, truncation=False, verbose=False)
    pairs = zip(encoded["offset_mapping"], sentences, strict=True)
    by_row = [token_labels(offsets, sentence) for offsets, sentence in pairs]
    starts = np.cumsum([0, *(len(labels) for labels in by_row)])
    flat = np.concatenate(by_row)
    places = [starts[b.row_id.numpy()] + b.position.numpy() for b in shards.iter_sequential(BATCH)]
    return Labelled("pos", UPOS, shards, flat[np.concatenate(places)])


def read_emotions(folder: Path, part: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(text, labels) of each comment of one part of GoEmotions."""
    with gzip.open(folder / f"{part}.tsv.gz", "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            text, labels, _ = line.rstrip("\n").split("\t")
            yield text, tuple(int(label) for label in labels.split(","))


def prepare_emotion(
    lm: LanguageModel, hook_point: str, size: str, folder: Path, n_rows: int | None = None
) -> Labelled:
    """Emotions by comment; harvested into `folder` unless it is there.

    Args:
        n_rows: only the first comments; None: all.
    """
    data = shared_data() / "goemotions"
    with gzip.open(data / "labels.txt.gz", "rt", encoding="utf-8") as lines:
        names = tuple(lines.read().split())
    neutral = names.index("neutral")
    files = [data / f"{part}.tsv.gz" for part in PARTS[size]]
    comments = [row for part in PARTS[size] for row in read_emotions(data, part)]
    single = [(text, e[0]) for text, e in comments if len(e) == 1 and e[0] != neutral][:n_rows]
    texts = [text for text, _ in single]
    rows = source(f"goemotions-{len(texts)}", files, texts)
    shards = _harvest(lm, rows, hook_point, folder)
    label = np.array([emotion for _, emotion in single])
    return Labelled("emotion", names, shards, label, np.arange(len(label)))


def _harvest(
    lm: LanguageModel, rows: TextSource, hook_point: str, folder: Path
) -> ShardedActivations:
    found = harvest_shards(lm, rows, [hook_point], folder, HarvestConfig(), dtype="bfloat16")
    return found[hook_point]


def prepare_labelled(lm: LanguageModel, hook_point: str, size: str, folder: Path) -> list[Labelled]:
    """Both texts; later calls read what the first has harvested."""
    return [
        prepare_pos(lm, hook_point, size, folder / "pos"),
        prepare_emotion(lm, hook_point, size, folder / "emotion"),
    ]
