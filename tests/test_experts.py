"""Which experts serve a domain, and what deleting them does: by hand, planted, and trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from sae_apps.experts import (
    ExpertUse,
    UseStats,
    assign_experts,
    correlated_experts,
    matched_random,
    measure_damage,
    measure_use,
    text_losses,
)
from sae_apps.experts.damage import Damage
from sae_core.errors import UserError
from sae_core.kernels.codes import Codes, codes_where
from sae_core.models import LanguageModel, load_model
from sae_core.monet.masks import ExpertMask
from sae_core.monet.routing import expert_routing
from tests.tiny_monet import WORDS, save_monet, tiny_monet

ENGLISH, GERMAN = WORDS[1:16], WORDS[16:33]


def use_of(weight: np.ndarray, n_tokens: np.ndarray, count: np.ndarray | None = None) -> ExpertUse:
    count = 100 * (weight > 0) if count is None else count
    arrays = [sparse.csr_array(one.astype(np.float32)) for one in (weight, count)]
    return ExpertUse(arrays[0], arrays[1], n_tokens)


# ---- use ----


def codes_of(dense: np.ndarray) -> Codes:
    x = torch.from_numpy(dense.astype(np.float32))
    return codes_where(x > 0, x)


def test_use_adds_up_tokens_by_document_and_merges() -> None:
    dense = np.array([[0.5, 0], [0.25, 0.1], [0, 0.2], [0, 0]])
    ids, places = torch.tensor([1, 1, 0, 2]), torch.tensor([0, 1, 0, 0], dtype=torch.int32)
    whole, first, second = UseStats(2), UseStats(2), UseStats(2)
    whole.update(codes_of(dense), ids, places)
    first.update(codes_of(dense[:2]), ids[:2], places[:2])
    second.update(codes_of(dense[2:]), ids[2:], places[2:])
    first.merge(second)
    for stats in (whole, first):
        use = stats.compute(4)
        assert np.allclose(use.weight.toarray(), [[0, 0.2], [0.75, 0.1], [0, 0], [0, 0]])
        assert np.array_equal(use.count.toarray(), [[0, 1], [2, 1], [0, 0], [0, 0]])
        assert use.n_tokens.tolist() == [1, 2, 1, 0]


# ---- assignment ----


def test_an_expert_belongs_to_a_domain_at_twice_the_second_score() -> None:
    weight = np.array([[4.0, 4.0, 4.0, 0.0], [2.0, 2.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    use = use_of(weight, np.array([10, 10, 10]))
    found = assign_experts(use, ["a", "b", "c"], permutations=0)
    assert found.domain.tolist() == [0, -1, 0, -1]  # exactly twice counts, 1.9 times does not
    assert found.of("a").tolist() == [0, 2] and found.n_experts.tolist() == [2, 0, 0]
    assert np.allclose(found.mass, weight.sum(0) / 30)
    rare = use_of(weight, np.array([10, 10, 10]), np.array([[19, 20, 20, 0]] * 1 + [[0] * 4] * 2))
    assert assign_experts(rare, ["a", "b", "c"], permutations=0).domain.tolist() == [-1, -1, 0, -1]


def test_scores_are_ratios_of_sums_so_long_documents_count_by_their_tokens() -> None:
    use = use_of(np.array([[9.0], [1.0], [4.0]]), np.array([90, 10, 10]))
    found = assign_experts(use, ["a", "a", "b"], permutations=0)
    assert np.allclose(found.score[:, 0], [0.1, 0.4])  # not the mean of .1 and .1 by documents
    assert found.of("b").tolist() == [0]


@given(st.permutations(range(12)))
def test_the_order_of_documents_makes_no_difference(order: list[int]) -> None:
    rng = np.random.default_rng(0)
    weight, tokens = rng.random((12, 30)) ** 4, rng.integers(5, 50, 12)
    labels = ["ab"[i % 2] for i in range(12)]
    a = assign_experts(use_of(weight, tokens), labels, permutations=0)
    b = assign_experts(use_of(weight[order], tokens[order]), [labels[i] for i in order],
                       permutations=0)  # fmt: skip
    assert np.array_equal(a.domain, b.domain)


def test_permuted_labels_say_how_many_experts_chance_gives() -> None:
    rng = np.random.default_rng(1)
    weight, tokens = rng.random((60, 40)) ** 6, np.full(60, 50)
    labels = ["a", "b"] * 30
    weight[::2, :15] *= 8  # planted: fifteen experts of a
    found = assign_experts(use_of(weight, tokens), labels, permutations=99, seed=0)
    assert set(range(15)) <= set(found.of("a").tolist())
    assert found.p[0] <= 0.02 and found.null_mean[0] < 5
    shuffled = [labels[i] for i in rng.permutation(60)]
    chance = assign_experts(use_of(weight, tokens), shuffled, permutations=99, seed=0)
    assert chance.p[0] > 0.05
    again = assign_experts(use_of(weight, tokens), labels, permutations=99, seed=0)
    assert np.array_equal(found.null_mean, again.null_mean)
    other = assign_experts(use_of(weight, tokens), labels, permutations=99, seed=1)
    assert not np.array_equal(found.null_mean, other.null_mean)


def test_bad_domains_are_refused() -> None:
    use = use_of(np.ones((3, 2)), np.array([5, 5, 0]))
    for labels, message in (
        (["a", "b"], "one label for each of 3 documents, got 2"),
        (["a", "a", "a"], "at least two domains, got a"),
        (["a", "a", "b"], "tokens in every domain, got none in b"),
    ):
        with pytest.raises(UserError, match=message):
            assign_experts(use, labels)
    with pytest.raises(UserError, match="ratio above 1, got 1"):
        assign_experts(use, ["a", "b", "a"], ratio=1.0)
    with pytest.raises(UserError, match="one of a, b, got 'c'"):
        assign_experts(use, ["a", "b", "a"], permutations=0).of("c")


# ---- correlation ----


def test_correlations_are_those_of_numpy() -> None:
    rng = np.random.default_rng(2)
    weight, tokens = rng.random((50, 9)) * (rng.random((50, 9)) < 0.5), rng.integers(1, 30, 50)
    # the same mean weight everywhere, to the rounding of float32: no correlation is defined
    weight[:, 8] = tokens * 0.3
    score = rng.random(50)
    weight[:, 0] = tokens * score  # mean weight is the score
    tokens[7] = 0
    chosen, r = correlated_experts(use_of(weight * (tokens > 0)[:, None], tokens), score, 0.2)
    kept = tokens > 0
    mean = weight[kept, :8] / tokens[kept, None]
    want = [np.corrcoef(column, score[kept])[0, 1] for column in mean.T]
    assert np.allclose(r[:8], want, atol=1e-5) and r[8] == 0
    assert r[0] == pytest.approx(1) and chosen.tolist() == np.flatnonzero(r >= 0.2).tolist()
    count = np.where(weight > 0, 1, 0)
    count[:, 0] = 0  # too rare to tell
    rare, none = correlated_experts(use_of(weight, tokens, count), score, 0.2, min_tokens=1)
    assert none[0] == 0 and 0 not in rare


def test_scores_that_do_not_fit_are_refused() -> None:
    use = use_of(np.ones((3, 2)), np.array([5, 5, 5]))
    for score, threshold, message in (
        ([1.0, 2.0], 0.2, "each of 3 documents, got 2"),
        ([1.0, 2.0, np.nan], 0.2, "got 3 of which 2 finite"),
        ([1.0, 1.0, 1.0], 0.2, "scores that differ"),
        ([1.0, 2.0, 3.0], 0.0, r"threshold in \(0, 1\], got 0"),
    ):
        with pytest.raises(UserError, match=message):
            correlated_experts(use, score, threshold)


# ---- matched random experts ----


def test_random_experts_carry_the_mass_of_the_chosen() -> None:
    mass = np.random.default_rng(3).random(2000) ** 3
    mass[:500] = 0
    chosen = np.arange(900, 1000)
    found = matched_random(mass, chosen, seed=0)
    assert not set(found.tolist()) & set(chosen.tolist()) and (mass[found] > 0).all()
    assert mass[found].sum() == pytest.approx(mass[chosen].sum(), abs=mass.max())
    assert (np.diff(found) > 0).all()
    assert np.array_equal(found, matched_random(mass, chosen, seed=0))
    assert not np.array_equal(found, matched_random(mass, chosen, seed=1))
    heavy = matched_random(mass, np.arange(600, 2000), seed=0)  # the others have less
    assert heavy.tolist() == list(range(500, 600))
    assert len(matched_random(mass, np.arange(10))) == 0  # chosen without mass
    with pytest.raises(UserError, match="at least 0, got -1"):
        matched_random(np.array([-1.0]), np.array([0]))


# ---- a model that was trained on two languages ----


def sentences(words: list[str], n: int, seed: int) -> list[str]:
    """Two-word patterns: each word is followed by one of two of its language."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        place, chosen = int(rng.integers(len(words))), []
        for _ in range(12):
            chosen.append(words[place])
            place = (place * 2 + int(rng.integers(2))) % len(words)
        texts.append(" ".join(chosen))
    return texts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Two hundred steps on English and German sentences."""
    model = tiny_monet(moe_aux=0.01, num_hidden_layers=2)
    lm = load_model(str(save_monet(tmp_path_factory.mktemp("trained"), model)))
    texts = sentences(ENGLISH, 400, 0) + sentences(GERMAN, 400, 1)
    ids = torch.tensor(lm.tokenizer(texts)["input_ids"])
    lm.model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        batch = ids[torch.randint(0, len(ids), (32,), generator=generator)]
        lm.model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lm.model.requires_grad_(False).eval()
    return lm


def test_deleting_the_experts_of_a_language_hurts_that_language(trained: LanguageModel) -> None:
    texts = sentences(ENGLISH, 60, 2) + sentences(GERMAN, 60, 3)
    labels = ["en"] * 60 + ["de"] * 60
    use = measure_use(trained, {0: expert_routing(trained.model, 0, 0.0)}, texts)[0]
    found = assign_experts(use, labels, permutations=9)
    masks = {name: ExpertMask(8, {0: found.of(name)}) for name in ("de", "en")}
    masks["random"] = ExpertMask(8, {0: matched_random(found.mass, found.of("en"), 0)})
    fresh = sentences(ENGLISH, 40, 4) + sentences(GERMAN, 40, 5)
    damage = measure_damage(trained, fresh, ["en"] * 40 + ["de"] * 40, masks, n_boot=50)
    assert damage.domains == ("de", "en") and damage.masks == ("de", "en", "random")
    own = np.diag(damage.rise[:2])
    assert (own > 0).all() and (own > 2 * damage.rise[[0, 1], [1, 0]]).all()
    assert damage.rise[1, 1] > damage.rise[2, 1]  # more than random experts of equal mass
    assert (damage.low <= damage.rise).all() and (damage.rise <= damage.high).all()


def test_losses_are_those_of_each_text_alone_whatever_the_padding(trained: LanguageModel) -> None:
    texts = ["the cat sees", *sentences(GERMAN, 3, 6), "a", "der hund mag die katze"]
    nll, n_tokens = text_losses(trained, texts)
    assert n_tokens.tolist() == [2, 11, 11, 11, 0, 4] and nll[4] == 0
    for place, text in enumerate(texts):
        if n_tokens[place]:
            ids = trained.tokenizer(text, return_tensors="pt")["input_ids"]
            alone = trained.model(input_ids=ids, labels=ids).loss
            assert nll[place] == pytest.approx(float(alone) * n_tokens[place], rel=1e-4)


def test_selectivity_is_own_rise_over_the_mean_of_the_others() -> None:
    plain, masked = np.array([10.0, 10.0, 20.0]), np.array([[15.0, 10.5, 20.5], [9.0, 11.0, 20.0]])
    damage = Damage(("a", "b", "c"), ("a", "b"), plain, masked, masked, masked)
    assert damage.selectivity("a", "a") == pytest.approx(10)
    assert damage.selectivity("b", "b") is None  # the others gained
    with pytest.raises(UserError, match="a mask of a, b and a domain of a, b, c, got 'x' and 'a'"):
        damage.selectivity("x", "a")


def test_selection_runs_on_a_monet_model_end_to_end(trained: LanguageModel, tmp_path: Path) -> None:
    from sae_apps.selection import SelectConfig, select
    from sae_apps.selection.encoder import EmbedConfig, Encoder

    embed = EmbedConfig(form="plain")
    routing = expert_routing(trained.model, 0)
    encoder = Encoder(trained, routing, routing.hook_point, embed)
    pool = [{"prompt": t, "response": t} for w, s in ((ENGLISH, 7), (GERMAN, 8))
            for t in sentences(w, 30, s)]  # fmt: skip
    targets = [{"prompt": t, "response": t} for t in sentences(GERMAN, 10, 9)]
    found = select(pool, targets, encoder, "20 rows", config=SelectConfig(embed=embed))
    assert all(row >= 30 for row in found.picks["row_id"].to_pylist())


def test_what_cannot_be_measured_is_refused(trained: LanguageModel) -> None:
    mask = {"x": ExpertMask(8, {0: np.array([1])})}
    with pytest.raises(UserError, match="got 1 texts, 2 labels and 1 masks"):
        measure_damage(trained, ["the cat"], ["a", "b"], mask)
    with pytest.raises(UserError, match="tokens in every domain, got none in b"):
        measure_damage(trained, ["the cat", "a"], ["a", "b"], mask)
    with pytest.raises(UserError, match="documents and routers, got 0 and 1"):
        measure_use(trained, {0: expert_routing(trained.model, 0)}, [])
    with pytest.raises(UserError, match="units 'experts', got 'halves'"):
        measure_use(trained, {0: expert_routing(trained.model, 0, units="halves")}, ["the cat"])
