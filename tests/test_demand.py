"""Targets from the data: by hand, and on data whose frequencies are known."""

import pytest
import torch

from sae_core.checkpoint import load_checkpoint, save_checkpoint
from sae_core.demand import targets
from sae_core.gba import GBAConfig, assign_groups, identifiable_k
from sae_core.sae import SAE, SAEConfig
from sae_core.synthetic import PlantedConfig, plant
from sae_core.train import TrainConfig, TrainState, train


def test_targets_are_group_means_with_a_floor_that_sum_to_k():
    # groups of two: means .4, .1, .01; floor k / (ratio * 6) = 1 / 30; sum 2 * (.4 + .1 + .0333)
    demand = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.02, 0.0], dtype=torch.float64)
    taf = targets(demand, assign_groups(6, 3), 1, 5.0)
    whole = 2 * (0.4 + 0.1 + 1 / 30)
    assert taf.tolist() == pytest.approx([0.4 / whole, 0.1 / whole, 1 / 30 / whole])


def test_a_target_stays_below_one():
    demand = torch.tensor([0.9, 0.9, 0.9, 0.9], dtype=torch.float64)
    assert targets(demand, assign_groups(4, 2), 4, 5.0).tolist() == [0.9, 0.9]


def run(steps: int, **changes) -> tuple[SAE, TrainState]:
    planted = plant(PlantedConfig(32, 24, (2,)), 0)
    sae = SAE(SAEConfig(24, 48, k=2), generator=torch.Generator().manual_seed(0))
    state = TrainState()
    config = TrainConfig(steps=steps, batch_size=256, init_tokens=2048, gba=GBAConfig(**changes))
    list(train(sae, planted.batches(256, 0), config, state))
    return sae, state


def test_the_frequencies_of_planted_features_are_found():
    # 32 features of frequency 2/32 among 48 latents: two thirds of the groups at about that, the
    # rest near the floor
    _, state = run(600)
    taf = state.taf.sort(descending=True).values
    assert ((taf[:6] > 0.6 * 2 / 32) & (taf[:6] < 1.6 * 2 / 32)).all()
    assert (taf[-2:] < 0.5 * 2 / 32).all()
    assert float(state.taf[state.group].sum()) == pytest.approx(2.0)
    assert torch.bincount(state.group).tolist() == torch.bincount(assign_groups(48, 10)).tolist()


def test_given_targets_are_left_alone():
    _, fixed = run(30, targets="fixed", ratio=10.0)
    assert float(fixed.taf[0] / fixed.taf[-1]) == pytest.approx(10)
    assert fixed.group.tolist() == assign_groups(48, 10).tolist()
    _, given = run(30, htf=0.1, ltf=0.01)
    assert given.taf[[0, -1]].tolist() == pytest.approx([0.1, 0.01])


def test_resuming_gives_the_same_targets(tmp_path):
    planted = plant(PlantedConfig(32, 24, (2,)), 0)
    x = torch.cat([b for b, _ in zip(planted.batches(128, 0), range(40), strict=False)]).split(128)
    config = TrainConfig(
        steps=30, batch_size=128, init_tokens=512, log_every=1, gba=GBAConfig(calibrate_tokens=0)
    )
    sae = SAE(SAEConfig(24, 48, k=2), generator=torch.Generator().manual_seed(0))
    state = TrainState()
    for record in train(sae, iter(x), config, state):
        if record.step == 15:
            save_checkpoint(tmp_path, sae, state, config)
    loaded = load_checkpoint(tmp_path, config)
    assert loaded is not None
    again, resumed = loaded
    list(train(again, iter(x[resumed.step :]), config, resumed))
    assert torch.equal(resumed.demand, state.demand) and resumed.threshold == state.threshold
    assert torch.equal(resumed.taf, state.taf) and torch.equal(again.W_dec, sae.W_dec)


def test_identifiable_k():
    assert identifiable_k(576, 4608) == 57  # 2 * 57 ln(4608 / 57) + 71.25 = 572.0; 58: 580.1
    assert identifiable_k(4, 4) == 1 and identifiable_k(64, 16) == 4
    assert SAEConfig(576, 4608).k == 57 and SAEConfig(576, 4608, k=64).k == 64
