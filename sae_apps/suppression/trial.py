"""From labelled texts to a trial: pair what is parallel, name the other concepts.

pairs: texts with and without the concept of one document;   others: one label against the rest
"""

from collections.abc import Hashable, Sequence

import numpy as np

from sae_apps.suppression.concepts import LabelledTexts, require_concept
from sae_apps.suppression.evaluate import Labelled, Trial
from sae_core.errors import UserError


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
