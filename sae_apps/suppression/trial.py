"""What suppression of a concept is judged on: texts, pairs, neutral text, other concepts.

pairs: texts with and without the concept of one document;   others: one label against the rest
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from sae_apps.suppression.concepts import LabelledTexts, require_concept
from sae_apps.suppression.probes import check_labels
from sae_core.errors import UserError


@dataclass(frozen=True, eq=False)
class Labelled:
    """Texts with one yes or no each."""

    texts: Sequence[str]
    """n texts."""
    is_concept: Bool[np.ndarray, " n"]
    """Labels, [n]."""
    group: Int[np.ndarray, " n"]
    """Document of each text, [n]: texts of one document are resampled together."""

    def __post_init__(self) -> None:
        check_labels(np.empty(len(self.texts)), self.is_concept)
        if len(self.group) != len(self.texts):
            raise UserError(
                f"Expected a document for each of {len(self.texts)} texts, got {len(self.group)}."
            )


@dataclass(frozen=True, eq=False)
class Trial:
    """Everything on which suppression of one concept is judged."""

    concept: str
    """Its name."""
    train: Labelled
    """For the probes."""
    test: Labelled
    """For removal; no document of it in train."""
    neutral: Sequence[str]
    """Running text without the concept, one document each, for perplexity and KL."""
    pairs: Int[np.ndarray, "m 2"] = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """Places in test of a concept text and its neutral rewrite; empty where there are none."""
    others: Mapping[str, tuple[Labelled, Labelled]] = field(default_factory=dict)
    """Other concepts: train and test."""

    def __post_init__(self) -> None:
        if not len(self.neutral):
            raise UserError("Expected at least one neutral text, got none.")
        both = set(self.train.group.tolist()) & set(self.test.group.tolist())
        if both:
            raise UserError(
                f"Expected no document in both train and test, got {len(both)}, for one "
                f"{min(both)}."
            )
        label = self.test.is_concept
        if len(self.pairs) and not (label[self.pairs[:, 0]] & ~label[self.pairs[:, 1]]).all():
            raise UserError(
                "Expected pairs of a concept text and one without it, got others among "
                f"{len(self.pairs)} pairs."
            )


def make_trial(
    train: LabelledTexts, test: LabelledTexts, concept: str, neutral: Sequence[str] = ()
) -> Trial:
    """A trial of one concept.

    Args:
        train: for fitting probes (and edits).
        test: no document of it in train; texts of one document with and without the concept are
            pairs, each text in at most one.
        concept: a label; all others are the rest, and where there are several of them, each is one
            of the other concepts, judged on the texts without the concept.
        neutral: running text; empty: the test texts without the concept.
    Raises:
        UserError: no such concept, or one class only.
    """
    require_concept(concept, train.classes)
    number: dict[Hashable, int] = {}
    for one in (*train.group, *test.group):
        number.setdefault(one, len(number))

    def labelled(data: LabelledTexts, name: str) -> Labelled:
        group = np.array([number[one] for one in data.group], dtype=np.int64)
        return Labelled(list(data.texts), np.array([label == name for label in data.labels]), group)

    rest = [name for name in train.classes if name != concept]
    others: dict[str, tuple[Labelled, Labelled]] = {}
    if len(rest) > 1:
        parts = [part.only(rest) for part in (train, test)]
        others = {name: (labelled(parts[0], name), labelled(parts[1], name)) for name in rest}
    judged = labelled(test, concept)
    running = list(neutral) or [
        text for text, yes in zip(test.texts, judged.is_concept, strict=True) if not yes
    ]
    return Trial(concept, labelled(train, concept), judged, running, pairs_of(judged), others)


def pairs_of(data: Labelled) -> np.ndarray:
    """Places [m, 2] of a text with the concept and one without it of the same document."""
    free: dict[int, list[int]] = {}
    for place in np.flatnonzero(~data.is_concept):
        free.setdefault(int(data.group[place]), []).append(int(place))
    found = []
    for place in np.flatnonzero(data.is_concept):
        partners = free.get(int(data.group[place]), [])
        if partners:
            found.append((int(place), partners.pop(0)))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def strengths_of(text: str) -> tuple[float, ...]:
    """``0,0.5,1`` -> (0.0, 0.5, 1.0).

    Raises:
        UserError: not numbers joined by commas.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"Expected numbers joined by commas, got {text!r}.") from error
