"""Text of five domains for small language models, and their tokenizer.

    eng, fra, deu   novels (shared data, eltec_novels); every sixth novel is held out whole
    python          Python source of the demo text
    wikipedia       English encyclopedic passages of the demo text

A document is a passage of about 1,200 characters; a held-out document is never trained on. The
tokenizer is a byte-level BPE made from the training documents, as many characters of each domain.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from benchmarks.concept_data import SHARED
from sae_apps.tasks.text import open_text
from sae_core.errors import UserError
from sae_core.text import is_held_out

DOMAINS = ("eng", "fra", "deu", "python", "wikipedia")
NOVELS = DOMAINS[:3]
PASSAGE = 1200
N_TEST = 72  # held-out documents a domain
END = "<end>"


@dataclass(frozen=True)
class Corpus:
    """Documents by domain."""

    train: dict[str, list[str]]
    test: dict[str, list[str]]


def load_corpus(chars: int) -> Corpus:
    """About ``chars`` characters a domain to train on, and N_TEST documents held out.

    Raises:
        UserError: the novels are not on this machine.
    """
    train: dict[str, list[str]] = {name: [] for name in DOMAINS}
    test: dict[str, list[str]] = {name: [] for name in DOMAINS}
    room: dict[str, int] = {name: chars for name in DOMAINS}  # noqa: C420 - typed
    for name, text, is_test in _documents():
        if is_test:
            if len(test[name]) < N_TEST:
                test[name].append(text)
        elif room[name] > 0:
            train[name].append(text)
            room[name] -= len(text)
    return Corpus(train, test)


def _documents() -> Iterator[tuple[str, str, bool]]:
    for name in NOVELS:
        file = SHARED / "eltec_novels" / f"{name}.jsonl.gz"
        if not file.is_file():
            raise UserError(
                f"Expected the novels at {file}, got nothing; set SAE_APPS_SHARED_DATA."
            )
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            novels = [_passages(json.loads(line)["text"]) for line in lines]
        # one passage of each novel in turn: a domain is many novels however little of it is read
        for place in range(max(map(len, novels))):
            for number, passages in enumerate(novels):
                if place < len(passages):
                    yield name, passages[place], number % 6 == 0
    for row in open_text("demo"):
        if row.meta["domain"] in DOMAINS:
            for passage in _passages(row.text, join=row.meta["domain"] != "python"):
                yield row.meta["domain"], passage, is_held_out(row.row_id, 1 / 6)


def _passages(text: str, join: bool = True) -> list[str]:
    """Pieces of about PASSAGE characters; prose without its line breaks, code with them."""
    text = " ".join(text.split()) if join else text.strip()
    cuts = range(0, max(1, len(text) - PASSAGE // 2), PASSAGE)
    return [text[cut : cut + PASSAGE] for cut in cuts]


def make_tokenizer(corpus: Corpus, vocab_size: int) -> Any:
    """A byte-level BPE of the training documents, as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator((t for one in corpus.train.values() for t in one[:1500]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=END, eos_token=END, pad_token=END, model_max_length=512
    )


def sequences(
    tokenizer: Any, corpus: Corpus, n_tokens: int, context: int, seed: int
) -> Int[Tensor, "s context"]:
    """Training sequences, as many of each domain, shuffled: documents joined by the end token."""
    rows = []
    for texts in corpus.train.values():
        ids = np.concatenate(
            [np.array([tokenizer.eos_token_id, *one]) for one in tokenizer(texts)["input_ids"]]
        )
        wanted = n_tokens // len(DOMAINS) // context * context
        rows.append(np.resize(ids, wanted).reshape(-1, context))
    order = np.random.default_rng(seed).permutation(sum(map(len, rows)))
    return torch.from_numpy(np.concatenate(rows)[order])


def cached(folder: Path) -> bool:
    """Whether a model lies there whole."""
    return (folder / "model.safetensors").is_file() and (folder / "training.json").is_file()
