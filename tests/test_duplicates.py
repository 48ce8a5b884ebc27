"""Repeated rows and contamination: hashed n-grams against Python's own sets, planted pairs at known
Jaccard on both sides of the threshold, brute force on random texts, and real repeated questions."""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_apps.selection import shingles
from sae_apps.selection.contamination import contamination
from sae_apps.selection.duplicates import (
    _repeats,
    _walk,
    exact_duplicates,
    near_duplicates,
    text_of,
    without,
)
from sae_apps.selection.instructions import InstructionRow, open_instructions, source_from_rows
from sae_apps.selection.minhash import (
    band_keys,
    bands_for,
    chance,
    minhash,
    previous_in_band,
    random_orders,
)
from sae_apps.selection.shingles import ngrams, normalise, shingle_sets, word_hashes
from sae_core.errors import UserError


def rows_of(*texts: str) -> list[InstructionRow]:
    return [InstructionRow(10 * i, text, "") for i, text in enumerate(texts)]


def numbered(start: int, stop: int, prefix: str = "w") -> str:
    return " ".join(f"{prefix}{i}" for i in range(start, stop))


def reference_words(text: str) -> list[str]:
    """The words, by a regular expression over the whole text."""
    apart = shingles._UNSPACED
    signs = shingles._SIGNS + re.escape(shingles._ASCII_SIGNS.decode())
    return re.findall(rf"[{apart}{signs}]|[^\W{apart}]+", normalise(text))


def reference_sets(texts: list[str], n: int) -> list[set[tuple[str, ...]]]:
    found = []
    for text in texts:
        words = reference_words(text)
        count = max(len(words) - n + 1, min(len(words), 1))
        found.append({tuple(words[i : i + n]) for i in range(count)})
    return found


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


# ---- words and n-grams ----

TEXT = st.text("aAbß ﬁ\tÅé٣日本+-*_.,\n'“≤", max_size=25)


