"""The conditions on data where each is known to hold and to fail; laws of their statistics."""

from dataclasses import fields, replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from benchmarks.verdict import roc_auc
from sae_core import cooccurrence
from sae_core.conditions import Conditions, ConditionStats, measure_conditions
from sae_core.errors import UserError
from sae_core.modes import upper_mode
from sae_core.sae import SAE, SAEConfig
from sae_core.synthetic import Planted, PlantedConfig, plant
from sae_core.theory import Condition, judge, n_features, random_coherence
from sae_core.verdict import (
    CAUSES,
    FLAGS,
    ONE_RUN,
    RARE,
    SEVERAL_RUNS,
    reason,
    terms,
    verdict,
)

N_TOKENS = 8192
# Sums of float32 products in another order: relative differences of about 1e-6.
FLOAT32 = 1e-4


def exact_sae(dictionary: Tensor, threshold: float = 0.5) -> SAE:
    """An SAE whose latents are the rows of a dictionary, firing where x'w > threshold."""
    m, d = dictionary.shape
    sae = SAE(SAEConfig(d_in=d, d_sae=m, kind="jumprelu", k=1, normalize="none"))
    with torch.no_grad():
        sae.W_enc.copy_(dictionary.T)
        sae.W_dec.copy_(dictionary)
        sae.threshold.fill_(threshold)
    return sae.eval()


def sampled(planted: Planted, n: int = N_TOKENS, seed: int = 7) -> Tensor:
    return planted.sample(n, torch.Generator().manual_seed(seed)).x


def judged(sae: SAE, x: Tensor) -> dict[str, Condition]:
    return {c.name: c for c in judge(measure_conditions(sae, [x]))}


def wide(**kwargs: object) -> PlantedConfig:
    """Few features in a wide space: every condition but the width holds."""
    return PlantedConfig(**{"n": 128, "d": 256, "row_sparsity": (2,), **kwargs})  # type: ignore[arg-type]


def assert_same(a: Conditions, b: Conditions) -> None:
    for field in fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if not isinstance(left, Tensor):
            assert left == right, field.name
        elif left.dtype.is_floating_point:
            torch.testing.assert_close(left, right, rtol=FLOAT32, atol=1e-5)
        else:
            assert torch.equal(left, right), field.name


# ---- statistics against dense numpy ----


def test_statistics_of_a_small_matrix_by_hand() -> None:
    """Identity dictionary, relu: codes are the positive part of x."""
    sae = SAE(SAEConfig(d_in=3, d_sae=3, kind="relu", k=1, normalize="none")).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    x = torch.tensor([[2.0, 1.0, 0.0], [4.0, 0.0, 0.0], [0.0, 3.0, 1.0], [6.0, 1.0, -1.0]])
    found = measure_conditions(sae, [x])
    assert found.count.tolist() == [3, 3, 1] and found.l0 == 7 / 4
    assert (found.l0_low, found.l0_high) == (1, 2)
    assert found.mean_act.tolist() == pytest.approx([4.0, 5 / 3, 1.0])
    assert found.peak.tolist() == [6.0, 3.0, 1.0]
    # latents 0 and 1 fire together twice, 1 and 2 once, 0 and 2 never
    assert found.rho.tolist() == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert found.excess.tolist() == pytest.approx([0.0, 1 / 3 - 1 / 4, 1 - 3 / 4])
    assert found.partner.tolist()[1:] == [2, 1]
    assert found.n_copies.tolist() == [0, 0, 0] and float(found.coherence.max()) == 0


def test_statistics_match_dense_numpy() -> None:
    planted = plant(wide(n=64, d=48, row_sparsity=(3,)), 0)
    x, sae = sampled(planted, 2000), exact_sae(planted.dictionary)
    found = measure_conditions(sae, x.split(333))
    w = planted.dictionary.double().numpy()
    acts = sae.encode(x).double().numpy()
    u, on = x.double().numpy(), acts > 0
    z = u @ w.T
    np.testing.assert_allclose(found.kurtosis, scipy.stats.kurtosis(z, fisher=False), rtol=1e-4)
    shift = on.T @ u / on.sum(0)[:, None] - u.mean(0)
    expected = (shift * w).sum(1) / np.linalg.norm(shift, axis=1)
    np.testing.assert_allclose(found.alignment, expected, rtol=1e-4)
    share = (on.T.astype(float) @ on) / on.sum(0)[:, None]
    share[w @ w.T >= cooccurrence.COPY] = 0
    np.testing.assert_allclose(found.rho, share.max(1), rtol=1e-5)
    excess = np.where(w @ w.T >= cooccurrence.COPY, -1, share - on.mean(0))
    np.testing.assert_allclose(found.excess, excess.max(1), atol=1e-6)


