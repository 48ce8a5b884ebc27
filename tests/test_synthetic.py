"""Planted data: rows, frequencies, structures and dictionaries are what the configuration says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_core.errors import UserError
from sae_core.sae import SAE, SAEConfig
from sae_core.synthetic import PlantedConfig, plant

N_ROWS = 20_000
SIGMAS = 5.0  # of a binomial share; 5 standard errors are exceeded once in 1.7 million


def sample(config: PlantedConfig, seed: int = 0, n_rows: int = N_ROWS):
    planted = plant(config, seed)
    return planted, planted.sample(n_rows, torch.Generator().manual_seed(seed))


def near(share: torch.Tensor, p: torch.Tensor | float, n: int = N_ROWS) -> bool:
    p = torch.as_tensor(p, dtype=torch.float64)
    return bool(((share - p).abs() <= SIGMAS * (p * (1 - p) / n).sqrt()).all())


@given(
    st.integers(2, 40), st.sampled_from(["independent", "topics"]), st.floats(0, 2),
    st.integers(0, 5),
)  # fmt: skip
def test_rows_have_exactly_s_distinct_features(half, structure, zipf, seed):
    s = max(1, half // 4)
    config = (
        PlantedConfig(2 * half, 8, (1, s), zipf=zipf, structure=structure, strength=0.5, n_topics=2)
        if structure == "independent" or half >= 2 * s
        else PlantedConfig(2 * half, 8, (1, s))
    )
    _, found = sample(config, seed, 200)
    sizes = found.codes.crow.diff()
    assert set(sizes.tolist()) <= {1, s}
    pairs = found.codes.row * config.n + found.codes.col
    assert len(pairs.unique()) == len(pairs)  # no feature twice in a row


def test_x_is_h_times_v_and_noise_is_added_to_it():
    planted, clean = sample(PlantedConfig(30, 10, (2,)), n_rows=500)
    expected = clean.codes.to_dense() @ planted.dictionary
    torch.testing.assert_close(clean.x, expected, rtol=1e-5, atol=1e-6)
    _, noisy = sample(PlantedConfig(30, 10, (2,), noise=0.1), n_rows=500)
    assert torch.equal(noisy.codes.col, clean.codes.col)  # the same draw, with noise on top
    assert float((noisy.x - expected).std()) == pytest.approx(0.1, rel=0.05)


def test_equal_features_are_equally_frequent_and_the_mixture_has_both_sizes():
    _, found = sample(PlantedConfig(128, 42, (3, 20)))
    assert near(found.codes.to_dense().double().mean(0), 11.5 / 128)
    sizes = found.codes.crow.diff()
    assert near((sizes == 3).double().mean(), 0.5) and set(sizes.tolist()) == {3, 20}


def test_one_feature_a_row_follows_zipf():
    _, found = sample(PlantedConfig(50, 10, (1,), zipf=1.5))
    p = torch.arange(1, 51, dtype=torch.float64) ** -1.5
    assert near(found.codes.to_dense().double().mean(0), p / p.sum())


def test_two_features_a_row_are_drawn_one_after_the_other():
    # P(i first) p_i, then p_j / (1 - p_i): the chance that both 0 and 1 are drawn
    _, found = sample(PlantedConfig(6, 4, (2,), zipf=1.0))
    p = torch.arange(1, 7, dtype=torch.float64) ** -1.0
    p /= p.sum()
    both = p[0] * p[1] / (1 - p[0]) + p[1] * p[0] / (1 - p[1])
    h = found.codes.to_dense().double()
    assert near((h[:, 0] * h[:, 1]).mean(), float(both))


def cooccurrence(config: PlantedConfig) -> torch.Tensor:
    """P(j | i) [n, n]."""
    _, found = sample(config, n_rows=60_000)
    h = (found.codes.to_dense() > 0).double()
    return (h.T @ h) / h.sum(0)[:, None]


def test_partners_occur_together_as_often_as_asked_and_strangers_by_chance():
    given_i = cooccurrence(PlantedConfig(200, 16, (2,), structure="pairs", strength=0.4))
    partner = given_i[torch.arange(200), torch.arange(200) ^ 1]
    assert float(partner.mean()) == pytest.approx(0.4, abs=0.02)  # chance adds about 0.006
    stranger = given_i[torch.arange(200), (torch.arange(200) + 100) % 200]
    assert float(stranger.mean()) < 0.03


def test_no_child_without_its_parent():
    given_i = cooccurrence(PlantedConfig(60, 16, (3,), structure="hierarchy", strength=1.0))
    child = torch.arange(1, 60, 2)
    assert (given_i[child, child - 1] == 1).all()
    assert (given_i[child - 1, child] < 0.9).all()  # the parent occurs alone as well
    free = cooccurrence(PlantedConfig(60, 16, (3,), structure="hierarchy", strength=0.0))
    assert (free[child, child - 1] < 0.2).all()


def test_topics_raise_cooccurrence_within_a_topic_only():
    given_i = cooccurrence(
        PlantedConfig(96, 16, (3,), structure="topics", strength=0.9, n_topics=8)
    )
    same = (torch.arange(96)[:, None] - torch.arange(96)[None]) % 8 == 0
    same.fill_diagonal_(False)
    other = ~same & ~torch.eye(96, dtype=torch.bool)
    assert float(given_i[same].mean()) > 10 * float(given_i[other].mean())


def test_dictionaries_have_their_geometry():
    v = plant(PlantedConfig(20, 32, (2,), dictionary="orthogonal"), 0).dictionary
    torch.testing.assert_close(v @ v.T, torch.eye(20), atol=1e-5, rtol=0)
    v = plant(PlantedConfig(20, 12, (2,), dictionary="polygon", sides=2), 0).dictionary
    torch.testing.assert_close(v[0::2], -v[1::2], atol=1e-6, rtol=0)
    assert (v[0::2] @ v[0::2].T - torch.eye(10)).abs().max() < 1e-5
    v = plant(PlantedConfig(20, 8, (2,), dictionary="polygon", sides=5), 0).dictionary
    gram = v @ v.T
    assert float(gram[0, 1]) == pytest.approx(0.309017, abs=1e-5)  # cos(72 degrees)
    assert gram[:5, 5:].abs().max() < 1e-5


def test_coefficients_keep_away_from_zero():
    _, found = sample(PlantedConfig(40, 8, (2,), coefficients="uniform"), n_rows=4000)
    assert float(found.codes.values.min()) >= 0.5 and float(found.codes.values.max()) <= 1.5
    _, found = sample(PlantedConfig(40, 8, (2,), coefficients="exponential"), n_rows=4000)
    assert float(found.codes.values.min()) >= 0.1
    assert float(found.codes.values.mean()) == pytest.approx(1.0, abs=0.05)


def test_the_same_seed_gives_the_same_stream_and_another_another():
    planted = plant(PlantedConfig(), 3)
    first, again, other = (planted.batches(16, seed) for seed in (1, 1, 2))
    a, b, c = (torch.cat([next(s) for _ in range(3)]) for s in (first, again, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(plant(PlantedConfig(), 4).dictionary, planted.dictionary)


def test_an_sae_of_the_same_seed_does_not_start_from_the_planted_dictionary():
    truth = plant(PlantedConfig(128, 42), 0).dictionary
    sae = SAE(SAEConfig(42, 512), generator=torch.Generator().manual_seed(0))
    assert float((truth @ sae.W_dec.detach().T).max()) < 0.9


def test_many_features_stream_without_a_dense_matrix():
    planted = plant(PlantedConfig(65_536, 32, (3,), zipf=0.5), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.profiler.profile(profile_memory=True) as profile:
        found = planted.sample(4096, generator)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert found.x.shape == (4096, 32) and len(found.codes.values) == 3 * 4096
    assert largest < 4096 * 65_536 * 4 / 20  # a dense H alone takes 1 GiB


@pytest.mark.parametrize(
    "bad",
    [
        {"row_sparsity": (0,)}, {"row_sparsity": (70,)}, {"strength": 1.5}, {"noise": -1.0},
        {"dictionary": "orthogonal"}, {"dictionary": "polygon", "sides": 3},
        {"dictionary": "polygon", "sides": 1}, {"n": 127, "structure": "pairs"},
        {"structure": "topics", "n_topics": 60},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_with_what_came(bad):
    with pytest.raises(UserError, match="got"):
        PlantedConfig(**bad)
