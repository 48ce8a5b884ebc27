"""Weights of the loss: worked examples, theorem 5, gradients, resumption, off by default."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from benchmarks import reweighting_data, reweighting_sums
from sae_core import loss, reweighting
from sae_core.buffer import batches
from sae_core.checkpoint import load_checkpoint, save_checkpoint
from sae_core.errors import UserError
from sae_core.gba import GBAConfig
from sae_core.kernels import autograd
from sae_core.kernels.codes import codes_where
from sae_core.loss import SparsityConfig
from sae_core.metrics import evaluate
from sae_core.reweighting import (
    WeightConfig,
    dimension_statistic,
    frobenius_distance,
    frobenius_weights,
    power_weights,
    squared_weights,
    start_weights,
)
from sae_core.sae import SAE, SAEConfig
from sae_core.train import TrainConfig, TrainState, train

KINDS = ["gba", "topk", "batch_topk", "jumprelu", "relu"]
CONFIG = TrainConfig(
    steps=20, batch_size=128, lr=5e-3, init_tokens=512, log_every=10,
    gba=GBAConfig(4, 0.3, 0.05, calibrate_tokens=1024),
    sparsity=SparsityConfig(dead_after_tokens=1280),
)  # fmt: skip
WEIGHTED = WeightConfig("variance", alpha=1.0)
SIZES = torch.tensor([3.0] * 4 + [1.0] * 12)  # four dimensions with nine times the variance
EXAMPLE = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0]])  # a feature alone, and a digon
# rounding of float64 sums of a few hundred terms
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(n: int = 6000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(24, 16, generator=torch.Generator().manual_seed(99)) * SIZES
    on = torch.rand(n, 24, generator=generator) < 0.1
    return on.float() @ v + 0.05 * torch.randn(n, 16, generator=generator) + 0.3


def new(kind: str = "topk") -> SAE:
    config = SAEConfig(16, 48, kind=kind, k=6)  # type: ignore[arg-type]
    return SAE(config, generator=torch.Generator().manual_seed(0))


def run(weights: WeightConfig, kind: str = "topk", config: TrainConfig = CONFIG):
    sae, state = new(kind), TrainState()
    config = dataclasses.replace(config, weights=weights)
    return sae, state, list(train(sae, batches(planted(), 128, seed=0), config, state))


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(v, b.tensors()[k]) for k, v in a.tensors().items())


# ---- the weights ----


def test_the_worked_example_and_orthogonal_rows():
    assert frobenius_weights(EXAMPLE).sqrt().tolist() == pytest.approx([1.0, 0.5**0.5])
    rows = torch.linalg.qr(normal(9, 4))[0].T * torch.tensor([[0.5], [1.0], [2.0], [5.0]])
    gamma = frobenius_weights(rows).sqrt()
    torch.testing.assert_close(gamma, 1 / rows.norm(dim=1), **TIGHT)


@given(st.integers(2, 6), st.integers(1, 12), st.integers(0, 10_000))
def test_no_other_weights_come_closer_to_the_identity(d, m, seed):
    w = normal(d, m, seed=seed)
    g = frobenius_weights(w)
    assert (g >= 0).all()

    def distance(x: np.ndarray) -> float:
        dense = w.numpy().T @ np.diag(x) @ w.numpy() - np.eye(m)
        return float((dense**2).sum())

    best = float(frobenius_distance(w, g))
    assert best == pytest.approx(distance(g.numpy()) ** 0.5, abs=1e-6)
    found = minimize(distance, np.ones(d), bounds=[(0, None)] * d, method="L-BFGS-B")
    assert best**2 <= found.fun + 1e-6 * m


def test_a_bound_is_met_where_the_linear_system_would_go_below_0():
    w = normal(30, 200) + 2 * normal(30, 1, seed=1) * normal(1, 200, seed=2)
    gram = w @ w.T
    assert (torch.linalg.solve(gram.square(), gram.diagonal()) < 0).any()
    g = frobenius_weights(w)
    gradient = gram.square() @ g - gram.diagonal()
    # Karush-Kuhn-Tucker: no weight at 0 would lower the distance, no other has a slope
    scale = float(gram.diagonal().max())
    assert (g == 0).any() and (gradient[g == 0] >= -1e-9 * scale).all()
    assert gradient[g > 0].abs().max() < 1e-9 * scale


def test_a_dimension_that_no_latent_reaches_gets_the_mean_weight():
    w = torch.cat((torch.diag(torch.tensor([1.0, 2.0])), torch.zeros(1, 2)))
    assert frobenius_weights(w).tolist() == pytest.approx([1.0, 0.25, 0.625])
    assert frobenius_weights(torch.zeros(3, 2)).tolist() == [1.0, 1.0, 1.0]


def test_variance_weights_by_hand():
    # variances 1, 1, 4; mean 2; gamma = (1/2, 1/2, 2)^alpha
    u = torch.tensor([[1.0, -1.0, 2.0], [-1.0, 1.0, -2.0]])
    s = dimension_statistic(u, "variance")
    assert s.tolist() == [1.0, 1.0, 4.0]
    one, half = WEIGHTED, WeightConfig("variance", alpha=-0.5)
    assert power_weights(s, one).tolist() == pytest.approx([0.5, 0.5, 2.0])
    assert power_weights(s, half).tolist() == pytest.approx([2**0.5, 2**0.5, 0.5**0.5])
    assert squared_weights(power_weights(s, one), one).tolist() == pytest.approx(
        [0.25 / 1.5, 0.25 / 1.5, 4 / 1.5]
    )
    tight = dataclasses.replace(one, floor=0.8, ceiling=1.5)
    assert power_weights(s, tight).tolist() == pytest.approx([0.8, 0.8, 1.5])
    with pytest.raises(UserError, match="data that vary, got a mean statistic of 0.0"):
        power_weights(torch.zeros(3), one)


def test_kurtosis_tells_rare_from_frequent_at_equal_variance():
    rare, often = torch.zeros(100), torch.zeros(100)
    rare[:10], often[:50] = 1.0, 1.0
    # of a coin with probability p: 1 / (p (1 - p)) - 3
    found = dimension_statistic(torch.stack((rare, often, torch.ones(100)), 1), "kurtosis")
    first, second = 1 / 0.09 - 3, 1.0
    assert found.tolist() == pytest.approx([first, second, (first + second) / 2])


def test_the_control_holds_the_same_weights_in_another_order():
    gamma = torch.arange(1.0, 41.0)
    plain = squared_weights(gamma, WEIGHTED)
    assert float(plain.mean()) == pytest.approx(1.0)
    one, again, two = (
        squared_weights(gamma, dataclasses.replace(WEIGHTED, permute=True, seed=seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, two) and not torch.equal(one, plain)
    assert torch.equal(one.sort().values, plain)


def test_user_weights_are_taken_as_they_are():
    u = planted(256)[:, :3]
    weights = start_weights(u, 8, WeightConfig("user", values=(0.0, 1.0, 100.0)))
    assert weights is not None
    assert weights.squared.tolist() == pytest.approx([0.0, 3 / 10001, 30000 / 10001])
    total = float((weights.squared * u.var(0, correction=0)).sum())
    assert weights.total == pytest.approx(total)
    with pytest.raises(UserError, match="each of the 3 dimensions, got 2"):
        start_weights(u, 8, WeightConfig("user", values=(1.0, 2.0)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kind": "user"}, "got none with kind='user'"),
        ({"kind": "variance", "values": (1.0,)}, "got 1 with kind='variance'"),
        ({"kind": "user", "values": (1.0, -2.0)}, "smallest of -2.0"),
        ({"kind": "user", "values": (0.0, 0.0)}, "largest of 0.0"),
        ({"kind": "user", "values": (1.0, float("nan"))}, "finite"),
        ({"floor": 0.0}, "got 0.0 and 10.0"),
        ({"ceiling": 0.5}, "got 0.1 and 0.5"),
        ({"refresh": 0}, "got 0"),
    ],
)
def test_bad_settings_are_refused_with_their_values(bad, message):
    with pytest.raises(UserError, match=message):
        WeightConfig(**bad)


# ---- the loss ----


def test_the_loss_by_hand():
    u_hat, u = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.zeros(2, 2)
    # squares: column 0 sums to 1, column 1 to 5; over n = 2 rows and a variance of 4
    weights = torch.tensor([1.5, 0.5])
    assert float(loss.reconstruction_loss(u_hat, u, 4.0, weights)) == (1.5 + 2.5) / 8
    assert float(loss.reconstruction_loss(u_hat, u, 4.0)) == 6 / 8


def test_the_middle_matrix_of_theorem_5_is_what_the_loss_measures():
    # with W_m = W_p': Gamma (x_p - W_p x_m) = Gamma W_p e, hence the loss is e' W_p' Gamma^2 W_p e
    w_p, h = normal(4, 9), normal(50, 9, seed=1).clamp_min(0)
    x_p = h @ w_p.T
    x_m = torch.relu(x_p @ w_p)
    gamma = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
    found = loss.reconstruction_loss(x_m @ w_p.T, x_p, 1.0, gamma.square())
    middle = w_p.T @ torch.diag(gamma.square()) @ w_p
    e = h - x_m
    torch.testing.assert_close(found, ((e @ middle) * e).sum(1).mean(), **TIGHT)


def test_gradients_of_the_weighted_loss_through_the_sparse_encoder_and_decoder():
    n, d, m = 4, 5, 7
    names = {"w_enc": (d, m), "b_enc": (m,), "b_dec": (d,), "w_dec": (m, d), "u": (n, d)}
    leaves = [normal(*s, seed=i).requires_grad_() for i, s in enumerate(names.values())]
    squared = torch.tensor([0.1, 2.0, 0.5, 1.4, 1.0], dtype=torch.float64)
    mask = normal(n, m, seed=9) > 0.3

    def weighted(w_enc, b_enc, b_dec, w_dec, u):
        pre = (u - b_dec) @ w_enc + b_enc
        codes = autograd.encode(u, w_enc, b_enc, b_dec, codes_where(mask, pre.detach()))
        u_hat = autograd.decode(codes, w_dec) + b_dec
        return loss.reconstruction_loss(u_hat, u, 3.0, squared)

    assert torch.autograd.gradcheck(weighted, leaves)
    # and the weights are in it: dimension 1 counts twenty times as much as dimension 0
    gradient = torch.autograd.grad(weighted(*leaves), leaves[3])[0]
    plain = torch.autograd.grad(
        loss.reconstruction_loss(
            ((leaves[4] - leaves[2]) @ leaves[0] + leaves[1]) * mask @ leaves[3] + leaves[2],
            leaves[4], 3.0,
        ), leaves[3],
    )[0]  # fmt: skip
    torch.testing.assert_close(gradient, plain * squared, **TIGHT)


# ---- training ----


@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_change_nothing_and_others_move_the_error(kind):
    plain, state, records = run(WeightConfig(), kind)
    assert state.weights is None
    ones, started, _ = run(WeightConfig("user", values=(2.0,) * 16), kind)
    assert started.weights is not None and torch.equal(started.weights.squared, torch.ones(16))
    assert started.variance == pytest.approx(state.variance, rel=1e-5)
    sae, moved, weighted = run(WEIGHTED, kind)
    assert moved.weights is not None and moved.weights.squared.std() > 0.1
    assert moved.variance == moved.weights.total != state.variance
    assert not same(sae, plain) and weighted[-1].fvu < 0.9 * weighted[0].fvu
    x = planted()[:2000]
    u = plain.normalise(x)[0]

    def errors(sae: SAE) -> torch.Tensor:
        with torch.no_grad():
            return (sae.normalise(sae.reconstruct(x))[0] - u).square().mean(0)

    def share(sae: SAE) -> float:
        return float(errors(sae)[:4].sum() / errors(sae).sum())

    assert share(sae) < share(plain)  # more weight on the first four: less error there
    assert evaluate(plain, [x]).fvu < evaluate(sae, [x]).fvu  # the unweighted FVU pays for it


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_takes_the_steps_of_the_plain_loss_bit_by_bit(kind, monkeypatch):
    def plain(u_hat, u, variance, squared_weights=None):
        assert squared_weights is None
        return (u_hat - u).square().sum() / (u.shape[0] * variance)

    sae, _, records = run(WeightConfig(), kind)
    monkeypatch.setattr(loss, "reconstruction_loss", plain)
    monkeypatch.setattr("sae_core.start.start_weights", lambda u, d_sae, config: None)
    other, _, others = run(WeightConfig(), kind)
    assert same(sae, other) and records == others


def test_records_hold_the_unweighted_fvu():
    values = (1.0,) + (0.0,) * 15  # the loss sees one dimension only
    config = dataclasses.replace(CONFIG, steps=1, log_every=1)
    _, _, (only_first,) = run(WeightConfig("user", values=values), config=config)
    _, _, (plain,) = run(WeightConfig(), config=config)
    assert only_first.fvu == plain.fvu  # the first step begins at the same weights


def test_frobenius_weights_are_those_of_the_decoder_at_every_refresh(monkeypatch):
    weights = WeightConfig("frobenius", refresh=10, floor=1e-3, ceiling=1e3)
    gba = dataclasses.replace(CONFIG.gba, calibrate_tokens=0)
    config = dataclasses.replace(CONFIG, steps=9, gba=gba)
    _, state, _ = run(weights, "gba", config)
    assert state.weights is not None and state.weights.energy.any()
    assert torch.equal(state.weights.squared, torch.ones(16))  # before the first refresh
    seen = []

    def spied(w):
        seen.append(w.clone())
        return frobenius_weights(w)

    monkeypatch.setattr(reweighting, "frobenius_weights", spied)
    sae, state, _ = run(weights, "gba", dataclasses.replace(config, steps=20))
    assert state.weights is not None and len(seen) == 2
    assert not state.weights.energy.any()
    w = seen[-1].detach()  # the decoder after the last step, each row as long as its latent's rms
    fired = w.norm(dim=0) > 0
    assert fired.any()
    parallel = (w / w.norm(dim=0)).T[fired]
    torch.testing.assert_close(parallel, sae.W_dec.detach()[fired], rtol=1e-4, atol=1e-5)
    wanted = frobenius_weights(w)
    wanted = wanted / wanted.mean()
    assert wanted.std() > 0.1
    torch.testing.assert_close(state.weights.squared, wanted.float())
    assert state.variance == pytest.approx(state.weights.total)


def test_energy_is_the_sum_of_squares_over_batches():
    values = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    weights = start_weights(planted(64), 3, WeightConfig("frobenius"))
    assert weights is not None
    for _ in range(2):
        weights.energy += reweighting.energy(codes_where(values > 0, values))
    assert weights.energy.tolist() == [20.0, 0.0, 8.0]
    # W W' is diag(20, 0, 8, 0 ..): gamma^2 = 1/20 and 1/8
    config = WeightConfig("frobenius", floor=1e-6, ceiling=1e6)
    reweighting.refresh_weights(weights, torch.eye(3, 16), config)
    assert float(weights.squared[2] / weights.squared[0]) == pytest.approx(2.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "weights",
    [WeightConfig("variance", permute=True), WeightConfig("frobenius", refresh=7)],
    ids=["variance", "frobenius"],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_by_bit(kind, weights, tmp_path):
    whole, _, records = run(weights, kind)
    config = dataclasses.replace(CONFIG, weights=weights)
    half, state = new(kind), TrainState()
    for record in train(half, batches(planted(), 128, seed=0), config, state):
        if record.step == 10:  # between two refreshes
            save_checkpoint(tmp_path, half, state, config)
            break
    loaded = load_checkpoint(tmp_path, config)
    assert loaded is not None
    sae, state = loaded
    rest = list(train(sae, batches(planted(), 128, seed=0, start_step=10), config, state))
    assert rest == [r for r in records if r.step > 10] and same(sae, whole)
    with pytest.raises(UserError, match="made with weights="):
        load_checkpoint(tmp_path, CONFIG)


def test_the_command_line_and_a_file_reach_the_weights(tmp_path):
    from sae_apps.tasks.settings import TrainSettings
    from sae_apps.tasks.train import parse

    flags = ["--train.weights.kind", "variance", "--train.weights.alpha", "-0.5"]
    settings, _ = parse([*flags, "--train.weights.permute", "true", "--out", "x"])
    assert settings.train.weights == WeightConfig("variance", alpha=-0.5, permute=True)
    file = tmp_path / "weights.yaml"
    file.write_text("train: {weights: {kind: user, values: [1, 0.5, 2]}}")
    settings, _ = parse(["--config", str(file), "--out", "x"])
    assert settings.train.weights == WeightConfig("user", values=(1.0, 0.5, 2.0))
    stored = json.loads(json.dumps(settings.identity()))
    assert TrainSettings.of_identity(stored).train.weights == settings.train.weights
    with pytest.raises(UserError, match="alpha must be a number, got 'x'"):
        parse(["--train.weights.alpha", "x", "--out", "x"])


# ---- the benchmark's arithmetic ----


def test_a_goal_is_met_only_above_the_plain_loss_and_above_the_control():
    def runs(plain, weighted, control):
        arms = {"plain": plain, "variance 1": weighted, "variance 1 permuted": control}
        return [
            {"setting": "s", "kind": "topk", "arm": arm, "seed": i, "mmc": v}
            for arm, values in arms.items()
            for i, v in enumerate(values)
        ]

    def verdict(*values):
        rows = reweighting_sums.summarise(runs(*values), ("mmc",), {"mmc": 1})
        (goal,) = reweighting_sums.goals(rows, {"mmc": 1})
        return goal

    low = [0.5, 0.6, 0.7]
    high = [0.71, 0.8, 0.89]
    assert verdict(low, high, low).met
    assert not verdict(low, high, high).met  # the control gains as much
    assert not verdict(high, low, low).met
    goal = verdict([0.5], [0.7], [0.5])
    assert not goal.met and "no interval" in goal.note
    # gains .21, .20, .19: mean .2, deviation .01, t(2) = 4.3027 -> .2 - 4.3027 * .01 / sqrt(3)
    assert verdict(low, high, low).value == pytest.approx(0.2 - 0.0248414, abs=1e-5)


def test_the_mixed_dictionary_has_axes_digons_and_pentagons():
    v = reweighting_data.mixed_dictionary()
    cosine = v @ v.T
    torch.testing.assert_close(v.norm(dim=1), torch.ones(65))
    assert torch.equal(cosine[:20, :20], torch.eye(20)) and not cosine[:20, 20:].any()
    assert cosine[20, 21] == -1 and not cosine[20, 22:].any()
    assert sorted(cosine[40, 40:45].tolist()) == pytest.approx(
        [-0.809017, -0.809017, 0.309017, 0.309017, 1.0], abs=1e-6
    )
