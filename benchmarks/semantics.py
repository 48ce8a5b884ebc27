"""Semantic consistency: do the tokens on which a latent fires carry the same label?

    share_j = max_c #{i in A_j : label_i = c} / #A_j

A_j are the items on which latent j is active, or the `top` strongest of them; the share is averaged
over the latents active on at least n_min items. The measure of "Non-negative Contrastive Learning"
(ICLR 2024; code PKU-ML/non_neg, solo/methods/simclr.py), there with images and classes. Beside it
always stands what the same latents reach when the labels are permuted over the items (`control`):
one frequent label alone gives a share above 1 / n_labels. `excess` is share - control.

Two labelled texts, harvested once into the cache folder:

    pos      English Web Treebank of Universal Dependencies: items are tokens, the label is the
             part of speech (UPOS) of the token's word; a token that touches words of two labels is
             left out, and so is the first token of a sentence (HarvestConfig.include_first)
    emotion  GoEmotions: items are comments with exactly one emotion (those marked neutral are left
             out), a latent's activation is its maximum over the comment's tokens
"""

import gzip
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.common import ROOT
from sae_core.download import sha256_file
from sae_core.errors import UserError
from sae_core.metrics import evaluating
from sae_core.models import LanguageModel
from sae_core.pooling import RowPooler
from sae_core.sae import SAE
from sae_core.shards import ShardedActivations, harvest_shards
from sae_core.text import TextRow, TextSource
from sae_core.tokens import HarvestConfig

UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN",
    "PUNCT", "SCONJ", "SYM", "VERB", "X",
)  # fmt: skip
N_MIN = 20
# 61,807 tokens of SmolLM2 in 4,078 sentences, 5,940 comments
PARTS = {"full": ("dev", "test"), "reduced": ("dev",)}
BATCH = 8192


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


@dataclass(frozen=True, eq=False)
class SemanticConsistency:
    """Shares of the most frequent label, over the m latents active on at least n_min items."""

    latent: Int[np.ndarray, " m"]
    """The latents counted."""
    label: Int[np.ndarray, " m"]
    """Most frequent label among each latent's items."""
    share: Float[np.ndarray, " m"]
    """Its share."""
    control: Float[np.ndarray, " m"]
    """Mean share of the most frequent label under permuted labels."""
    mean_share: float
    """Mean of `share`."""
    mean_control: float
    """Mean of `control`."""
    mean_excess: float
    """mean_share - mean_control."""
    interval: tuple[float, float]
    """95% of 1,000 bootstrap means of the excess over latents (as if these were independent)."""
    base_rate: float
    """Share of the most frequent label among all items."""
    n_items: int
    """Labelled items."""
    n_min: int
    """Items that a latent must be active on."""
    top: int | None
    """Strongest items counted a latent; None: all on which it is active."""


def semantic_consistency(
    sae: SAE,
    labelled: Labelled,
    *,
    n_min: int = N_MIN,
    top: int | None = None,
    seed: int = 0,
) -> SemanticConsistency:
    """Encode a labelled text and measure its latents; see `label_consistency`.

    Raises:
        UserError: the SAE's d_in is not that of the text, or no latent is active often enough.
    """
    acts = item_activations(sae, labelled)
    return label_consistency(acts, labelled.label, n_min=n_min, top=top, seed=seed)


def item_activations(sae: SAE, labelled: Labelled) -> sparse.csr_array:
    """Activations [n_items, d_sae] of the tokens, or their maximum over each row."""
    weights, parts = sae.W_enc, []
    pooler = None if labelled.row_id is None else RowPooler(sae.d_sae, "max")
    with evaluating(sae):
        for batch in labelled.activations.iter_sequential(BATCH):
            codes = sae.encode_sparse(batch.x.to(weights.device, weights.dtype))
            if pooler is None:
                parts.append(codes.to_scipy())
            else:
                pooler.update(codes, batch.row_id, batch.position)
    if pooler is None or labelled.row_id is None:
        return sparse.csr_array(sparse.vstack(parts, format="csr"))
    return pooler.compute(labelled.row_id)[0]


def label_consistency(
    acts: sparse.csr_array,
    label: Int[np.ndarray, " n_items"],
    *,
    n_min: int = N_MIN,
    top: int | None = None,
    n_permutations: int = 10,
    seed: int = 0,
) -> SemanticConsistency:
    """Share of the most frequent label among the items of each latent, and its control.

    Args:
        acts: [n_items, d_sae], stored entries are the active ones.
        label: label of each item, -1 for none.
        n_min: labelled items that a latent must be active on to count.
        top: count only so many items a latent, the most active ones.
        n_permutations: of the labels over the labelled items, for the control.
        seed: of the permutations and the bootstrap.

    Raises:
        UserError: lengths differ, sizes below 1, or no latent is active on n_min items.
    """
    n_items, d_sae = acts.shape  # pyright: ignore[reportGeneralTypeIssues]
    if len(label) != n_items or n_min < 1 or n_permutations < 1 or (top is not None and top < 1):
        raise UserError(
            f"Expected one label for each of {n_items} items and n_min, top and n_permutations of "
            f"at least 1, got {len(label)} labels and {n_min}, {top} and {n_permutations}."
        )
    item, latent = _counted(sparse.csr_array(acts[label >= 0]), n_min, top)
    if not len(latent):
        raise UserError(f"Expected a latent active on at least {n_min} items, got none.")
    label = label[label >= 0]
    alive = np.unique(latent)
    column = np.searchsorted(alive, latent)
    counts = _label_counts(item, column, label, len(alive))
    rng = np.random.default_rng(seed)
    control = np.zeros(len(alive))
    for _ in range(n_permutations):
        shuffled = _label_counts(item, column, rng.permutation(label), len(alive))
        control += shuffled.max(1) / shuffled.sum(1) / n_permutations
    share = counts.max(1) / counts.sum(1)
    return SemanticConsistency(
        latent=alive, label=counts.argmax(1), share=share, control=control,
        mean_share=float(share.mean()), mean_control=float(control.mean()),
        mean_excess=float((share - control).mean()),
        interval=bootstrap_interval(share - control, rng),
        base_rate=float(np.bincount(label).max() / len(label)),
        n_items=len(label), n_min=n_min, top=top,
    )  # fmt: skip


def bootstrap_interval(
    values: Float[np.ndarray, " m"], rng: np.random.Generator, n_resamples: int = 1000
) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the mean over values drawn with replacement."""
    drawn = rng.integers(len(values), size=(n_resamples, len(values)), dtype=np.int32)
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _counted(
    acts: sparse.csr_array, n_min: int, top: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(item, latent) of the entries that count, by latent."""
    by_latent = acts.tocsc()
    by_latent.sort_indices()
    n_active = np.diff(by_latent.indptr)
    latent = np.repeat(np.arange(len(n_active)), n_active)
    keep = (n_active >= n_min)[latent]
    if top is not None:
        order = np.lexsort((np.negative(by_latent.data), latent))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - by_latent.indptr[latent[order]]
        keep &= rank < top
    return by_latent.indices[keep].astype(np.int64), latent[keep]


def _label_counts(
    item: NDArray[np.int64], column: NDArray[np.int64], label: NDArray[np.int64], n_columns: int
) -> NDArray[np.int64]:
    """Entries by column and label, [n_columns, n_labels]."""
    n_labels = int(label.max()) + 1
    flat = np.bincount(column * n_labels + label[item], minlength=n_columns * n_labels)
    return flat.reshape(n_columns, n_labels)


# ---- labelled texts ----


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