def test_activations_are_measured_in_units_of_the_reconstruction() -> None:
    planted = plant(wide(n=16, d=24), 0)
    x = sampled(planted, 500)
    sae = SAE(SAEConfig(24, 16, kind="gba", k=1, normalize="none")).eval()
    with torch.no_grad():
        sae.b_enc.fill_(-0.5)
    before = measure_conditions(sae, [x])
    with torch.no_grad():
        sae.scale.fill_(2.0)
    after = measure_conditions(sae, [x])
    assert float(before.mean_act.max()) > 0
    torch.testing.assert_close(after.mean_act, 2 * before.mean_act)
    torch.testing.assert_close(after.peak, 2 * before.peak)


def test_batches_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = plant(wide(n=40, d=24, row_sparsity=(3,)), 0)
    x, sae = sampled(planted, 1000), exact_sae(planted.dictionary)

    def measured(size: int) -> Conditions:
        stats = ConditionStats(sae, x[:100])
        for part in x.split(size):
            stats.update(part)
        return stats.compute()

    whole = measured(1000)
    assert_same(measured(7), whole)
    monkeypatch.setattr(cooccurrence, "PAIR_BLOCK", 40 * 3)
    monkeypatch.setattr("sae_core.conditions.PROJECT_BLOCK", 40 * 11)
    monkeypatch.setattr("sae_core.conditions.FIRED_BLOCK", 5)
    assert_same(measured(1000), whole)


def test_merge_is_update_and_associative() -> None:
    planted = plant(wide(n=40, d=24, row_sparsity=(3,)), 0)
    x, sae = sampled(planted, 900), exact_sae(planted.dictionary)

    def stats(*parts: Tensor) -> ConditionStats:
        found = ConditionStats(sae, x[:50], sample_tokens=700)
        for part in parts:
            found.update(part)
        return found

    a, b, c = x.split(300)
    left = stats(a)
    left.merge(stats(b))
    left.merge(stats(c))
    right, tail = stats(a), stats(b)
    tail.merge(stats(c))
    right.merge(tail)
    whole = stats(a, b, c).compute()
    assert whole.n_sampled == 700 and whole.n_tokens == 900
    assert_same(left.compute(), whole)
    assert_same(right.compute(), whole)
    other = ConditionStats(sae, x[50:100])
    with pytest.raises(UserError, match="one probe"):
        left.merge(other)


def test_nothing_is_nan_and_bad_input_is_refused() -> None:
    planted = plant(wide(n=16, d=24), 0)
    dictionary = torch.cat((planted.dictionary, torch.zeros(2, 24)))
    sae = exact_sae(dictionary)
    found = measure_conditions(sae, [sampled(planted, 500)])
    assert found.count[16:].tolist() == [0, 0]  # a zero direction never fires
    for field in fields(found):
        value = getattr(found, field.name)
        assert not isinstance(value, Tensor) or bool(value.isfinite().all()), field.name
    assert found.partner[16:].tolist() == [-1, -1]
    for condition in judge(found):
        for value in (condition.measured, condition.low, condition.high, condition.met_frac):
            assert value is None or np.isfinite(value)
    with pytest.raises(UserError, match="got none"):
        measure_conditions(sae, [])
    with pytest.raises(UserError, match="at least 2 tokens, got 1"):
        ConditionStats(sae, torch.zeros(1, 24))
    with pytest.raises(UserError, match="got none"):
        ConditionStats(sae, torch.randn(9, 24)).compute()


def test_all_dead_says_nothing_instead_of_failing() -> None:
    planted = plant(wide(n=16, d=24), 0)
    found = measure_conditions(exact_sae(planted.dictionary, 99.0), [sampled(planted, 200)])
    by_name = {c.name: c for c in judge(found)}
    assert by_name["H2 nonzeros"].holds is None and by_name["width"].holds is None
    assert set(verdict(found).cause.tolist()) == {RARE}


# ---- each condition holds here and fails there ----


def test_conditions_hold_on_exact_sparse_data() -> None:
    planted = plant(wide(), 0)
    found = judged(exact_sae(planted.dictionary), sampled(planted))
    holding = ("H1 sparsity", "H2 nonzeros", "H3 co-occurrence", "V1 coherence", "target frequency")
    assert {name: found[name].holds for name in holding} == dict.fromkeys(holding, True)
    assert found["H1 sparsity"].measured == pytest.approx(2.0, abs=0.05)
    assert found["width"].holds is False  # 128 latents for 128 features


