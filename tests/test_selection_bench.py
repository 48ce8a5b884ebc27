"""The selection suite: its baselines against their own packages, its measures, its sums."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.spatial.distance import cdist

from benchmarks import (
    common,
    gradients,
    minilm,
    rivals,
    selection_goals,
    selection_measures,
    selection_steps,
    selection_table,
)
from benchmarks import selection as suite
from benchmarks.selection_measures import Measure, Setting, scores
from benchmarks.selection_steps import fit_step
from benchmarks.selection_table import Aim, Bench, Method
from sae_core.errors import UserError
from sae_core.models import LanguageModel
from tests.tiny_models import tiny_model

TEXTS = [
    "How many apples are left when Tom eats two apples of five apples?",
    "Write a Python function that adds two numbers.",
    "The cat sat on the mat and the dog sat on the cat.",
    "A train travels sixty miles; how many miles are left?",
    "Sort a list of numbers in Python and return the function.",
    "Summarise the dialogue between the cat and the dog.",
]
POOL = np.array([2, 3, 4, 5])
DRAWS = [np.array([0]), np.array([0, 1])]


# ---- lexical baselines against their packages ----


@pytest.fixture(scope="module")
def bm25() -> rivals.BM25:
    return rivals.BM25(TEXTS, POOL)


def package_scores(queries: list[str]) -> np.ndarray:
    import bm25s

    index = bm25s.BM25()
    pool: Any = bm25s.tokenize([TEXTS[i] for i in POOL], return_ids=False, show_progress=False)
    index.index(pool, show_progress=False)
    words: Any = bm25s.tokenize(queries, return_ids=False, show_progress=False)
    return np.stack([index.get_scores([w for w in row if w in index.vocab_dict]) for row in words])


def test_bm25_of_one_query_is_the_packages(bm25: rivals.BM25):
    assert bm25.scores([np.array([0])]) == pytest.approx(package_scores([TEXTS[0]]), rel=1e-5)


def test_the_mean_over_queries_is_the_concatenated_query_over_their_number(bm25: rivals.BM25):
    one = bm25.scores([np.array([0, 1])])
    assert one == pytest.approx(package_scores(TEXTS[:2]).mean(0)[None], rel=1e-5)
    joined = package_scores([f"{TEXTS[0]} {TEXTS[1]}"])
    assert one == pytest.approx(joined / 2, rel=1e-5)


def test_a_query_as_a_set_counts_a_term_once(bm25: rivals.BM25):
    once = package_scores(["how many apples left when tom eats two five"])
    assert bm25.scores([np.array([0, 0])], "set") == pytest.approx(once, rel=1e-5)
    queries = [np.array([2])]  # "sat" and "cat" come twice
    assert bm25.scores(queries, "set").max() < bm25.scores(queries).max()


def package_dsir(folder: Path, draw: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    from data_selection import HashedNgramDSIR, hashed_ngram_dsir

    monkeypatch.setattr(hashed_ngram_dsir, "tqdm", lambda rows, **_: rows)
    files = []
    for name, places in (("pool", POOL), ("target", draw)):
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": TEXTS[i]}) + "\n" for i in places))
    pool, target = map(str, files)
    dsir = HashedNgramDSIR(
        [pool], [target], str(folder / "cache"), num_proc=1, min_example_length=1
    )
    dsir.fit_importance_estimator(num_tokens_to_fit="all")
    dsir.compute_importance_weights()
    return np.load(folder / "cache" / "log_importance_weights" / "0.npy")


def test_dsir_weights_are_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counts = rivals.dsir_counts(TEXTS)
    found = rivals.dsir_scores(counts, POOL, DRAWS)
    for number, draw in enumerate(DRAWS):
        folder = tmp_path / str(number)
        folder.mkdir()
        expected = package_dsir(folder, draw, monkeypatch)
        assert found[number] == pytest.approx(expected, rel=1e-4)


def test_tuned_dsir_does_not_prefer_short_rows_that_share_nothing():
    texts = ["alpha beta gamma delta", "unlike", "alpha beta gamma delta and a tail of words"]
    counts = rivals.dsir_counts(texts)
    pool, draws = np.array([1, 2]), [np.array([0])]
    assert rivals.dsir_scores(counts, pool, draws)[0].argmax() == 0
    assert rivals.dsir_scores(counts, pool, draws, is_tuned=True)[0].argmax() == 1


def test_prototypes_take_turns_and_skip_what_is_taken():
    similarity = np.array([[9, 8, 1, 0], [7, 6, 5, 0]], dtype=np.float32)
    order = np.argsort(-rivals.round_robin(similarity, [np.array([0, 1])], 3)[0])
    assert order.tolist() == [0, 1, 2, 3]
    similarity[1] = [9, 0, 8, 7]  # takes row 2 in its turn, since row 0 is taken
    order = np.argsort(-rivals.round_robin(similarity, [np.array([0, 1])], 4)[0])
    assert order.tolist() == [0, 2, 1, 3]


# ---- model baselines ----


def test_bert_is_that_of_transformers_and_blind_to_padding():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    weights = dict(model.state_dict())
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        found = minilm.bert_hidden(weights, ids, mask, 3)
        alone = minilm.bert_hidden(weights, ids[1:, :5], mask[1:, :5], 3)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1:, :5], alone, atol=1e-5, rtol=1e-4)


def test_batches_hold_every_place_once_within_their_tokens():
    lengths = np.random.default_rng(0).integers(1, 60, 300).tolist()
    batches = list(minilm.batches_by_length(lengths, 100))
    assert sorted(place for batch in batches for place in batch) == list(range(300))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return LanguageModel(tiny_model("llama"), None, "tiny", "none")


EXAMPLES = [([1, 7, 9, 30, 31], 2), ([1, 5, 80, 6, 44, 45, 46, 2], 5), ([1, 12, 13], 1)]


def true_gradients(lm: LanguageModel, n_blocks: int) -> np.ndarray:
    """Gradients of the mean loss over the response, by autograd on the weights themselves."""
    weights = [block.mlp.down_proj.weight for block in lm.model.model.layers[-n_blocks:]]
    found = []
    for weight in weights:
        weight.requires_grad_(True)
    for ids, n_prompt in EXAMPLES:
        batch = torch.tensor([ids])
        logits = lm.model(input_ids=batch).logits[0, n_prompt - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, batch[0, n_prompt:])
        grads = torch.autograd.grad(loss, weights)
        found.append(np.concatenate([g.numpy().ravel() for g in grads]))
    for weight in weights:
        weight.requires_grad_(False)
    return np.stack(found)


def test_gradient_features_keep_the_gradients_cosines(llama: LanguageModel):
    exact = selection_steps.unit(true_gradients(llama, 2))
    exact = exact @ exact.T
    found = np.mean(
        [(x := gradients.gradient_features(llama, EXAMPLES, sketch=(64, 64), seed=s)) @ x.T
         for s in range(20)], axis=0,
    )  # fmt: skip
    # cosines of 2 x 1,536 numbers through 4,096 random signs, twenty times: error about 0.01
    assert found == pytest.approx(exact, abs=0.04)
    assert np.ptp(exact) > 0.5, "control: the rows differ"


def test_gradient_features_do_not_depend_on_the_batch_and_leave_no_hook(llama: LanguageModel):
    together = gradients.gradient_features(llama, EXAMPLES)
    alone = [gradients.gradient_features(llama, [one])[0] for one in EXAMPLES]
    assert together == pytest.approx(np.stack(alone), abs=1e-5)
    block = llama.model.model.layers[-2]
    assert not block._forward_pre_hooks and not block.mlp.down_proj._forward_hooks
    assert gradients.gradient_features(llama, EXAMPLES, seed=1) != pytest.approx(together, abs=1e-3)


# ---- measures ----


def setting(matrix: Any, pool: np.ndarray, labels: Any = None, lengths: Any = None) -> Setting:
    n = matrix.shape[0]
    labels = np.zeros(n, dtype=int) if labels is None else np.asarray(labels)
    lengths = np.full(n, 8) if lengths is None else np.asarray(lengths)
    return Setting(matrix, pool, labels, lengths, len(pool))


@pytest.fixture
def codes() -> sparse.csr_array:
    rng = np.random.default_rng(0)
    x = rng.gamma(1.0, 1.0, (60, 30)) * (rng.random((60, 30)) < 0.3)
    return sparse.csr_array(x.astype(np.float32))


POOL_60 = np.arange(10, 60)
DRAWS_60 = [np.arange(5), np.arange(3, 9)]


def test_jaccard_is_minima_over_maxima(codes: sparse.csr_array):
    x = codes.toarray().astype(np.float64)
    found = scores(Measure("m", "x", "jaccard"), setting(codes, POOL_60), DRAWS_60)
    for row, draw in zip(found, DRAWS_60, strict=True):
        z = x[draw].mean(0)
        expected = np.minimum(x[POOL_60], z).sum(1) / np.maximum(x[POOL_60], z).sum(1)
        assert row == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("metric", "known"), [("cosine", "cosine"), ("l2", "sqeuclidean")])
def test_other_metrics_are_those_of_scipy(codes: sparse.csr_array, metric: str, known: Any):
    x = codes.toarray().astype(np.float64)
    found = scores(Measure("m", "x", metric), setting(codes, POOL_60), DRAWS_60)
    prototypes = np.stack([x[draw].mean(0) for draw in DRAWS_60])
    distance = cdist(prototypes, x[POOL_60], known)
    assert found == pytest.approx(1 - distance if metric == "cosine" else -distance, abs=1e-5)


def test_log_odds_on_shares_is_tuned_dsir(codes: sparse.csr_array):
    counts = sparse.csr_array((codes > 0.5).astype(np.float32))
    padded = sparse.csr_array((counts.data, counts.indices, counts.indptr), shape=(60, 10_000))
    # both average: dsir over tokens, log odds over rows; one example and a pool of rows of one
    # length make these the same
    x = np.eye(30, dtype=np.float32)[np.random.default_rng(1).integers(0, 30, 60)]
    padded = sparse.csr_array(np.pad(x, ((0, 0), (0, 9970))))
    found = scores(Measure("m", "x", "log_odds", ("l1",)), setting(x, POOL_60), [np.array([3])])
    expected = rivals.dsir_scores(padded, POOL_60, [np.array([3])], is_tuned=True)
    assert found == pytest.approx(expected, abs=1e-3)
    assert len(np.unique(found)) == 2


@pytest.mark.parametrize("metric", selection_steps.METRICS)
def test_sparse_dense_and_any_block_give_the_same(
    codes: sparse.csr_array, metric: str, monkeypatch: pytest.MonkeyPatch
):
    measure = Measure("m", "x", metric, ("idf", "sqrt"))
    one = scores(measure, setting(codes, POOL_60), DRAWS_60)
    for module in (selection_measures, selection_steps):
        monkeypatch.setattr(module, "BLOCK", 7)
    monkeypatch.setattr(selection_measures, "MAX_PROTOTYPES", 4)
    monkeypatch.setattr(selection_measures, "MAX_KEPT", 0)
    assert scores(measure, setting(codes.toarray(), POOL_60), DRAWS_60) == pytest.approx(one, 1e-4)
    each = replace(measure, groups="each", strategy="mean")
    x = scores(each, setting(codes, POOL_60), DRAWS_60)
    is_linear = metric == "dot"
    assert x.shape == one.shape and (x == pytest.approx(one, abs=1e-3)) == is_linear


def step(name: str, x: np.ndarray) -> np.ndarray:
    return fit_step(name, lambda: iter([x[:20], x[20:]]))(x)


def test_steps_do_what_they_say(codes: sparse.csr_array):
    x = codes.toarray()
    assert step("centre", x).mean(0) == pytest.approx(np.zeros(30), abs=1e-6)
    assert step("standardise", x).std(0) == pytest.approx(np.ones(30), abs=1e-4)
    weight = np.log(61 / ((x > 0).sum(0) + 1))
    assert step("idf", x) == pytest.approx(x * weight, abs=1e-5)
    assert step("idf2", x) == pytest.approx(x * weight**2, abs=1e-5)
    assert step("l1", x).sum(1) == pytest.approx(np.ones(60), abs=1e-5)
    assert np.linalg.norm(step("unit", x), axis=1) == pytest.approx(np.ones(60), abs=1e-5)
    white = step("whiten:1e-6", x).astype(np.float64)
    assert white.T @ white / 60 == pytest.approx(np.eye(30), abs=1e-2)
    assert step("sqrt", x) ** 2 == pytest.approx(x, abs=1e-5)
    assert step("power:0.5", x) == pytest.approx(step("sqrt", x), abs=1e-6)
    assert step("excess", x) == pytest.approx(np.maximum(x - x.mean(0), 0), abs=1e-6)
    assert (step("binary", x) == (x > 0)).all()
    signed = x - 1
    assert step("split", signed)[:, :30] - step("split", signed)[:, 30:] == pytest.approx(signed)
    best = step("top3", x)
    assert ((best > 0).sum(1) == 3).all() and (best.max(1) == x.max(1)).all()
    assert step("top99", x) is x


def test_steps_are_fitted_on_the_pool_alone(codes: sparse.csr_array):
    other = codes.toarray()
    other[:9] *= 7  # rows of the examples
    centre = Measure("m", "x", "l2", ("centre",))
    a = scores(centre, setting(codes.toarray(), POOL_60), [np.array([9])])
    assert scores(centre, setting(other, POOL_60), [np.array([9])]) == pytest.approx(a)


def planted(n: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, 40], topic of each row): topic t fires mostly in latents 10 t to 10 t + 9."""
    rng = np.random.default_rng(seed)
    topic = np.arange(n) % 4
    rate = np.where(np.arange(40)[None] // 10 == topic[:, None], 0.7, 0.15)
    return (rng.gamma(2.0, 1.0, (n, 40)) * (rng.random((n, 40)) < rate)).astype(np.float32), topic


EVERY_MEASURE = [m for m in suite.own_measures(("x",)) if m.metric != "l2"]


@pytest.mark.parametrize("measure", EVERY_MEASURE, ids=lambda m: m.name)
def test_a_planted_topic_is_found(measure: Measure):
    x, topic = planted()
    is_pool = np.arange(120) >= 40
    pool, draw = np.flatnonzero(is_pool), np.flatnonzero(~is_pool & (topic == 1))
    found = scores(measure, setting(x, pool, topic, np.full(120, 9)), [draw])[0]
    best = np.argsort(-found)[: (topic[pool] == 1).sum()]
    assert (topic[pool][best] == 1).mean() > 0.6  # 0.25 by chance


def test_groups_that_take_turns_find_both_halves_of_a_mixture():
    x, topic = planted()
    x[topic == 0] *= 3  # its rows draw the one prototype to themselves
    pool = np.flatnonzero((np.arange(120) >= 40) & (topic != 3))
    draw = np.array([0, 1, 4, 5, 8, 9])  # topics 0 and 1
    at = setting(x, pool, topic)

    def shares(**settings: Any) -> list[int]:
        found = scores(Measure("m", "x", "cosine", **settings), at, [draw])[0]
        picks = topic[pool][np.argsort(-found, kind="stable")[:20]]
        return [int((picks == t).sum()) for t in (0, 1)]

    assert shares(groups="label", strategy="round_robin") == pytest.approx([10, 10], abs=1)
    assert shares(groups="kmeans2", strategy="round_robin") == pytest.approx([10, 10], abs=1)
    assert shares()[1] < 5, "control: one prototype finds one half"


def test_several_prototypes_make_one_score():
    likeness = np.array([[1, 5], [3, 1], [9, 9]], dtype=np.float32)
    owner = [np.array([0, 1]), np.array([2])]
    for strategy, expected in (("max", [[3, 5], [9, 9]]), ("mean", [[2, 3], [9, 9]])):
        found = selection_measures.combined(likeness, owner, strategy, 2)
        assert found.tolist() == expected


def test_strata_keep_the_examples_lengths():
    rng = np.random.default_rng(0)
    lengths = np.array([4] * 30 + [40] * 30)
    scored = rng.random((1, 50)).astype(np.float32)
    scored[0, lengths[POOL_60] == 40] += 1  # the long come first
    at = setting(np.zeros((60, 1)), POOL_60, None, lengths)
    found = selection_measures.stratified(scored, at, [np.array([0, 1, 2, 59])])
    picks = np.argsort(-found[0], kind="stable")[:12]
    assert (lengths[POOL_60][picks] == 4).sum() == 9  # three quarters
    inside = [p for p in picks if lengths[POOL_60][p] == 4]
    best = np.argsort(-np.where(lengths[POOL_60] == 4, scored[0], -1), kind="stable")[:9]
    assert sorted(inside) == sorted(best)


@pytest.mark.parametrize(
    "changes",
    [{"metric": "dice"}, {"steps": ("wash",)}, {"strategy": "vote", "groups": "each"},
     {"groups": "some"}, {"metric": "jaccard", "steps": ("centre",)}],
)  # fmt: skip
def test_a_measure_that_does_not_exist_is_refused(codes: sparse.csr_array, changes: dict):
    with pytest.raises(UserError, match="Expected"):
        scores(replace(Measure("m", "x"), **changes), setting(codes, POOL_60), DRAWS_60)


# ---- the table ----


def test_precision_counts_hits_among_the_first():
    is_hit = np.zeros(200, dtype=bool)
    is_hit[:4] = True
    order = np.concatenate([[0, 1, 100, 2, 101], np.setdiff1d(np.arange(200), [0, 1, 2, 100, 101])])
    found = selection_table.precision(order, is_hit)
    assert found == {"p1": 1.0, "p5": 0.4, "p10": 0.2, "r_precision": 0.75}
    assert selection_table.ceilings(is_hit) == {
        "ceiling_p1": 1.0, "ceiling_p5": 0.4, "ceiling_p10": 0.2,
    }  # fmt: skip


def test_draws_leave_a_third_of_the_members_and_differ_by_seed():
    members = np.arange(100, 130)
    one = selection_table.drawn(members, 32, (0, 0))
    assert len(np.unique(one)) == 20 and set(one) <= set(members)
    assert (one == selection_table.drawn(members, 32, (0, 0))).all()
    assert set(one) != set(selection_table.drawn(members, 32, (1, 0)))
    assert len(selection_table.drawn(np.arange(400), 32, (0, 0))) == 32


def test_interval_is_students():
    mean, low, high = selection_table.interval(np.array([1.0, 2.0, 3.0]))
    # t(.975, 2) = 4.303, sd 1
    assert (mean, high - mean, mean - low) == pytest.approx(
        (2, 4.303 / 3**0.5, 4.303 / 3**0.5), 1e-3
    )


def test_diversity_of_picks():
    pairs = selection_table.pair_ids(["a b a b", "c d"])
    assert selection_table.distinct_share(pairs) == 3 / 4  # ab, ba, ab, cd
    assert selection_table.distinct_share(pairs, n=2) == 1
    assert selection_table.distinct_share([]) == 0
    assert selection_table.effective_number(np.array(["a", "a", "b", "b"])) == pytest.approx(2)
    assert selection_table.effective_number(np.array(["a"] * 4)) == pytest.approx(1)


class Row(NamedTuple):
    source: str
    label: str


@dataclass(frozen=True, eq=False)
class Target:
    members: np.ndarray
    relevant: np.ndarray


@dataclass(frozen=True, eq=False)
class Data:
    rows: list
    pool: np.ndarray
    targets: dict
    n_tokens: np.ndarray
    folder: Path

    def representation(self, name: str) -> np.ndarray:
        return planted(200)[0] if name == "topics" else np.ones((200, 3), dtype=np.float32)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    topic = planted(200)[1]
    names = ["bbh:snarks", "bbh:ruins", "gsm8k", "flan:qasc"]
    rows = [Row(names[t].partition(":")[0], names[t]) for t in topic]
    held = np.arange(200) < 80
    targets = {
        name: Target(np.flatnonzero(held & (topic == t)), np.flatnonzero(~held & (topic == t)))
        for t, name in enumerate(names[:3])
    }
    lengths = np.full(200, 12) + topic
    data = Data(rows, np.flatnonzero(~held), targets, lengths, tmp_path)
    return suite.make_bench(
        data, tuple(f"words of {names[t]} number {i}" for i, t in enumerate(topic))
    )


def topics(name: str = "topics", family: str = "ours") -> Method:
    return suite.from_measure(Measure(name, "topics", family=family))


def blind(name: str = "blind") -> Method:
    return suite.from_measure(Measure(name, "ones", family="baseline"))


def test_no_example_of_a_target_is_a_pool_row_and_mixtures_hold_all(bench: Bench):
    assert [(aim.name, aim.kind) for aim in bench.aims] == [
        ("bbh:snarks", "target"), ("bbh:ruins", "target"), ("gsm8k", "target"),
        ("mix:bbh", "mixture"), ("mix:all", "mixture"),
    ]  # fmt: skip
    for aim in bench.aims:
        assert len(aim.draws) == 10
        assert not any(np.isin(draw, bench.data.pool).any() for draw in aim.draws)
    one, two, _, both, every = bench.aims
    assert (both.is_hit == (one.is_hit | two.is_hit)).all() and len(both.draws[0]) == 6
    assert every.is_hit.sum() == 90 and len(every.draws[0]) == 9


def test_rows_tell_means_paired_differences_and_the_worst_target(bench: Bench):
    methods = [topics(), blind()]
    found = selection_table.evaluate(bench, methods)
    assert list(found) == ["topics", "blind"]
    good, bad = selection_table.method_rows(bench, methods, found, "tiny")
    target = slice(0, 3)
    gap = (found["topics"]["p5"] - found["blind"]["p5"])[target]
    assert good["p5_best"] == "blind" and good["p5_over_best"] == pytest.approx(gap.mean())
    low = selection_table.interval(gap.mean(0))[1]
    assert good["p5_over_best_low"] == pytest.approx(low)
    assert good["p5_over_best_t_low"] == pytest.approx(selection_table.interval(gap.mean(1))[1])
    assert good["r_precision"] > 0.8 and good["r_precision_below_chance"] == 0
    assert good["r_bbh"] == pytest.approx(found["topics"]["r_precision"][:2].mean())
    assert good["r_mix:bbh"] == pytest.approx(found["topics"]["r_precision"][3].mean())
    worst = (found["blind"]["r_precision"][target].mean(1) - 0.25).min()
    assert bad["r_precision_worst_over_chance"] == pytest.approx(worst)
    assert bad["r_precision_over_best"] == 0
    assert 12 < good["tokens"] < 15 and good["sources"] < bad["sources"]


def test_a_row_for_each_method_and_target(bench: Bench):
    methods = [topics(), blind()]
    found = selection_table.evaluate(bench, methods)
    rows = selection_goals.target_rows(bench, methods, found, "tiny")
    assert len({row["name"] for row in rows}) == 2 * len(bench.aims) == len(rows)
    first = rows[0]
    assert (first["target"], first["hits"], first["chance"]) == ("bbh:snarks", 30, 0.25)
    assert first["ceiling_p10"] == 1 and first["best"] == "blind"
    gap = found["topics"]["r_precision"][0] - found["blind"]["r_precision"][0]
    assert first["over_best"] == pytest.approx(gap.mean())


def test_goals_are_met_by_the_better_and_not_by_the_worse(bench: Bench):
    head = selection_goals.HEADLINE[0]
    for methods, is_better in (([topics(head), blind()], True),
                               ([topics("rival", "baseline"), replace(blind(head), family="ours")],
                                False)):  # fmt: skip
        found = selection_table.evaluate(bench, methods)
        goals = selection_goals.goals(selection_table.method_rows(bench, methods, found, "tiny"))
        assert len(goals) == 5 and all(goal.met == is_better for goal in goals)


def test_scores_that_are_not_numbers_are_refused(bench: Bench):
    def broken(bench: Bench, draws: Any) -> np.ndarray:
        return np.full((len(draws), len(bench.data.pool)), np.nan, dtype=np.float32)

    with pytest.raises(ValueError, match="broken gave scores"):
        selection_table.evaluate(bench, [Method("broken", "ours", broken)])


def test_results_are_written_and_merged(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    suite.write(bench, [*suite.lexical_methods(bench), topics()], "tiny", 0.0)
    suite.write(bench, [blind()], "tiny", 0.0)
    rows = json.loads((tmp_path / "selection.json").read_text())["rows"]
    assert {"tiny-random", "tiny-dsir", "tiny-topics", "tiny-blind"} <= {r["name"] for r in rows}
    by_name = {row["method"]: row for row in rows}
    # the texts name their target, so every lexical baseline finds all of it
    assert by_name["bm25-mean"]["r_precision"] > 0.9 > by_name["random"]["r_precision"]
    assert abs(by_name["random"]["r_precision"] - 0.25) < 0.08
    targets = json.loads((tmp_path / "selection_targets.json").read_text())["rows"]
    shown = {"random", "bm25-mean", "dsir", "dsir-tuned"}
    assert {row["method"] for row in targets} == shown and len(targets) == 5 * len(shown)
    assert "tiny-topics" in capsys.readouterr().out


def test_features_are_made_once_for_the_same_texts(tmp_path: Path):
    calls = []

    def make() -> np.ndarray:
        calls.append(1)
        return np.arange(3)

    for texts in (["a", "b"], ["a", "b"], ["a", "c"]):
        assert suite.kept(tmp_path, "x", texts, make).tolist() == [0, 1, 2]
    assert len(calls) == 2


def test_the_sub_pool_keeps_hits_and_drops_mixtures(bench: Bench):
    small = suite.sub_bench(bench, 80, ("bbh:snarks", "gsm8k"))
    assert len(small.data.pool) == 80 and [aim.name for aim in small.aims] == [
        "bbh:snarks",
        "gsm8k",
    ]
    hits = sum(aim.is_hit.sum() for aim in small.aims)
    assert hits == 40  # half of the pool, of 60 hits
    assert isinstance(small.aims[0], Aim) and set(small.data.pool) <= set(bench.data.pool)


def test_codes_are_cut_to_the_largest_of_each_token():
    from benchmarks.selection_layers import largest
    from sae_core.kernels.codes import codes_where

    dense = torch.tensor([[3.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 5.0]])
    cut = largest(codes_where(dense > 0, dense), 2).to_dense()
    wanted = [[3, 0, 0, 2], [0, 0, 0, 0], [1, 0, 0, 5]]
    assert cut.tolist() == wanted
    assert torch.equal(largest(codes_where(dense > 0, dense), 4).to_dense(), dense)
