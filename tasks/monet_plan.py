"""What ``sae-apps monet`` is to do: documents with domains, split in two, and the model."""

import hashlib
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_core.errors import UserError
from sae_core.models import load_model
from sae_core.monet.masks import router_layers
from sae_core.records import read_records
from sae_core.text import is_held_out
from sae_core.weights import refuse_misspelt

from .common import plain, to_json

if TYPE_CHECKING:
    from sae_core.models import LanguageModel

    from .monet import MonetOptions


@dataclass(frozen=True)
class Documents:
    """Texts with a domain, and a score where there is one."""

    texts: list[str]
    labels: list[str]
    scores: list[float]


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be done; the model is opened only where it is needed."""

    chosen: "MonetOptions"
    to_choose: Documents
    """What experts are chosen on."""
    to_judge: Documents
    """What perplexities are measured on."""
    out: Path
    identity: dict[str, Any]
    """All that the result depends on, but the model's weights."""

    @cached_property
    def lm(self) -> "LanguageModel":
        """The model; refused unless it is a Monet."""
        lm = load_model(str(self.chosen.model), device=self.chosen.device)
        router_layers(lm.model)
        return lm


def make_plan(chosen: "MonetOptions") -> Plan:
    """Read the documents and split them.

    Raises:
        UserError: anything that is missing or does not fit, before the model is read.
    """
    for name, what in (("model", "a Monet model"), ("data", "a file of documents"),
                       ("out", "a folder for the result")):  # fmt: skip
        if not getattr(chosen, name):
            raise UserError(f"Expected {what}, got none: add --{name}.")
    refuse_misspelt(str(chosen.model))
    path = Path(str(chosen.data))
    if not path.is_file():
        raise UserError(f"Expected a file of documents at {path}, got nothing.")
    documents = _read(path, chosen)
    held = np.array([is_held_out(i, chosen.eval_frac, chosen.seed)
                     for i in range(len(documents.texts))])  # fmt: skip
    parts = [_part(documents, np.flatnonzero(held == side)) for side in (False, True)]
    for part, what in zip(parts, ("choose experts on", "measure perplexities on"), strict=True):
        if missing := sorted(set(documents.labels) - set(part.labels)):
            raise UserError(
                f"Expected documents of every domain to {what}, got none of {missing[0]}: give "
                "more documents or another --seed."
            )
    skipped = ("out", "overwrite", "data", "device")
    identity = {name: v for name, v in asdict(chosen).items() if name not in skipped}
    identity["documents"] = hashlib.sha256(
        to_json([documents.texts, documents.labels, documents.scores]).encode()
    ).hexdigest()
    return Plan(chosen, parts[0], parts[1], Path(str(chosen.out)), plain(identity))


def _read(path: Path, chosen: "MonetOptions") -> Documents:
    texts, labels, scores = [], [], []
    columns = [chosen.text, chosen.label, *([chosen.score] if chosen.score else [])]
    for place, record in read_records(path):
        for name in columns:
            if record.get(name) is None:
                known = ", ".join(record) or "none"
                raise UserError(f"{place}: expected the column {name!r}, got {known}.")
        if not (text := str(record[chosen.text])).strip():
            raise UserError(f"{place}: expected a text that is not empty, got {text!r}.")
        texts.append(text)
        labels.append(str(record[chosen.label]))
        if chosen.score:
            try:
                scores.append(float(record[chosen.score]))
            except (TypeError, ValueError):
                raise UserError(
                    f"{place}: expected a number in {chosen.score!r}, got {record[chosen.score]!r}."
                ) from None
    names = sorted(set(labels))
    if len(names) < 2:
        raise UserError(
            f"Expected at least two domains in {chosen.label!r}, got {', '.join(names) or 'none'}."
        )
    if len({file_name(name) for name in names}) < len(names):
        raise UserError(f"Expected domains that differ in letters or digits, got {names}.")
    return Documents(texts, labels, scores)


def _part(documents: Documents, places: np.ndarray) -> Documents:
    return Documents(*(
        [values[i] for i in places] if values else []
        for values in (documents.texts, documents.labels, documents.scores)
    ))  # fmt: skip


def file_name(name: str) -> str:
    """A domain as a file name: letters, digits, dots, dashes; others become a dash."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "domain"