def test_sparsity_fails_on_dense_rows() -> None:
    planted = plant(wide(row_sparsity=(40,)), 0)
    assert (
        judged(exact_sae(planted.dictionary), sampled(planted, 2000))["H1 sparsity"].holds is False
    )


def test_nonzeros_fail_where_some_features_are_small() -> None:
    planted = plant(wide(), 0)
    size = torch.ones(128)
    size[:32] = 0.1
    codes = planted.sample(N_TOKENS, torch.Generator().manual_seed(1)).codes
    x = codes.to_dense() * size @ planted.dictionary
    sae = exact_sae(planted.dictionary)
    with torch.no_grad():
        sae.threshold.copy_(0.7 * size)  # interference reaches 0.3 only rarely
    found = judged(sae, x)["H2 nonzeros"]
    assert found.holds is False and found.met_frac is not None and found.met_frac < 0.9


def test_cooccurrence_fails_on_pairs_and_names_the_partner() -> None:
    planted = plant(wide(structure="pairs", strength=0.9), 0)
    sae = exact_sae(planted.dictionary)
    measured = measure_conditions(sae, [sampled(planted)])
    found = {c.name: c for c in judge(measured)}["H3 co-occurrence"]
    assert found.holds is False and found.measured == pytest.approx(0.9, abs=0.05)
    partner = torch.arange(128) ^ 1
    assert float((measured.partner == partner).double().mean()) > 0.95
    assert bool((verdict(measured).score < verdict_of(plant(wide(), 0)).median()).all())


def verdict_of(planted: Planted) -> Tensor:
    return verdict(measure_conditions(exact_sae(planted.dictionary), [sampled(planted)])).score


def test_coherence_fails_on_close_directions() -> None:
    planted = plant(wide(), 0)
    v = planted.dictionary.clone()
    v[1::2] = 0.6 * v[0::2] + 0.8 * v[1::2]
    close = replace(planted, dictionary=v / v.norm(dim=1, keepdim=True))
    found = judged(exact_sae(close.dictionary, 0.8), sampled(close))["V1 coherence"]
    assert found.holds is False and found.measured == pytest.approx(0.6, abs=0.1)


def test_target_frequency_fails_where_latents_fire_too_rarely() -> None:
    planted = plant(wide(coefficients="uniform"), 0)
    x = sampled(planted)
    assert judged(exact_sae(planted.dictionary, 0.45), x)["target frequency"].holds is True
    assert judged(exact_sae(planted.dictionary, 1.35), x)["target frequency"].holds is False


def test_width_holds_with_many_latents_and_copies_count_once() -> None:
    """n p^(-s) at s = 1: 8 features of p = 1/8 ask for 64 latents."""
    planted = plant(PlantedConfig(n=8, d=8, row_sparsity=(1,), dictionary="orthogonal"), 0)
    copies = exact_sae(planted.dictionary.repeat(16, 1))
    x = sampled(planted, 4000)
    found = measure_conditions(copies, [x])
    assert found.n_copies.tolist() == [15] * 128 and n_features(found) == pytest.approx(8.0)
    assert float(found.rho.max()) == 0  # copies fire together always, and nothing else does
    assert judged(copies, x)["width"].holds is False  # 16 latents a token: s = 16
    with torch.no_grad():
        copies.threshold[8:] = 99.0
    wide_enough = judged(copies, x)["width"]
    assert wide_enough.holds is True
    assert wide_enough.low == pytest.approx(np.log10(64), abs=0.05)
    assert judged(exact_sae(planted.dictionary), x)["width"].holds is False


def test_random_coherence_matches_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    n_above = []
    for _ in range(40):
        w = torch.randn(200, 20, generator=generator)
        w /= w.norm(dim=1, keepdim=True)
        cos = (w @ w.T).abs().triu(1)
        n_above.append(int((cos > random_coherence(200, 20)).sum()))
    assert 0.5 < np.mean(n_above) < 1.6  # one pair expected
    assert random_coherence(200, 1) == 1.0
    with pytest.raises(UserError, match="got 1 and 3"):
        random_coherence(1, 3)


# ---- the upper mode ----


