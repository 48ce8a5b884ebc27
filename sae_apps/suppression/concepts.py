"""Labelled texts: the material that concepts are measured and fitted on."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from sae_core.errors import UserError


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with one concept each. Checked on construction."""

    name: str
    """Of the data set."""
    texts: tuple[str, ...]
    """n texts, none empty."""
    labels: tuple[str, ...]
    """Concept of each text."""
    group: tuple[Hashable, ...] = ()
    """Document of each text: what is sampled, split and permuted together. Empty: each its own."""
    source: str = "memory"
    """Where the texts come from, for reports."""

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or isinstance(self.labels, str):
            raise UserError("Expected lists of texts and labels, got one string.")
        for field in ("texts", "labels"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        n = len(self.texts)
        group = tuple(self.group) or tuple(range(n))
        object.__setattr__(self, "group", group)
        if len(self.labels) != n:
            raise UserError(f"Expected one label for each of {n} texts, got {len(self.labels)}.")
        if len(group) != n:
            raise UserError(f"Expected one group for each of {n} texts, got {len(group)}.")
        if not n:
            raise UserError("Expected at least one text, got none.")
        for i, (text, label) in enumerate(zip(self.texts, self.labels, strict=True)):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"Expected a text that is not empty, got {text!r} in text {i}.")
            if not isinstance(label, str) or not label:
                raise UserError(f"Expected a label as text, got {label!r} in text {i}.")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def classes(self) -> tuple[str, ...]:
        """The concepts, in alphabetical order."""
        return tuple(sorted(set(self.labels)))

    @property
    def counts(self) -> dict[str, int]:
        """Texts of each concept."""
        return {one: self.labels.count(one) for one in self.classes}

    @property
    def codes(self) -> Int[np.ndarray, "n"]:
        """Place in ``classes`` of each text's label."""
        place = {label: i for i, label in enumerate(self.classes)}
        return np.array([place[label] for label in self.labels], dtype=np.int64)

    @property
    def groups(self) -> Int[np.ndarray, "n"]:
        """Group of each text as a number, in the order of first appearance."""
        place: dict[Hashable, int] = {}
        return np.array([place.setdefault(one, len(place)) for one in self.group], dtype=np.int64)

    def digest(self) -> str:
        """Twelve hexadecimal digits that change with any text, label or group."""
        found = hashlib.sha256()
        for row in zip(self.texts, self.labels, self.groups, strict=True):
            found.update(repr((row[0], row[1], int(row[2]))).encode())
        return found.hexdigest()[:12]

    def take(self, index: Iterable[int]) -> "LabelledTexts":
        """Some texts, in that order."""
        where = [int(i) for i in index]
        return LabelledTexts(
            self.name,
            tuple(self.texts[i] for i in where),
            tuple(self.labels[i] for i in where),
            tuple(self.group[i] for i in where),
            self.source,
        )

    def only(self, concepts: Sequence[str]) -> "LabelledTexts":
        """The texts of some concepts.

        Raises:
            UserError: there is no such concept.
        """
        for one in concepts:
            require_concept(one, self.classes)
        return self.take(i for i, label in enumerate(self.labels) if label in set(concepts))

    def balanced(self, n_per_class: int | None = None, seed: int = 0) -> "LabelledTexts":
        """Equally many texts of each concept, drawn at random and left in their order.

        Whole groups are drawn one after another, so that pairs stay together: in the order of a
        permutation of the groups, a text is taken while its concept still lacks some.

        Args:
            n_per_class: texts of each; None: as many as the rarest concept has.
            seed: of the draw.

        Raises:
            UserError: fewer than two concepts, or fewer texts of one than asked for.
        """
        counts = require_classes(self)
        rarest = min(counts, key=counts.__getitem__)
        n = counts[rarest] if n_per_class is None else n_per_class
        if not 1 <= n <= counts[rarest]:
            raise UserError(
                f"Expected between 1 and {counts[rarest]} texts of each concept, the number of "
                f"{rarest!r}, got {n}."
            )
        groups, codes = self.groups, self.codes
        rank = np.random.default_rng(seed).permutation(groups.max() + 1)[groups]
        left, kept = np.full(len(counts), n), []
        for i in np.argsort(rank, kind="stable"):
            if left[codes[i]]:
                left[codes[i]] -= 1
                kept.append(int(i))
        return self.take(sorted(kept))

    def split(self, fraction: float, seed: int = 0) -> "tuple[LabelledTexts, LabelledTexts]":
        """Two parts without a common group; the second has about ``fraction`` of the groups.

        Groups are drawn within the concept of their first text, so that both parts keep the shares
        of the concepts.

        Raises:
            UserError: the fraction is not between 0 and 1, or a part would lack a concept.
        """
        if not 0 < fraction < 1:
            raise UserError(f"Expected a fraction between 0 and 1, got {fraction}.")
        groups, codes = self.groups, self.codes
        first = np.unique(groups, return_index=True)[1]
        random, second = np.random.default_rng(seed), np.zeros(len(first), dtype=bool)
        for label in range(len(self.classes)):
            mine = random.permutation(np.flatnonzero(codes[first] == label))
            second[mine[: round(fraction * len(mine))]] = True
        inside = second[groups]
        for part in (~inside, inside):
            lacking = set(range(len(self.classes))) - set(codes[part].tolist())
            if lacking:
                raise UserError(
                    f"Expected texts of {self.classes[min(lacking)]!r} in both parts, got none in "
                    f"one of them: of {len(first)} groups {int(second.sum())} are in the second."
                )
        return self.take(np.flatnonzero(~inside)), self.take(np.flatnonzero(inside))


def require_concept(concept: str, classes: Sequence[str]) -> None:
    """UserError unless the concept is one of the classes."""
    if concept not in classes:
        raise UserError(f"Expected one of the concepts {', '.join(classes)}, got {concept!r}.")


def require_classes(data: LabelledTexts, minimum: int = 1) -> dict[str, int]:
    """Texts of each concept.

    Raises:
        UserError: there is one concept only, or one has fewer texts than the minimum.
    """
    counts = data.counts
    if len(counts) < 2:
        raise UserError(f"Expected at least two concepts, got only {data.classes[0]!r}.")
    for concept, n in counts.items():
        if n < minimum:
            raise UserError(f"Expected at least {minimum} texts of {concept!r}, got {n}.")
    return counts
