"""Group Bias Adaptation against hand-computed cases of Algorithm 2 and its six properties."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_core import gba
from sae_core.errors import UserError
from sae_core.firing import FiringStats
from sae_core.gba import GBAConfig, bias_update, paper_main, step_size
from sae_core.kernels.codes import codes_where
from sae_core.sae import SAE, SAEConfig
from sae_core.train import TrainConfig, TrainState, train

CONFIG = GBAConfig(n_groups=2, htf=0.5, ltf=0.1, gamma=0.1, b_max=0.0, rule="published")
TAF = torch.tensor([0.5, 0.1], dtype=torch.float64)


def update(b, freq, peak, group, config=CONFIG):
    return bias_update(
        torch.tensor(b, dtype=torch.float64), torch.tensor(freq, dtype=torch.float64),
        torch.tensor(peak, dtype=torch.float64), torch.tensor(group), TAF, config,
    ).tolist()  # fmt: skip


def test_hand_computed_cases():
    # latent 0: 0.6 > p_0 = 0.5      -> -0.30 - 0.1 * 0.4             = -0.34
    # latent 1: 0.3 between eps, p_0 -> unchanged
    # latent 2: 0.0 < eps, group 1   -> -0.50 + 0.1 * mean(0.2, 0.6)  = -0.46
    # latent 3: 0.2 > p_1 = 0.1      -> -0.20 - 0.1 * 0.2             = -0.22
    # latent 4: 0.05 between         -> unchanged, but its r = 0.6 counts in rbar_1
    b = update(
        [-0.3, -0.3, -0.5, -0.2, -0.1], [0.6, 0.3, 0.0, 0.2, 0.05], [0.4, 0.7, 0.0, 0.2, 0.6],
        [0, 0, 1, 1, 1],
    )  # fmt: skip
    assert b == pytest.approx([-0.34, -0.3, -0.46, -0.22, -0.1], abs=1e-12)


def test_the_clamp_has_the_right_orientation():
    # down stops at -1, up stops at 0: with max and min exchanged the results were -0.99.. and 0.05
    assert update([-0.999], [0.9], [0.5], [0]) == [-1.0]
    assert update([-0.05, -0.05], [0.0, 0.3], [0.0, 0.5], [0, 0])[0] == 0.0


def test_a_group_in_which_nothing_fired_does_not_move():
    assert update([-0.4, -0.6], [0.0, 0.0], [0.0, -0.3], [1, 1]) == [-0.4, -0.6]


def test_the_published_ceiling_is_strict():
    assert update([-0.4], [0.5], [0.3], [0]) == [-0.4]  # q == p_k is allowed


def test_hand_computed_cases_of_the_proportional_rule():
    proportional = dataclasses.replace(CONFIG, rule="proportional")
    # latent 0: q/p = 1.2  -> -0.30 - 0.2 * 0.1 * 0.4                  = -0.308
    # latent 1: q = p      -> unchanged
    # latent 2: q = 0      -> -0.50 + 1.0 * 0.1 * mean(0.2, 0.6)       = -0.46
    # latent 3: q/p = 9    -> -0.20 - 4 (bounded) * 0.1 * 0.2          = -0.28
    # latent 4: q/p = 0.5  -> -0.10 + 0.5 * 0.1 * 0.4                  = -0.08
    b = update(
        [-0.3, -0.3, -0.5, -0.2, -0.1], [0.6, 0.5, 0.0, 0.9, 0.05], [0.4, 0.4, 0.0, 0.2, 0.6],
        [0, 0, 1, 1, 1], proportional,
    )  # fmt: skip
    assert b == pytest.approx([-0.308, -0.3, -0.46, -0.28, -0.08], abs=1e-12)


@pytest.mark.parametrize("b_max", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["published", "proportional"])
@given(
    st.lists(
        st.tuples(
            st.floats(-1, 0), st.floats(0, 1), st.floats(-1, 1), st.integers(0, 1)
        ),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_biases_never_leave_their_clamp(rule, b_max, latents):
    config = dataclasses.replace(CONFIG, rule=rule, b_max=b_max)
    b = update(*[list(column) for column in zip(*latents, strict=True)], config)
    assert all(-1 <= value <= b_max for value in b)


def test_target_frequencies_are_geometric():
    taf = gba.target_frequencies(0.1, 0.001, 10)
    assert float(taf[0]) == pytest.approx(0.1) and float(taf[-1]) == pytest.approx(0.001)
    ratios = taf[1:] / taf[:-1]
    assert torch.allclose(ratios, torch.full_like(ratios, 10 ** (-2 / 9)))
    assert gba.target_frequencies(0.02, 0.02, 1).tolist() == [0.02]


def test_targets_without_frequencies_sum_to_k():
    config = GBAConfig(ratio=100.0)
    taf = gba.group_targets(config, 64, 4608)
    assert float(taf[gba.assign_groups(4608, 10)].sum()) == pytest.approx(64.0)
    assert float(taf[0] / taf[-1]) == pytest.approx(100)
    with pytest.raises(UserError, match="above 1, at d_sae=20"):
        gba.group_targets(config, 15, 20)


def test_groups_are_balanced():
    sizes = torch.bincount(gba.assign_groups(103, 10))
    assert sizes.sum() == 103 and sizes.max() - sizes.min() <= 1


def test_quantile_thresholds_allow_at_most_the_asked_share():
    pre = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    freq = torch.tensor([0.1, 0.013, 0.0])
    above = (pre > gba.quantile_thresholds(pre, freq)).sum(0)
    assert above.tolist() == [100, 13, 0]


@pytest.mark.parametrize("gate", ["jumprelu", "relu"])
def test_buffer_peak_is_the_largest_pre_activation(gate):
    sae = SAE(SAEConfig(8, 16, k=4, gate=gate), generator=torch.Generator().manual_seed(0))
    sae.b_enc.data.uniform_(-0.4, 0.0, generator=torch.Generator().manual_seed(1))
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    stats = FiringStats(16)
    stats.update(sae.encode_sparse(x))
    pre = sae(x).pre
    peak = gba.buffer_peak(sae.b_enc.detach(), stats.compute(), gate)
    torch.testing.assert_close(peak, pre.max(0).values.clamp_min(0), rtol=1e-5, atol=1e-6)


def test_merged_statistics_equal_those_of_one_process():
    values = torch.randn(60, 9, generator=torch.Generator().manual_seed(4))
    codes = [codes_where(part > 0.5, part) for part in (values, values[:23], values[23:])]
    whole, left, right = FiringStats(9), FiringStats(9), FiringStats(9)
    for stats, batch in zip((whole, left, right), codes, strict=True):
        stats.update(batch)
    left.merge(right)
    assert torch.equal(left.count, whole.count) and torch.equal(left.peak, whole.peak)
    assert left.n_tokens == whole.n_tokens == 60


def planted(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(32, 16, generator=torch.Generator().manual_seed(99))
    on = torch.rand(n, 32, generator=generator) < 0.08
    return on.float() @ v + 0.01 * torch.randn(n, 16, generator=generator)


def test_the_ceiling_is_kept_after_training_and_the_bias_has_no_gradient():
    config = TrainConfig(steps=150, batch_size=256, init_tokens=1024, gba=GBAConfig(4, 0.2, 0.02))
    sae, state = (
        SAE(SAEConfig(16, 64, k=8), generator=torch.Generator().manual_seed(0)),
        TrainState(),
    )
    x = planted(200_000, 1)
    records = list(train(sae, iter(x.split(256)), config, state))
    stats = FiringStats(64)
    stats.update(sae.encode_sparse(planted(100_000, 2)))
    ceiling = state.taf[state.group]
    freq = stats.compute().freq
    # sampling on both sides: 0.02 on 100,000 tokens has a standard error of 2%; 64 latents
    assert (freq <= 1.15 * ceiling).all()
    assert records[-1].l0 < float(ceiling.sum()) * 1.05
    assert sae.b_enc.grad is None and not sae.b_enc.requires_grad
    free = FiringStats(64)  # the control: without the biases the same latents break their ceilings
    sae.b_enc.data.zero_()
    free.update(sae.encode_sparse(planted(10_000, 2)))
    assert (free.compute().freq > 1.15 * ceiling).float().mean() > 0.9


@pytest.mark.parametrize("rule", ["published", "proportional"])
def test_the_controller_alone_keeps_the_ceiling_at_fixed_weights(rule):
    generator = torch.Generator().manual_seed(5)
    pre = torch.randn(20_000, 40, dtype=torch.float64, generator=generator) * 0.2
    group, taf = gba.assign_groups(40, 2), TAF
    config = dataclasses.replace(CONFIG, rule=rule, gamma=0.02)
    b = torch.zeros(40, dtype=torch.float64)
    assert (
        (pre + b > 0).double().mean(0)[20:] > 4 * taf[1]
    ).all()  # the ceiling is broken at first
    for _ in range(400):
        y = pre + b
        freq, peak = (y > 0).double().mean(0), y.max(0).values
        b = bias_update(b, freq, peak, group, taf, config)
    freq = (pre + b > 0).double().mean(0)
    ceiling = taf[group]
    assert (freq <= 1.05 * ceiling).all()
    # a published latent stays wherever it fell below its ceiling, a proportional one returns to it;
    # in group 0 (a half) b = 0 is the clamp, and every second latent fires a little less than that
    assert (freq[20:] >= (0.8 if rule == "published" else 0.95) * ceiling[20:]).all()


def test_groups_report_what_was_asked_and_what_came():
    freq = torch.tensor([0.1, 0.2, 0.0, 0.05])
    group, taf = torch.tensor([0, 0, 1, 1]), torch.tensor([0.15, 0.05])
    first, second = gba.group_frequencies(freq, group, taf)
    assert (first.n_latents, first.n_above, first.n_dead) == (2, 1, 0)
    assert first.mean_freq == pytest.approx(0.15) and first.max_freq == pytest.approx(0.2)
    assert (second.n_above, second.n_dead) == (0, 1)


@pytest.mark.parametrize(
    "bad",
    [{"htf": 0.001, "ltf": 0.1}, {"htf": 1.5}, {"htf": 0.1}, {"n_groups": 0}, {"gamma": 0.0},
     {"boost": 0.5}],
)  # fmt: skip
def test_bad_settings_are_refused_with_both_values(bad):
    with pytest.raises(UserError, match="got"):
        GBAConfig(**bad)


def test_the_first_steps_of_the_controller_are_larger():
    config = GBAConfig(gamma=0.03, boost=10.0)
    sizes = [step_size(update, config) for update in range(400)]
    assert sizes[0] == pytest.approx(0.3) and sizes[-1] == pytest.approx(0.03, rel=1e-3)
    assert all(one > other for one, other in itertools.pairwise(sizes))
    assert sizes[23] == pytest.approx(0.03 * (1 + 9 * 0.97**23))
    assert step_size(0, GBAConfig(gamma=0.5)) < 1
    assert {step_size(u, paper_main()) for u in (0, 50)} == {0.01}


def test_training_counts_its_updates_for_them(monkeypatch):
    config = GBAConfig(1, 0.1, 0.1, period=2, calibrate_tokens=0)
    seen = []

    def noted(*arguments):
        seen.append(arguments[-1])
        return bias_update(*arguments)

    monkeypatch.setattr(gba, "bias_update", noted)
    sae = SAE(SAEConfig(16, 64, k=8), generator=torch.Generator().manual_seed(0))
    list(train(sae, iter(planted(1536, 1).split(256)), TrainConfig(steps=6, gba=config)))
    assert seen == [step_size(update, config) for update in range(3)]


@pytest.mark.parametrize("calibrate_tokens", [0, 1024])
def test_no_activation_of_a_finished_sae_is_negative(calibrate_tokens):
    # a target of 0.8 starts with thresholds below 0, at which the gate lets negative values through
    config = GBAConfig(1, 0.8, 0.8, calibrate_tokens=calibrate_tokens)
    train_config = TrainConfig(steps=2, batch_size=256, init_tokens=512, log_every=1, gba=config)
    sae = SAE(SAEConfig(16, 64, k=8), generator=torch.Generator().manual_seed(0))
    x = planted(4096, 1)
    runs = train(sae, iter(x.split(256)), train_config)
    next(runs)
    assert (sae.b_enc > 0).any() and (sae.encode(x) < 0).any()  # under way
    list(runs)
    assert (sae.b_enc <= 0).all() and (sae.encode(x) >= 0).all()