@pytest.mark.parametrize("f", [0.01, 0.05, 0.2])
def test_upper_mode_finds_a_planted_frequency(f: float) -> None:
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(40_000, generator=generator) < f
    z = torch.randn(40_000, generator=generator) + 6 * on
    hist = torch.histc(z, 200, -20, 20).long()
    excess, found = upper_mode(torch.stack((hist, hist.flip(0))), 40_000)
    assert bool(found[0]) and float(excess[0]) == pytest.approx(f, rel=0.15)
    assert not found[1] and excess[1] == 0  # the mirror image has a lower mode


def test_a_gaussian_has_no_upper_mode() -> None:
    z = torch.randn(40_000, 50, generator=torch.Generator().manual_seed(0))
    hist = torch.stack([torch.histc(column, 200, -10, 10).long() for column in z.T])
    assert int(upper_mode(hist, 40_000)[1].sum()) <= 2


def test_band_frequency_is_the_true_one_without_interference() -> None:
    planted = plant(wide(zipf=0.7), 0)
    sample = planted.sample(20_000, torch.Generator().manual_seed(3))
    found = measure_conditions(exact_sae(planted.dictionary), sample.x.split(4000))
    true = torch.bincount(sample.codes.col, minlength=128) / 20_000
    ratio = found.band_freq[found.has_band] / true[found.has_band]
    assert float(found.has_band.double().mean()) > 0.95
    assert float(ratio.median()) == pytest.approx(1.0, abs=0.1)


# ---- the verdict ----


def test_verdict_tells_features_from_random_directions() -> None:
    planted = plant(PlantedConfig(n=64, d=32, row_sparsity=(3,)), 0)
    random = torch.randn(64, 32, generator=torch.Generator().manual_seed(50))
    random /= random.norm(dim=1, keepdim=True)
    sae = exact_sae(torch.cat((planted.dictionary, random)), 0.6)
    found = measure_conditions(sae, [sampled(planted)])
    is_true = np.arange(128) < 64
    area = roc_auc(verdict(found).score.numpy(), is_true)
    assert area is not None and area > 0.95
    # consistency adds: another seed that has the features, and other random directions
    agree = torch.cat((torch.full((64,), 0.98), torch.full((64,), 0.6)))
    both = verdict(found, agree)
    area = roc_auc(both.score.numpy(), is_true)
    assert area is not None and area > 0.99
    assert both.counts["reliable"] > 30 and both.flag[64:].max() == 0
    assert sum(both.counts.values()) == 128
    assert sum(both.cause_counts.values()) == 128 - both.counts["reliable"]
    assert both.n_features == pytest.approx(float(both.score.sum()), rel=0.1)


def test_score_by_hand_and_reasons() -> None:
    planted = plant(
        PlantedConfig(n=64, d=32, row_sparsity=(3,), structure="pairs", strength=0.8), 0
    )
    found = measure_conditions(exact_sae(planted.dictionary, 0.6), [sampled(planted)])
    agree = torch.full((64,), 0.5)
    for rule, given in ((ONE_RUN, None), (SEVERAL_RUNS, agree)):
        tail = np.log(float(found.kurtosis[5]) / 3)
        odds = [-np.log(1 - float(c)) for c in (found.alignment[5], agree[5])]
        x = [tail, odds[0], float(found.excess[5]), odds[1]]
        z = sum(w * v for w, v in zip(rule.weight, x, strict=True)) + rule.intercept
        score = float(verdict(found, given).score[5])
        assert score == pytest.approx(1 / (1 + np.exp(-z)), rel=1e-4)
    assert terms(found, None)[:, 3].abs().max() == 0
    silent = replace(found, count=torch.where(torch.arange(64) == 3, 9, found.count))
    one = verdict(silent)
    assert (one.score[3], one.cause[3]) == (0, RARE) and FLAGS[int(one.flag[3])] == "unreliable"
    assert reason(silent, one, 3) == f"{CAUSES[RARE]} (9 firings in {N_TOKENS} tokens)"
    together = [j for j in range(64) if CAUSES[int(one.cause[j])].endswith("(H3)")]
    assert together and all(
        f"latent {found.partner[j]}," in reason(silent, one, j) for j in together
    )
    with pytest.raises(UserError, match="64 latents, got 3"):
        verdict(found, torch.ones(3))
    with pytest.raises(UserError, match="between 0 and 63, got 64"):
        reason(found, one, 64)


def test_roc_auc_by_hand() -> None:
    score = np.array([0.1, 0.4, 0.4, 0.9])
    assert roc_auc(score, np.array([False, False, True, True])) == 3.5 / 4
    assert roc_auc(score, np.array([False] * 4)) is None
