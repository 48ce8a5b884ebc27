"""Labelled texts: draws, splits, and bad input in a sentence."""

from collections import Counter

import numpy as np
import pytest

from sae_apps.suppression.concepts import LabelledTexts, require_classes
from sae_core.errors import UserError


def made(n: int = 60) -> LabelledTexts:
    """Two thirds good; pairs of texts are one document."""
    labels = tuple("bad" if i % 3 == 0 else "good" for i in range(n))
    texts = tuple(f"text {i}" for i in range(n))
    return LabelledTexts("made", texts, labels, tuple(f"doc {i // 2}" for i in range(n)))


def test_counts_codes_and_groups() -> None:
    data = made(6)
    assert data.classes == ("bad", "good") and data.counts == {"bad": 2, "good": 4}
    assert data.codes.tolist() == [0, 1, 1, 0, 1, 1]
    assert data.groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert LabelledTexts("x", ("a", "b"), ("p", "q")).groups.tolist() == [0, 1]
    assert data.take([5, 0]).texts == ("text 5", "text 0")
    assert data.only(["bad"]).texts == ("text 0", "text 3")


def test_balanced_draws_equally_many() -> None:
    data = made()
    assert data.balanced().counts == {"bad": 20, "good": 20}
    drawn = data.balanced(5, seed=1)
    assert drawn.counts == {"bad": 5, "good": 5}
    assert drawn == data.balanced(5, seed=1) != data.balanced(5, seed=2)
    order = [int(text.split()[1]) for text in drawn.texts]
    assert order == sorted(order)


def test_pairs_stay_together_when_drawn() -> None:
    labels = ("toxic", "neutral") * 50
    group = tuple(i // 2 for i in range(100))
    data = LabelledTexts("pairs", tuple(f"t{i}" for i in range(100)), labels, group)
    assert set(Counter(data.balanced(20, seed=3).group).values()) == {2}


def test_split_shares_no_document_and_keeps_the_shares() -> None:
    data = made(600)
    first, second = data.split(0.2, seed=0)
    assert not set(first.group) & set(second.group)
    assert len(first) + len(second) == 600 and len(second) == pytest.approx(120, abs=2)
    assert second.counts["bad"] / len(second) == pytest.approx(1 / 3, abs=0.08)
    assert data.split(0.2, seed=0)[1] == second != data.split(0.2, seed=1)[1]


def test_the_digest_follows_the_content() -> None:
    data = made(6)
    assert data.digest() == made(6).digest()
    relabelled = LabelledTexts("made", data.texts, data.labels[::-1], data.group)
    regrouped = LabelledTexts("made", data.texts, data.labels)
    assert len({data.digest(), relabelled.digest(), regrouped.digest()}) == 3
    assert np.array_equal(data.take(range(6)).groups, data.groups)


@pytest.mark.parametrize(
    ("texts", "labels", "group", "message"),
    [
        (("a", "b"), ("x",), (), "one label for each of 2 texts, got 1"),
        (("a", "b"), ("x", "y"), (1,), "one group for each of 2 texts, got 1"),
        ((), (), (), "at least one text, got none"),
        (("a", " "), ("x", "y"), (), "not empty, got ' ' in text 1"),
        (("a", None), ("x", "y"), (), "not empty, got None in text 1"),
        (("a", "b"), ("x", 1), (), "a label as text, got 1 in text 1"),
        ("ab", ("x", "y"), (), "lists of texts and labels, got one string"),
    ],
)
def test_bad_texts(texts, labels, group, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LabelledTexts("bad", texts, labels, group)


def test_bad_questions() -> None:
    data = made(6)
    with pytest.raises(UserError, match="one of the concepts bad, good, got 'ugly'"):
        data.only(["ugly"])
    with pytest.raises(UserError, match="two concepts, got only 'bad'"):
        data.only(["bad"]).balanced()
    with pytest.raises(UserError, match="between 1 and 2 texts of each concept.*'bad', got 3"):
        data.balanced(3)
    with pytest.raises(UserError, match="at least 3 texts of 'bad', got 2"):
        require_classes(data, 3)
    with pytest.raises(UserError, match="between 0 and 1, got 1"):
        data.split(1)
    with pytest.raises(UserError, match="in both parts, got none"):
        LabelledTexts("x", ("a", "b"), ("p", "q")).split(0.4)