@given(text=st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once == once.strip() and not re.search(r"\s\s|[^\S ]", once)


def test_every_character_is_normalised_once_and_for_all() -> None:
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    assert [c for c in every if normalise(normalise(c)) != normalise(c)] == []


def test_what_normalising_keeps_apart_and_what_not() -> None:
    assert normalise("  Straße\n\tＡ１ ﬁ ") == normalise("STRASSE a1 FI") == "strasse a1 fi"
    assert normalise("e\u0301") == normalise("é") != normalise("e")
    assert normalise("a b") != normalise("ab")


@given(texts=st.lists(TEXT, min_size=1, max_size=6))
def test_hashed_words_are_equal_where_the_words_are(texts: list[str]) -> None:
    hashed = word_hashes(texts)
    wanted = [word for text in texts for word in reference_words(text)]
    n_words = [len(reference_words(text)) for text in texts]
    assert np.diff(hashed.start).tolist() == n_words
    assert len(hashed.values) == len(wanted)
    assert len(set(zip(wanted, hashed.values.tolist(), strict=True))) == len(set(wanted))
    assert len(set(hashed.values.tolist())) == len(set(wanted))


def test_operators_are_words_and_other_punctuation_is_none() -> None:
    same = word_hashes(["the dog's tail (old)", "The Dog s TAIL; old!"])
    old, new = np.split(same.values, 2)
    assert np.array_equal(old, new)
    plus, times, joined = shingle_sets(["3 + 4", "3 * 4", "3+4"], 5)
    assert plus.tolist() == joined.tolist() != times.tolist()


@given(texts=st.lists(TEXT, min_size=1, max_size=6), n=st.integers(1, 4))
def test_a_text_has_the_same_ngrams_alone_and_among_others(texts: list[str], n: int) -> None:
    together = shingle_sets(texts, n)
    assert [s.tolist() for s in together] == [shingle_sets([t], n)[0].tolist() for t in texts]


@given(texts=st.lists(st.text("ab .é", max_size=30), min_size=2, max_size=5), n=st.integers(1, 4))
def test_hashed_ngrams_have_the_jaccard_of_the_words(texts: list[str], n: int) -> None:
    hashed = [set(one.tolist()) for one in shingle_sets(texts, n)]
    wanted = reference_sets(texts, n)
    for i in range(len(texts)):
        assert len(hashed[i]) == len(wanted[i])
        for j in range(i):
            assert jaccard(hashed[i], hashed[j]) == jaccard(wanted[i], wanted[j])


def test_ngrams_without_the_short_ones() -> None:
    words = word_hashes(["a b c d", "a b", "", "b c d"])
    assert np.diff(ngrams(words, 3, short=False).start).tolist() == [2, 0, 0, 1]
    grams = ngrams(words, 3, short=True)
    assert np.diff(grams.start).tolist() == [2, 1, 0, 1]
    assert grams.values[1] == grams.values[3]  # "b c d", wherever it stands


GOLDEN_WORDS = ["0x8c526bf4c7d204b6", "0x821052991f535b66"]
GOLDEN_GRAM = "0xb8175c4d5a0de10a"


def test_hashes_are_the_same_in_every_version_and_process() -> None:
    """A changed hash would change which pairs are proposed; the values are of the first version."""
    assert [hex(v) for v in word_hashes(["ab c"]).values] == GOLDEN_WORDS
    assert hex(int(shingle_sets(["ab c"], 5)[0][0])) == GOLDEN_GRAM


# ---- MinHash ----

N_SIGMA = 5


def planted(common: int, own: int, n_pairs: int) -> tuple[list[str], float]:
    """Texts 2i and 2i+1 share ``common`` words and have ``own`` words each; n-grams of one word."""
    texts = []
    for i in range(n_pairs):
        for side in "ab":
            texts.append(f"{numbered(0, common, f'p{i}c')} {numbered(0, own, f'p{i}{side}')}")
    return texts, common / (common + 2 * own)


@pytest.mark.parametrize(("common", "own"), [(10, 45), (50, 25), (80, 10)])
def test_signatures_agree_as_often_as_the_jaccard_says(common: int, own: int) -> None:
    texts, j = planted(common, own, 150)
    grams = ngrams(word_hashes(texts), 1, short=True)
    signature = minhash(grams, *random_orders(64, seed=3))
    agree = signature[:, ::2] == signature[:, 1::2]
    n = agree.size  # pairs and orders are independent
    assert abs(agree.mean() - j) < N_SIGMA * (j * (1 - j) / n) ** 0.5
    other = signature[:, ::2] == np.roll(signature[:, 1::2], 1, axis=1)
    assert other.mean() < 0.01  # control: pairs that share no word


def test_pairs_share_a_band_as_often_as_the_formula_says() -> None:
    texts, j = planted(50, 25, 600)
    for n_bands, band in ((4, 3), (8, 2), (2, 1)):
        _, keys, filled = band_keys(enumerate(texts), 1, 7, n_bands, band)
        together = np.concatenate(keys, axis=1)
        seen = (together[:, ::2] == together[:, 1::2]).any(axis=0).mean()
        p = chance(j, n_bands, band)
        assert abs(seen - p) < N_SIGMA * (p * (1 - p) / 600) ** 0.5
        previous, partner = previous_in_band(keys, filled)
        assert partner.reshape(-1, 2).all(axis=1).mean() == pytest.approx(seen, abs=0.005)
        assert set(previous[previous >= 0].tolist()) <= set(range(len(texts)))


def test_the_bands_are_the_longest_with_the_recall() -> None:
    assert bands_for(0.8) == (21, 6)
    assert chance(0.8, 21, 6) >= 0.99 > chance(0.8, 128 // 7, 7)
    assert bands_for(1.0) == (1, 128)
    with pytest.raises(UserError, match="threshold of at least 0.035, got 0.02"):
        bands_for(0.02)


def test_orders_are_permutations_and_follow_the_seed() -> None:
    scale, shift = random_orders(5, 0)
    assert (scale % 2 == 1).all()
    again = random_orders(5, 0)
    assert np.array_equal(scale, again[0]) and np.array_equal(shift, again[1])
    assert not np.array_equal(scale, random_orders(5, 1)[0])


# ---- near duplicates ----


def pair_at(n_changed: int) -> tuple[str, str]:
    """100 shingles each, of which the last ``n_changed`` differ: J = (100 - c) / (100 + c)."""
    return numbered(0, 104), f"{numbered(0, 104 - n_changed)} {numbered(0, n_changed, 'x')}"


@pytest.mark.parametrize(("n_changed", "is_found"), [(0, 1), (5, 1), (11, 1), (12, 0), (50, 0)])
def test_a_planted_pair_is_found_exactly_from_the_threshold_on(
    n_changed: int, is_found: int
) -> None:
    a, b = pair_at(n_changed)
    found = near_duplicates(rows_of("something else altogether", a, b), threshold=0.8)
    assert len(found.row_id) == is_found
    if is_found:
        assert (found.row_id[0], found.kept[0]) == (20, 10)
        assert found.similarity[0] == pytest.approx((100 - n_changed) / (100 + n_changed), rel=1e-6)
    assert (found.n_rows, found.n_wordless, found.n_capped) == (3, 0, 0)
    assert found.recall == chance(0.8, 21, 6)


def test_the_threshold_itself_is_a_duplicate() -> None:
    rows = rows_of(numbered(0, 9), f"{numbered(0, 8)} x")  # 5 shingles, 4 in common: J = 4 / 6
    assert len(near_duplicates(rows, threshold=4 / 6).row_id) == 1
    assert len(near_duplicates(rows, threshold=0.67).row_id) == 0


def test_what_is_like_a_dropped_row_alone_stays() -> None:
    """b is dropped for a; c is like b, not like a."""
    a, b = numbered(0, 104), numbered(8, 112)
    c = numbered(16, 120)
    found = near_duplicates(rows_of(a, b, c), threshold=0.8)
    assert (found.row_id.tolist(), found.kept.tolist()) == ([10], [0])
    found = near_duplicates(rows_of(b, a, c), threshold=0.8)  # control: now both have a kept one
    assert (found.row_id.tolist(), found.kept.tolist()) == ([10, 20], [0, 0])


def brute_force(texts: list[str], threshold: float, n: int) -> dict[int, int]:
    sets = reference_sets(texts, n)
    dropped: dict[int, int] = {}
    for i in range(len(texts)):
        alike = [(jaccard(sets[i], sets[k]), -k) for k in range(i) if k not in dropped and sets[k]]
        if sets[i] and alike and max(alike)[0] >= threshold:
            dropped[i] = -max(alike)[1]
    return dropped


@pytest.mark.parametrize(("threshold", "n"), [(0.8, 5), (0.5, 3), (1.0, 2)])
def test_it_is_brute_force_on_texts_with_many_relatives(threshold: float, n: int) -> None:
    rng = np.random.default_rng(0)
    families = [rng.integers(0, 50, 40) for _ in range(12)]
    texts = []
    for _ in range(240):
        words = families[rng.integers(12)].copy()
        edits = rng.integers(0, 6)
        words[rng.integers(0, 40, edits)] = rng.integers(0, 50, edits)
        texts.append(" ".join(f"w{w}" for w in words))
    found = near_duplicates(rows_of(*texts), threshold=threshold, n=n)
    wanted = brute_force(texts, threshold, n)
    assert dict(zip(found.row_id // 10, found.kept // 10, strict=True)) == wanted
    assert 20 < len(wanted) < 230
    again = near_duplicates(rows_of(*texts), threshold=threshold, n=n)
    assert np.array_equal(found.row_id, again.row_id) and np.array_equal(found.kept, again.kept)


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [numbered(i % 7, 30 + i % 7) for i in range(40)]
    results = []
    for size in (1, 3, 256):
        monkeypatch.setattr(shingles.blocks, "__defaults__", (size,))
        found = near_duplicates(rows_of(*texts))
        results.append((found.row_id.tolist(), found.kept.tolist(), found.similarity.tolist()))
    assert results[0] == results[1] == results[2] and results[0][0]


def test_short_and_wordless_rows() -> None:
    found = near_duplicates(rows_of("Hi there", "", "hi THERE!", "?!", "hi", "..."))
    assert (found.row_id.tolist(), found.kept.tolist()) == ([20], [0])
    assert found.n_wordless == 3  # and they do not repeat each other
    empty = near_duplicates([])
    assert len(empty.row_id) == len(empty.kept) == empty.n_rows == 0


def test_a_row_compared_with_too_few_is_counted() -> None:
    """Ten rows share a long passage, J = 0.6 between any two; the eleventh repeats the first."""
    texts = [f"{numbered(0, 80)} {numbered(0, 24, f'v{i}x')}" for i in range(10)]
    rows = rows_of(*texts, texts[0])
    assert near_duplicates(rows).row_id.tolist() == [100]
    capped = near_duplicates(rows, max_compared=1)
    assert capped.n_capped > 0
    assert near_duplicates(rows, max_compared=10).n_capped == 0
    # in one band: 3 after 2 (dropped) after 1 after 0
    previous = np.array([[-1, 0, 1, 2]], dtype=np.int32)
    kept = {0: np.array([1], np.uint64), 1: np.array([2], np.uint64)}
    for limit, wanted in ((1, ([1], True)), (2, ([0, 1], False))):
        assert _walk(previous[:, 3], previous, kept, limit) == wanted
    assert previous.tolist() == [[-1, 0, 1, 1]]  # the dropped one is skipped from now on


def test_the_span_decides_what_is_compared() -> None:
    text = numbered(0, 20)
    asked = [InstructionRow(0, text, "yes"), InstructionRow(1, text, "z " * 9)]
    answered = [InstructionRow(0, "a", text), InstructionRow(1, "b", text)]
    for rows, span in ((asked, "prompt"), (answered, "response")):
        for find in (near_duplicates, exact_duplicates):
            assert find(rows, span=span).row_id.tolist() == [1]
            assert find(rows, span="response" if span == "prompt" else "prompt").row_id.size == 0
    assert text_of(asked[0]) == f"{numbered(0, 20)}\nyes"
    with pytest.raises(UserError, match="span 'all', 'prompt' or 'response', got 'both'"):
        exact_duplicates(asked, span="both")


def test_bad_arguments_are_refused() -> None:
    rows = rows_of("a b", "c d")
    for threshold in (0.0, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"threshold in \(0, 1\]"):
            near_duplicates(rows, threshold=threshold)
    with pytest.raises(UserError, match="n and max_compared of at least 1, got 0.8, 0 and"):
        near_duplicates(rows, n=0)
    with pytest.raises(UserError, match="read twice, got an iterator"):
        near_duplicates(iter(rows))


def test_rows_that_change_between_two_readings_are_noticed() -> None:
    class Unsteady:
        n_read = 0  # the first is the question whether it is an iterator

        def __iter__(self) -> Iterator[InstructionRow]:
            self.n_read += 1
            rows = rows_of("a b c d e f", "a b c d e f")
            return iter(rows if self.n_read < 3 else rows[::-1])

    with pytest.raises(UserError, match="Expected row 0 again at place 0, got 10"):
        near_duplicates(Unsteady())


# ---- exact duplicates ----


@given(texts=st.lists(st.text("aA é\n", max_size=3), max_size=12))
def test_exact_duplicates_are_those_of_a_dictionary(texts: list[str]) -> None:
    first: dict[str, int] = {}
    wanted = []
    for i, text in enumerate(texts):
        if first.setdefault(normalise(text), i) != i:
            wanted.append((10 * i, 10 * first[normalise(text)]))
    found = exact_duplicates(rows_of(*texts))
    assert list(zip(found.row_id.tolist(), found.kept.tolist(), strict=True)) == wanted
    assert found.n_rows == len(texts) and (found.similarity == 1).all()


def test_half_a_hash_in_common_is_no_repeat() -> None:
    key = np.array([[1, 2], [1, 3], [1, 2], [2, 2], [1, 3], [1, 2]], dtype=np.uint64)
    repeat, first = _repeats(key)
    assert (repeat.tolist(), first.tolist()) == ([2, 4, 5], [0, 1, 0])


def test_case_space_and_width_do_not_matter_and_words_do() -> None:
    rows = rows_of("Write a poem.", "write  a\nPOEM.", "ｗrite a poem.", "write a poem")
    assert exact_duplicates(rows).row_id.tolist() == [10, 20]
    swapped = [InstructionRow(0, "a", "b"), InstructionRow(1, "b", "a")]
    assert exact_duplicates(swapped).row_id.size == 0


def test_many_rows_cost_few_bytes_each() -> None:
    import tracemalloc

    def rows() -> Iterator[InstructionRow]:
        return (InstructionRow(i, f"text number {i % 39_000}", "") for i in range(40_000))

    tracemalloc.start()
    found = exact_duplicates(rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.row_id) == 1_000 and (found.row_id - found.kept == 39_000).all()
    assert peak / 40_000 < 64  # 24 kept; a set of Python strings would take 100 and more


def test_a_source_without_some_rows_keeps_the_ids_of_the_others() -> None:
    records = [{"text": text} for text in ("a", "b", "", "A", "c")]
    source = open_instructions(records)
    found = exact_duplicates(source)
    rest = without(source, found.row_id)
    reader = rest.open()
    assert [row.row_id for row in reader] == [0, 1, 4]
    assert reader.n_textless == 1
    assert list(rest) == list(rest)
    assert len({source.id, rest.id, without(source, [1]).id}) == 3
    assert rest.id == without(source, [3]).id
    assert list(without(source_from_rows("x", rows_of("a")), [])) == rows_of("a")


# ---- contamination ----


def at(row_id: int, prompt: str, response: str = "") -> InstructionRow:
    return InstructionRow(row_id, prompt, response)


def pairs(found) -> list[tuple[int, int, float]]:
    rows = zip(found.pick.tolist(), found.item.tolist(), found.share.tolist(), strict=True)
    return [(pick, item, round(share, 6)) for pick, item, share in rows]


def test_thirteen_words_in_a_row_are_contamination_and_twelve_are_not() -> None:
    item = at(7, numbered(0, 30))  # 18 n-grams
    thirteen = at(1, f"before {numbered(4, 17)} behind")
    twelve = at(2, f"before {numbered(4, 16)} behind")
    answer = at(3, "Solve it.", f"The question was: {numbered(0, 30)}")
    found = contamination([thirteen, twelve, answer], [item, at(8, numbered(0, 30, "z"))])
    assert pairs(found) == [(1, 7, round(1 / 18, 6)), (3, 7, 1.0)]
    assert found.picks.tolist() == [1, 3] and found.items.tolist() == [7]
    assert (found.n_picks, found.n_items, found.n_untested, found.n) == (3, 2, 0, 13)
    assert pairs(contamination([thirteen, answer], [item], min_share=0.5)) == [(3, 7, 1.0)]
    assert pairs(contamination([answer], [item], pick_span="prompt")) == []
    half = contamination([thirteen], [at(7, numbered(4, 18))], min_share=0.5)  # 1 of 2 n-grams
    assert pairs(half) == [(1, 7, 0.5)]


def test_a_short_item_must_be_contained_whole() -> None:
    item = at(7, "What is the capital of France?")
    inside = at(1, "Say: what is the capital of FRANCE, please")
    most = at(2, "what is the capital of")
    assert pairs(contamination([inside, most], [item])) == [(1, 7, 1.0)]
    tiny = contamination([at(1, "yes or no it is")], [at(7, "yes or no"), at(8, "")])
    assert pairs(tiny) == [] and tiny.n_untested == 2
    asked = contamination([at(1, "yes or no it is")], [at(7, "yes or no")], min_words=3)
    assert pairs(asked) == [(1, 7, 1.0)]


def test_a_phrase_of_many_items_counts_for_none() -> None:
    phrase = numbered(0, 20)
    items = [at(i, f"{phrase} {numbered(0, 20, f'i{i}x')}") for i in range(11)]
    pick = at(100, f"{phrase} and a question of its own")
    found = contamination([pick], items)
    assert pairs(found) == [] and found.n_untested == 0
    assert len(pairs(contamination([pick], items[:10]))) == 10  # control: ten items are no phrase
    assert pairs(contamination([items[3]._replace(row_id=100)], items)) == [(100, 3, 1.0)]
    same = [at(i, phrase) for i in range(11)]
    assert contamination([pick], same).n_untested == 11


@settings(max_examples=50)
@given(
    picks=st.lists(st.text("ab ", max_size=14), max_size=5),
    items=st.lists(st.text("ab ", max_size=10), min_size=1, max_size=5),
    n=st.integers(1, 3),
)
def test_shares_are_those_of_python_sets(picks: list[str], items: list[str], n: int) -> None:
    found = contamination(
        rows_of(*picks), rows_of(*items), n=n, min_words=1, max_items=99, pick_span="prompt"
    )
    wanted = []
    for p, pick in enumerate(picks):
        words = reference_words(pick)
        for i, item in enumerate(items):
            grams = reference_sets([item], n)[0]
            length = min(n, len(reference_words(item)))
            have = {tuple(words[k : k + length]) for k in range(len(words) - length + 1)}
            if grams & have:
                wanted.append((10 * p, 10 * i, round(len(grams & have) / len(grams), 6)))
    assert sorted(pairs(found)) == sorted(wanted)
    assert found.n_untested == sum(not reference_words(item) for item in items)


def test_the_order_of_picks_and_items_does_not_matter() -> None:
    items = [at(i, numbered(i, i + 20)) for i in range(5)]
    picks = [at(100 + i, numbered(2 * i, 2 * i + 16)) for i in range(5)]
    found = pairs(contamination(picks, items))
    assert found == pairs(contamination(picks[::-1], items[::-1])) and len(found) > 5
    assert found == sorted(found, key=lambda one: (one[0], -one[2], one[1]))


def test_bad_arguments_of_contamination_are_refused() -> None:
    row = at(0, "x")
    with pytest.raises(UserError, match="evaluation set with at least one row, got none"):
        contamination([row], [])
    with pytest.raises(UserError, match="min_words from 1 to n .* got 0.0, 9 of n = 5, and 10"):
        contamination([row], [row], n=5, min_words=9)
    with pytest.raises(UserError, match=r"min_share in \[0, 1\]"):
        contamination([row], [row], min_share=1.5)
    assert contamination([], [row]).n_picks == 0


# ---- real data ----


def flan(folder: Path, task: str, first_id: int, limit: int) -> list[InstructionRow]:
    with gzip.open(folder / "flan_cot" / f"{task}_train.tsv.gz", "rt", encoding="utf-8",
                   newline="\n") as handle:  # fmt: skip
        rows = [line.rstrip("\n").replace("\\n", "\n").split("\t") for line in handle]
    return [at(first_id + i, r[0], "\n".join(r[1:])) for i, r in enumerate(rows[:limit])]


def test_the_gsm8k_rows_of_flan_cot_are_found_and_its_other_tasks_are_not(
    shared_data: Path,
) -> None:
    """Every twentieth question of GSM8K's training set, and flan_cot's copies of them."""
    train = list(open_instructions(shared_data / "gsm8k/train.jsonl.gz"))[::20]
    copies = flan(shared_data, "gsm8k", 100_000, 9_999)[::20]
    others = flan(shared_data, "strategyqa", 200_000, 400)
    others += flan(shared_data, "aqua", 300_000, 400)
    question = {normalise(row.prompt): row.row_id for row in train}
    truth = {(row.row_id, question.get(normalise(row.prompt))) for row in copies}
    assert len(truth) > 300 and None not in {item for _, item in truth}

    found = contamination([*copies, *others], train, min_share=0.8)
    assert set(zip(found.pick.tolist(), found.item.tolist(), strict=True)) == truth
    near = near_duplicates([*train, *copies, *others], span="prompt")
    got = set(zip(near.row_id.tolist(), near.kept.tolist(), strict=True))
    assert {pair for pair in got if pair[0] < 200_000} == truth
    # Control: with their answers, which differ, most copies are no near duplicates.
    whole = near_duplicates([*train, *copies], span="all")
    assert len(whole.row_id) < 0.1 * len(copies)
