"""Probes, curves, likelihoods and whole evaluations: against hand-worked and naive values."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.suppression as suite
from benchmarks.suppression_cells import least_strength
from benchmarks.suppression_goals import goals
from sae_apps.suppression.concepts import LabelledTexts
from sae_apps.suppression.curves import Curve, crossing, matched, resample
from sae_apps.suppression.evaluate import (
    EvaluationConfig,
    Reader,
    erasure,
    evaluate,
)
from sae_apps.suppression.likelihood import pool_texts, read_texts
from sae_apps.suppression.lineup import fit_rivals, token_sample
from sae_apps.suppression.plain_texts import ReadConfig, read_plain
from sae_apps.suppression.probes import Probe, balanced_accuracy, fit_probe
from sae_apps.suppression.rivals import PromptEdit, at_strength
from sae_apps.suppression.suppress import suppress
from sae_apps.suppression.trial import Labelled, Trial, make_trial
from sae_apps.suppression.units import open_units
from sae_core.errors import UserError
from sae_core.models import LanguageModel

HOOK = "layers.2.out"
FLOAT32 = 2e-4  # nats: sums of a dozen float32 log-probabilities, batched otherwise
TEXTS = ["Once upon a time there was a dog.", "Tom and Mia went to the park.", "The end was sad."]


@dataclass(frozen=True)
class Shift:
    """An edit for tests: everything moves along one dimension."""

    strength: float = 1.0
    hook_point: str = HOOK

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.strength * torch.eye(x.shape[1])[3]


# ---- probes ----


def planted(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.random(n) < 0.4
    x = rng.normal(size=(n, 8)) * 3 + 7
    x[:, 2] += 6.0 * label
    return x, label


def test_a_probe_finds_what_is_planted_and_nothing_in_shuffled_labels() -> None:
    (x, label), (held, truth) = planted(800, 0), planted(800, 1)
    shuffled = np.random.default_rng(2).permutation(label)
    found = balanced_accuracy(fit_probe(x, label).is_right(held, truth), truth)
    chance = balanced_accuracy(fit_probe(x, shuffled).is_right(held, truth), truth)
    assert found > 0.8
    assert abs(chance - 0.5) < 0.15


def test_a_probe_is_a_line() -> None:
    probe = Probe(np.array([2.0, -1.0]), 0.5)
    x = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.5]])
    assert probe.log_odds(x).tolist() == [1.5, -0.5, 0.0]
    assert probe.is_right(x, np.array([True, True, False])).tolist() == [True, False, True]


def test_a_probe_does_not_depend_on_units_or_on_repeated_rows() -> None:
    x, label = planted(100, 0)
    odds = fit_probe(x, label).log_odds(x)
    other = fit_probe(1000 * x - 5, label).log_odds(1000 * x - 5)
    twice = fit_probe(np.tile(x, (2, 1)), np.tile(label, 2)).log_odds(x)
    assert np.allclose(odds, other, atol=1e-3)
    assert np.allclose(odds, twice, atol=1e-3)


def test_a_constant_column_has_no_weight() -> None:
    x, label = planted(100, 0)
    x[:, 5] = 1e6
    assert fit_probe(x, label).weights[5] == 0


def test_accuracy_is_the_mean_of_both_classes() -> None:
    right, label = np.array([True, False, True, True]), np.array([True, True, True, False])
    assert balanced_accuracy(right, label) == pytest.approx((2 / 3 + 1) / 2)


# ---- curves ----


def line(erased: list[float], value: list[float], n_draws: int = 0, scale: float = 1.0) -> Curve:
    strength = np.arange(len(erased), dtype=float)
    columns = {"erased_fixed": np.array(erased), "cost": np.array(value)}
    noise = np.random.default_rng(0).normal(size=(n_draws, 1)) * 0.01
    draws = {name: column * (scale + noise) for name, column in columns.items()} if n_draws else {}
    return Curve("m", "c", strength, columns, draws)


def test_interpolation_is_exact_on_a_line() -> None:
    curve = line([0.0, 0.25, 0.5, 0.75, 1.0], [10.0, 11.0, 12.0, 13.0, 14.0])
    for at in (0.1, 0.6, 0.8, 1.0):
        found = matched(curve, at)
        assert found.strength == pytest.approx(4 * at)
        assert found.values["cost"][0] == pytest.approx(10 + 4 * at)


def test_the_first_crossing_counts() -> None:
    assert crossing(np.array([0.0, 0.5, 1.0, 0.2, 1.0]), 0.75) == (1, pytest.approx(0.5))
    assert crossing(np.array([0.0, 0.5]), 0.6) is None
    assert crossing(np.array([0.9, 1.0]), 0.6) == (0, 0.0)


def test_a_level_that_is_never_reached_has_a_reason_and_no_values() -> None:
    found = matched(line([0.0, 0.4, 0.3], [1.0, 2.0, 3.0], 50), 0.6)
    assert found.strength is None and not found.values and found.reached == 0
    assert found.reason == "removes at most 40.0%, at strength 1 of up to 2"
    assert found.record()["reason"] == found.reason


def test_intervals_are_given_where_nearly_all_resamples_reach_the_level() -> None:
    erased, cost = [0.0, 0.5, 1.0], [0.0, 1.0, 2.0]
    value, low, high = matched(line(erased, cost, 400), 0.5).values["cost"]
    assert low is not None and high is not None and low <= value <= high
    rare = matched(line(erased, cost, 400, scale=0.8), 0.8)
    assert rare.values["cost"][1:] == (None, None) and 0 < rare.reached < 0.975


def test_the_table_has_a_row_for_each_strength() -> None:
    table = line([0.0, 1.0], [1.0, 2.0], 20).table()
    assert table.num_rows == 2
    assert {"erased_fixed_low", "cost_high", "strength"} <= set(table.column_names)


def test_documents_are_drawn_whole_and_by_seed() -> None:
    group = np.array([7, 7, 3, 9, 9, 9])
    a, b, c = (resample(group, 200, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert (a[:, 0] == a[:, 1]).all() and (a[:, 3] == a[:, 5]).all()
    assert (a[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert len(np.unique(a[:, 0])) > 1


# ---- likelihood ----


def test_perplexity_is_exp_of_the_mean_nll(tiny_lm: LanguageModel) -> None:
    total, count, pooled = 0.0, 0, []
    special = set(tiny_lm.tokenizer.all_special_ids)
    for text in TEXTS:
        ids = torch.tensor([tiny_lm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            out = tiny_lm.model(ids, output_hidden_states=True)
        log_p = out.logits[0].log_softmax(-1)
        first = next(i for i, t in enumerate(ids[0].tolist()) if t not in special)
        scored = range(first + 1, ids.shape[1])
        total -= sum(float(log_p[t - 1, ids[0, t]]) for t in scored)
        count += len(scored)
        pooled.append(out.hidden_states[3][0, first + 1 :].mean(dim=0).numpy())
    (plain,) = read_texts(tiny_lm, TEXTS, [], HOOK)
    assert plain.n_tokens.sum() == count
    assert plain.perplexity == pytest.approx(np.exp(total / count), rel=1e-4)
    assert np.allclose(plain.pooled, np.stack(pooled), atol=1e-3)
    assert not plain.kl.any()


def test_readings_do_not_depend_on_batches(tiny_lm: LanguageModel) -> None:
    many = read_texts(tiny_lm, TEXTS, [Shift()], HOOK)
    one = read_texts(tiny_lm, TEXTS, [Shift()], HOOK, ReadConfig(batch_tokens=1))
    for a, b in zip(many, one, strict=True):
        assert np.allclose(a.nll, b.nll, atol=FLOAT32)
        assert np.allclose(a.kl, b.kl, atol=FLOAT32)


def test_an_edit_changes_likelihood_and_moves_what_is_pooled(tiny_lm: LanguageModel) -> None:
    read_texts(tiny_lm, TEXTS[:1], [], HOOK)  # transformers adds hooks of its own in a first pass
    before = dict(tiny_lm.model.model.layers[2]._forward_hooks)
    plain, none, some, more = read_texts(tiny_lm, TEXTS, [Shift(0.0), Shift(2.0), Shift(4.0)], HOOK)
    assert np.array_equal(plain.nll, none.nll) and not none.kl.any()
    assert (some.kl > 0).all() and (more.kl > some.kl).all()
    moved = some.pooled - plain.pooled
    assert np.allclose(moved[:, 3], 2.0, atol=1e-4)
    assert np.allclose(np.delete(moved, 3, axis=1), 0, atol=1e-4)
    assert dict(tiny_lm.model.model.layers[2]._forward_hooks) == before


def test_an_instruction_is_context_and_is_not_scored(tiny_lm: LanguageModel) -> None:
    prompt = PromptEdit("Tom was sad. ")
    plain, none, told = read_texts(tiny_lm, TEXTS, [at_strength(prompt, 0), prompt], HOOK)
    assert np.array_equal(plain.nll, none.nll)
    assert np.array_equal(told.n_tokens, plain.n_tokens)
    ids = tiny_lm.tokenizer(TEXTS[0])["input_ids"]
    before = tiny_lm.tokenizer(prompt.prefix, add_special_tokens=False)["input_ids"]
    special = set(tiny_lm.tokenizer.all_special_ids)
    first = next(i for i, t in enumerate(ids) if t not in special)
    whole = torch.tensor([[*ids[:first], *before, *ids[first:]]])
    with torch.no_grad():
        log_p = tiny_lm.model(whole).logits[0].log_softmax(-1)
    scored = range(first + len(before) + 1, whole.shape[1])
    naive = -sum(float(log_p[t - 1, whole[0, t]]) for t in scored)
    assert told.nll[0] == pytest.approx(naive, abs=FLOAT32 * 10)
    assert abs(told.nll[0] - plain.nll[0]) > 0.1


# ---- whole evaluations ----


@pytest.fixture(scope="module")
def trial() -> Trial:
    """Dogs against cars, each text its own document; pairs are rewrites of one another."""
    rng = np.random.default_rng(0)
    names, doings = ["Tom", "Mia", "Ben", "Lily", "Sam"], ["saw", "liked", "found", "took", "lost"]
    texts = []
    for _ in range(60):
        start = f"One day {rng.choice(names)} {rng.choice(doings)} a"
        end = f"in the {rng.choice(['park', 'house', 'garden', 'wood'])}."
        texts += [f"{start} happy dog {end}", f"{start} red car {end}"]
    label = np.arange(120) % 2 == 0
    group = np.arange(120) // 2
    train, test = (
        Labelled([texts[i] for i in part], label[part], group[part])
        for part in (np.arange(80), np.arange(80, 120))
    )
    pairs = np.stack([np.arange(0, 40, 2), np.arange(1, 40, 2)], axis=1)
    other_label = np.array(["park" in t or "garden" in t for t in texts])
    others = tuple(
        Labelled([texts[i] for i in part], other_label[part], group[part])
        for part in (np.arange(80), np.arange(80, 120))
    )
    return Trial("dog", train, test, TEXTS, pairs, {"outside": (others[0], others[1])})


CONFIG = EvaluationConfig(strengths=(0.0, 0.5, 1.0), n_draws=100)


@pytest.fixture(scope="module")
def direction(tiny_lm: LanguageModel, trial: Trial) -> object:
    units = open_units(tiny_lm, None, HOOK, "residual")
    sample = token_sample(tiny_lm, HOOK, trial.train.texts, trial.train.is_concept)
    return fit_rivals(units, sample, n_units=4, names=["direction"])["direction"]


def test_a_direction_erases_its_concept_on_the_whole_curve(
    tiny_lm: LanguageModel, trial: Trial, direction: object
) -> None:
    curve = evaluate(tiny_lm, direction, trial, CONFIG, method="direction")
    c = curve.columns
    assert c["accuracy_fixed"][0] > 0.9
    assert c["erased_fixed"][0] == 0 and c["erased_fixed"][-1] > 0.6
    assert c["accuracy_refitted"][0] == c["accuracy_fixed"][0]
    assert c["kl"][0] == 0 and c["kl"][2] > c["kl"][1] > 0
    assert c["perplexity_increase"][0] == 0 and c["gap_change"][0] == 0
    assert c["others_lost"] == pytest.approx(c["other_outside"][0] - c["other_outside"])
    drawn = curve.draws["erased_fixed"]
    assert not drawn[:, 0].any() and drawn[:, 1].std() > 0
    assert curve.table().num_rows == 3
    assert matched(curve, 0.6).strength is not None


def test_evaluations_repeat_by_seed(
    tiny_lm: LanguageModel, trial: Trial, direction: object
) -> None:
    small = replace(trial, others={})
    a, b, c = (
        evaluate(tiny_lm, direction, small, replace(CONFIG, seed=seed), method="d")
        for seed in (0, 0, 1)
    )
    for name in a.columns:
        assert np.array_equal(a.draws[name], b.draws[name]), name
        assert np.array_equal(a.columns[name], c.columns[name]), name
    assert not np.array_equal(a.draws["kl"], c.draws["kl"])


def test_an_edit_of_something_else_erases_nothing(tiny_lm: LanguageModel, trial: Trial) -> None:
    small = replace(trial, others={})
    curve = evaluate(tiny_lm, Shift(1.0), small, CONFIG, method="shift")
    assert (
        abs(curve.columns["accuracy_refitted"] - curve.columns["accuracy_refitted"][0]).max() < 0.1
    )
    assert curve.columns["kl"][-1] > 0


def test_a_prompt_is_evaluated_as_text(tiny_lm: LanguageModel, trial: Trial) -> None:
    small = replace(trial, others={})
    config = replace(CONFIG, strengths=(0.0, 1.0), read_at=HOOK)
    curve = evaluate(tiny_lm, PromptEdit("No dog is here. "), small, config, method="prompt")
    assert curve.columns["gap"][1] != curve.columns["gap"][0]


def test_bad_input_is_refused(tiny_lm: LanguageModel, trial: Trial) -> None:
    x, label = planted(10, 0)
    yes, unique = np.ones(10, dtype=bool), np.arange(10)
    texts = ["a dog ran"] * 10
    mixed = np.arange(10) < 5
    train = Labelled(texts, mixed, unique)
    same = Labelled(texts, mixed, unique + 10)
    config = replace(CONFIG, n_draws=5)
    for call, message in (
        (lambda: fit_probe(x, yes), "got 10 of the concept and 0 others"),
        (lambda: fit_probe(x[:9], label), "each of 9 rows, got 10"),
        (lambda: fit_probe(x * np.nan, label), "finite activations"),
        (lambda: fit_probe(x, label, penalty=0.0), "positive penalty, got 0"),
        (lambda: fit_probe(x, label).log_odds(x[:, :3]), r"got shape \[10, 3\]"),
        (lambda: EvaluationConfig(strengths=(0.5, 1.0)), "ascend from 0, got 0.5, 1"),
        (lambda: EvaluationConfig(strengths=(0.0,)), "two strengths"),
        (lambda: EvaluationConfig(n_draws=0), "at least 1 resample, got 0"),
        (lambda: Labelled(texts, mixed, unique[:3]), "each of 10 texts, got 3"),
        (lambda: Trial("c", train, train, TEXTS), "got 10, for one 0"),
        (lambda: Trial("c", train, same, []), "one neutral text"),
        (lambda: Trial("c", train, same, TEXTS, np.array([[9, 0]])), "pairs of a concept text"),
        (lambda: matched(line([0.0, 1.0], [0.0, 1.0]), 0.5, "x"), "got 'x'"),
        (lambda: read_texts(tiny_lm, [], [], HOOK), "one text to read"),
        (lambda: read_texts(tiny_lm, ["a"[:0]], [], HOOK), "at least two tokens"),
        (lambda: read_texts(tiny_lm, TEXTS, [], "layers.99.out"), "layer must be in"),
        (lambda: ReadConfig(context_size=1), "context_size of at least 2"),
        (
            lambda: evaluate(tiny_lm, PromptEdit("x "), trial, config, method="p"),
            "Expected read_at",
        ),
        (
            lambda: evaluate(tiny_lm, Shift(), Trial("c", train, same, TEXTS), config, method="s"),
            "nothing can be erased",
        ),
        (
            lambda: read_texts(tiny_lm, TEXTS, [PromptEdit("dog " * 5000)], HOOK),
            "instruction that leaves 128 of",
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()


# ---- trials and the suite ----


def test_a_trial_pairs_documents_and_names_the_other_concepts() -> None:
    labels = ("bad", "good", "fine") * 4
    train = LabelledTexts("t", ("a text",) * 12, labels, tuple(i // 3 for i in range(12)))
    test = LabelledTexts("t", ("a text",) * 6, labels[:6], (9, 9, 9, 8, 7, 7))
    trial = make_trial(train, test, "bad")
    assert trial.pairs.tolist() == [[0, 1]]  # the other bad text is alone in its document
    assert set(trial.others) == {"good", "fine"}
    assert len(trial.others["good"][0].texts) == 8 and len(trial.neutral) == 4
    assert not set(trial.train.group.tolist()) & set(trial.test.group.tolist())
    with pytest.raises(UserError, match="got 'cat'"):
        make_trial(train, test, "cat")


def test_a_killed_run_of_the_suite_goes_on(tmp_path: Path) -> None:
    cells = [suite.Cell("paradetox", "gba", method, 0) for method in ("app", "mask", "range")]
    asked: list[str] = []

    def run(cell: suite.Cell) -> list[dict]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(cell.method)
        return [{"name": cell.method}]

    def key(cell: suite.Cell) -> str:
        return suite.cell_key(cell, suite.SIZES["reduced"], ["model"])

    path = tmp_path / "cells.jsonl"
    with pytest.raises(KeyboardInterrupt):
        suite.run_cells(cells, key, path, run)
    path.write_text(path.read_text() + '{"key": "cut sho\n')
    asked.clear()
    assert [row["name"] for row in suite.run_cells(cells, key, path, run)] == [
        "app", "mask", "range",
    ]  # fmt: skip
    assert asked == ["range"]
    assert key(cells[0]) != suite.cell_key(cells[0], suite.SIZES["full"], ["model"])


def goal_row(method: str, low: float, high: float, seed: int = 0, at: str = "80%") -> dict:
    return {
        "concept": "c", "method": method, "units": "u", "at": at, "strength": 1.0, "seed": seed,
        "perplexity_increase": (low + high) / 2, "perplexity_increase_low": low,
        "perplexity_increase_high": high, "draws": [low, (low + high) / 2, high],
        "kl_low": low / 10, "kl_high": high / 10,
    }  # fmt: skip


def test_the_goal_needs_intervals_apart_at_every_seed() -> None:
    def won(*rows: dict) -> tuple[float, ...]:
        """Concepts with intervals apart, with that of the difference below 0, least on average."""
        apart, paired, kl, least = (goal.value for goal in goals(list(rows)))
        assert kl == apart  # made in proportion
        return apart, paired, least

    assert won(goal_row("app", 1, 2), goal_row("leace", 3, 4)) == (1, 1, 1)
    assert won(goal_row("app", 1, 3.5), goal_row("leace", 3, 4)) == (0, 1, 1)
    assert won(goal_row("app", 1, 6), goal_row("leace", 3, 5)) == (0, 0, 1)
    assert won(goal_row("app", 5, 6), goal_row("leace", 3, 4)) == (0, 0, 0)
    assert won(goal_row("leace", 3, 4)) == (0, 0, 0)
    elsewhere = goal_row("leace", 9, 9, at="60%")
    assert won(goal_row("app", 5, 6), elsewhere) == (1, 1, 1)  # no rival gets there
    second = goal_row("app", 1, 5, 1), goal_row("leace", 4, 6, 1)
    assert won(goal_row("app", 1, 2), goal_row("leace", 3, 4), *second) == (0, 1, 1)
    never = goal_row("leace", 0, 0, 1) | {"strength": None}  # one seed never gets there
    assert won(goal_row("app", 1, 2), goal_row("leace", 0, 0), never) == (1, 1, 1)


def test_the_least_strength_is_found_between_points_of_the_grid(
    tiny_lm: LanguageModel, trial: Trial, direction: object
) -> None:
    reader = Reader(tiny_lm, HOOK)
    reached: dict[float, float] = {}
    found = least_strength(reader, direction, trial, 0.6, reached)
    assert found is not None and reached[found] >= 0.6
    smaller = [erased for strength, erased in reached.items() if strength < found]
    assert smaller and max(smaller) < 0.6
    assert least_strength(reader, Shift(), trial, 2.0, {}) is None  # more than everything


def test_readings_from_kept_states_are_those_of_whole_passes(tiny_lm: LanguageModel) -> None:
    edits = [Shift(2.0), PromptEdit("Be kind. "), Shift(0.0)]
    plain = read_plain(tiny_lm, TEXTS, HOOK)
    assert plain.can_resume
    whole = read_texts(tiny_lm, replace(plain, can_resume=False, logits={}), edits, HOOK)
    for fast, slow in zip(read_texts(tiny_lm, plain, edits, HOOK), whole, strict=True):
        assert np.abs(fast.nll - slow.nll).max() < 1e-3 * slow.nll.mean()
        assert np.abs(fast.kl - slow.kl).max() < 1e-4
        assert np.abs(fast.pooled - slow.pooled).max() < 1e-5
    elsewhere = read_plain(tiny_lm, TEXTS, "layers.4.out")  # behind the edit: a pass is needed
    with suppress(tiny_lm, Shift(2.0)):
        expected = pool_texts(tiny_lm, read_plain(tiny_lm, TEXTS, "layers.4.out"), [])[0]
    found = pool_texts(tiny_lm, elsewhere, [Shift(2.0)])
    assert np.abs(found[1] - expected).max() < 1e-5 < np.abs(found[0] - expected).max()


def test_erasure_is_that_of_the_whole_evaluation(
    tiny_lm: LanguageModel, trial: Trial, direction: object
) -> None:
    reader = Reader(tiny_lm, HOOK)
    curve = evaluate(tiny_lm, direction, trial, CONFIG, method="direction", reader=reader)
    found = erasure(reader, direction, trial, CONFIG.strengths)
    assert found.tolist() == curve.columns["erased_fixed"].tolist() and found[-1] > 0.6
    other = Reader(tiny_lm, "layers.4.out")
    with pytest.raises(UserError, match="a reader of layers.2.out, got one of layers.4.out"):
        evaluate(tiny_lm, direction, trial, CONFIG, method="direction", reader=other)
