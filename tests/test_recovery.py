"""The recovery suite: its grid, the choice of the best configuration, its goals, one short run."""

import pytest

from benchmarks import recovery, recovery_trial
from benchmarks.recovery import SETTINGS, Setting
from benchmarks.recovery_trial import Trial
from sae_core.synthetic import PlantedConfig


def row(setting: str, kind: str, config: str, seed: int, frr_9: float) -> dict:
    return {"setting": setting, "kind": kind, "config": config, "seed": seed, "frr_9": frr_9}


ROWS = [
    row("mixture", "gba", "default", 0, 1.0), row("mixture", "gba", "default", 1, 0.98),
    row("mixture", "topk", "k=4", 0, 0.9), row("mixture", "topk", "k=9", 0, 0.97),
    row("mixture", "topk", "k=9", 1, 0.99), row("mixture", "relu", "k=4", 0, 0.1),
]  # fmt: skip


def test_the_configuration_run_on_most_seeds_is_the_chosen_one():
    assert [r["seed"] for r in recovery.chosen(ROWS, "mixture", "topk")] == [0, 1]
    assert {r["config"] for r in recovery.chosen(ROWS, "mixture", "topk")} == {"k=9"}
    assert recovery.chosen(ROWS, "mixture", "jumprelu") == []


def test_goals_ask_for_every_seed_and_for_the_best_baseline():
    worst, over = recovery.goals(ROWS)
    assert worst.value == 0.98 and not worst.met
    assert over.value == pytest.approx(0.99 - 0.98) and over.met and "topk 0.9800" in over.note
    beaten = [*ROWS, row("mixture", "jumprelu", "k=3", 0, 1.0)]
    assert not recovery.goals(beaten)[1].met


def test_the_grid_lies_around_the_true_sparsity():
    # rows of 3 and of 20: 1.5 x 3, the mean 11.5, twice it
    assert recovery.sparsities(SETTINGS["mixture"]) == (4, 12, 23)


def test_the_path_begins_with_the_published_algorithm_and_ends_at_the_default():
    changes = recovery_trial.path()
    assert changes["published"].tied and changes["published"].gba == recovery_trial.paper_main()
    assert changes["default"] == Trial("gba")
    assert len(set(map(str, changes.values()))) == len(changes)  # no variant is another's copy


def test_a_short_run_finds_features_that_an_untrained_sae_has_not():
    setting = Setting(PlantedConfig(32, 24, (2,)), 96)
    curve: list[dict] = []
    found = recovery.recover(setting, Trial("gba"), 0, 300, curve)
    assert found["frr_9"] > 0.9
    assert curve[0]["frr_9"] < 0.5 and curve[-1]["step"] == 300
    again = recovery.recover(setting, Trial("gba"), 0, 300)
    other = recovery.recover(setting, Trial("gba"), 1, 300)
    assert again["mean_max_cosine"] == found["mean_max_cosine"] != other["mean_max_cosine"]
