"""Agreement across seeds: what is compared, its intervals, and the cache of trained SAEs."""

import json
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import agreement, agreement_compare, agreement_saes, common
from benchmarks.agreement_compare import Run
from benchmarks.agreement_saes import Variant
from sae_core.activations import Activations
from sae_core.errors import UserError
from sae_core.sae import SAEConfig
from sae_core.train import TrainConfig

N, D = 40, 32
MEASURES = ("fvu", "l0", "dead_fraction")


@dataclass(frozen=True)
class Stored:
    """Activations in memory that look like stored ones."""

    x: torch.Tensor
    manifest: dict

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: torch.Tensor) -> Activations:
        return Activations(self.x[indices], indices, torch.zeros(len(indices), dtype=torch.int32))

    def iter_sequential(self, batch_size: int):
        return (self.gather(i) for i in torch.arange(len(self)).split(batch_size))


def stored(n: int = 2048, seed: int = 0) -> Stored:
    generator = torch.Generator().manual_seed(seed)
    return Stored(torch.randn(n, D, generator=generator) + 0.5, {"settings": {"seed": seed}})


def run(seed: int, n: int = N, **changes) -> Run:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n, D, generator=generator)
    peak = torch.rand(n, generator=generator)
    return replace(
        Run(seed, directions, peak, n, {name: 0.1 + seed / 100 for name in MEASURES}), **changes
    )


def variant(**changes) -> Variant:
    sae = SAEConfig(D, 24, kind="topk", k=4)
    config = TrainConfig(steps=4, batch_size=256, lr=1e-3, init_tokens=512)
    return replace(Variant("topk", "default", "reduced", sae, config), **changes)


# ---- two runs ----


def test_the_same_latents_in_another_order_and_scale_agree_fully():
    a = run(0)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    b = replace(a, directions=3 * a.directions[order], peak=a.peak[order])
    found = agreement_compare.compared(a, b)
    assert found["pw_mcc"] == pytest.approx(1)
    assert found["mean_mcs"] == pytest.approx(1)
    shares = [value for name, value in found.items() if "mcs_" in name]
    assert shares == [1.0] * 12
    assert {"mcs_.6", "top03_mcs_.9", "top005_mcs_.9"} <= set(found)


def test_a_part_is_found_in_the_whole_but_not_the_whole_in_the_part():
    whole = run(0)
    part = replace(whole, directions=whole.directions[:10], peak=whole.peak[:10])
    in_whole, in_part = agreement_compare.both_mcs(part, whole)
    assert in_whole.tolist() == pytest.approx([1] * 10)
    assert in_part[:10].tolist() == pytest.approx([1] * 10)
    assert float(in_part[10:].max()) < 0.9
    found = agreement_compare.compared(part, whole)
    assert found["pw_mcc"] == pytest.approx(1)
    assert found["mcs_.9"] == pytest.approx((1 + 10 / N) / 2)


def test_opposite_latents_do_not_agree():
    a = run(0)
    assert agreement_compare.compared(a, replace(a, directions=-a.directions))["pw_mcc"] < 0.5


def test_shares_of_the_strongest_latents_are_theirs_alone():
    """Only the two strongest of 1,000 have a partner; .3% are 3, .05% are 1."""
    a = run(0, n=1000, peak=torch.arange(1000).flip(0).float())
    b = run(1, n=1000, peak=a.peak)
    b.directions[:2] = a.directions[:2]
    found = agreement_compare.compared(a, b)
    assert found["top03_mcs_.9"] == pytest.approx(2 / 3)
    assert found["top005_mcs_.9"] == 1
    assert found["mcs_.9"] == pytest.approx(2 / 1000)


def test_the_top_fraction_is_of_all_latents_and_among_the_alive():
    half_dead = run(0, n=500, d_sae=1000)
    assert int(agreement_compare.strongest(half_dead, 0.003).sum()) == 3
    assert agreement_compare.strongest(half_dead, 1.0).all()


def test_random_directions_score_chance_and_share_what_the_data_shares():
    flat = torch.randn(300, D, generator=torch.Generator().manual_seed(0))
    spread = flat * torch.linspace(0.02, 1, D) ** 3  # few directions carry nearly everything
    a, b = (run(seed, n=150, directions=part) for seed, part in enumerate(spread.split(150)))
    uniform = agreement_compare.random_pair(a, b, matched=False)
    matched = agreement_compare.random_pair(a, b, matched=True)
    chance, chance_matched, real = (
        agreement_compare.compared(*pair)["pw_mcc"] for pair in (uniform, matched, (a, b))
    )
    assert chance < chance_matched - 0.1
    assert chance_matched == pytest.approx(real, abs=0.03)
    assert not torch.equal(uniform[0].directions, uniform[1].directions)
    wide = replace(a, directions=spread.repeat(100, 1))
    many = agreement_compare.random_pair(wide, b, matched=True)[0]
    moments = (many.directions.T @ many.directions) / len(many.directions)
    expected = torch.cat([spread.repeat(100, 1), b.directions])
    expected = (expected.T @ expected) / len(expected)
    assert torch.allclose(moments, expected, atol=0.03)


def test_the_curve_falls_from_all_to_none():
    a, b, c = run(0), run(1), run(2)
    points = agreement_compare.curve([(a, b), (a, c), (b, c)], 1.0)
    mean = [point[0] for point in points]
    assert (mean[0], mean[-1]) == (1.0, 0.0)
    assert mean == sorted(mean, reverse=True)
    assert all(low <= value <= high for value, low, high in points)
    at = agreement_compare.CURVE.index(0.6)
    pairs = [agreement_compare.compared(*pair)["mcs_.6"] for pair in ((a, b), (a, c), (b, c))]
    assert mean[at] == pytest.approx(np.mean(pairs))


# ---- intervals ----


def test_the_jackknife_of_a_mean_is_the_t_interval():
    values = np.array([1.0, 2.0, 4.0, 4.5])
    value, low, high = agreement_compare.jackknife(4, lambda who: float(values[list(who)].mean()))
    expected = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert (value, low, high) == pytest.approx((values.mean(), *expected))


def test_pairs_of_three_seeds_are_not_three_independent_values():
    """var = 2/3 sum (pair - mean)^2: four times what three independent pairs would have."""
    pairs = {(0, 1): 0.2, (0, 2): 0.3, (1, 2): 0.34}

    def mean(who: tuple[int, ...]) -> float:
        return float(np.mean([pairs[pair] for pair in combinations(who, 2)]))

    value, low, high = agreement_compare.jackknife(3, mean)
    assert low is not None and high is not None
    sem = stats.sem(list(pairs.values()))
    assert value == pytest.approx(0.28)
    assert high - value == pytest.approx(value - low)
    assert high - value == pytest.approx(stats.t.ppf(0.975, 2) * 2 * sem)


def test_two_seeds_have_no_interval():
    assert agreement_compare.jackknife(2, lambda who: 0.5) == (0.5, None, None)


# ---- rows and goals ----


def test_rows_are_flat_and_say_what_was_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    runs = [run(seed) for seed in range(3)]
    found = agreement.agreement_rows(variant(), 512, runs)
    (row,) = found.summary
    assert (row["name"], row["seeds"], row["tokens"], row["epochs"]) == (
        "topk-default-reduced", 3, 1024, 2.0,
    )  # fmt: skip
    pairs = [r["pw_mcc"] for r in found.pairs]
    assert row["pw_mcc"] == pytest.approx(np.mean(pairs))
    assert row["fvu"] == pytest.approx(0.11)
    assert row["pw_mcc_low"] < row["pw_mcc"] < row["pw_mcc_high"]
    assert row["pw_mcc"] == pytest.approx(row["chance_pw_mcc"], abs=0.05)
    assert [r["fvu"] for r in found.seeds] == pytest.approx([0.1, 0.11, 0.12])
    agreement.write(found, 0.0)
    other = agreement.agreement_rows(variant(name="wide"), 512, runs)
    agreement.write(other, 0.0)
    for name, count in (("", 2), ("_seeds", 6), ("_pairs", 6), ("_curve", 8 * 21)):
        rows = json.loads((tmp_path / f"agreement{name}.json").read_text())["rows"]
        assert len(rows) == len({r["name"] for r in rows}) == count
        assert all(not isinstance(value, dict | list) for r in rows for value in r.values())
    printed = capsys.readouterr().out
    assert "topk-wide-reduced" in printed
    assert "all alive" not in printed


def summary_row(kind: str, fvu: float, pw_mcc: float, name: str = "default") -> dict:
    return {
        "kind": kind, "variant": name, "size": "full", "d_sae": 8, "tokens": 9, "fvu": fvu,
        "l0": 64.0, "pw_mcc": pw_mcc, "pw_mcc_low": pw_mcc - 0.1, "pw_mcc_high": pw_mcc + 0.1,
    }  # fmt: skip


def test_agreement_at_equal_fvu_is_read_between_points():
    line = [summary_row("topk", 0.2, 0.5), summary_row("topk", 0.1, 0.3)]
    assert agreement.at_fvu(line, 0.15) == (pytest.approx(0.4), True)
    assert agreement.at_fvu(line, 0.1) == (0.3, True)
    assert agreement.at_fvu(line, 0.25) == (0.5, False)
    assert agreement.at_fvu(line[:1], 0.2) == (0.5, True)


def test_goals_compare_at_equal_fvu_and_say_where_they_cannot():
    gba = summary_row("gba", 0.15, 0.45)
    line = [summary_row("topk", 0.2, 0.6, "k48"), summary_row("topk", 0.1, 0.2)]
    first, over = agreement.goals([gba, *line])
    assert (first.met, first.value) == (False, 0.45)
    assert (over.met, over.value) == (True, pytest.approx(0.05))
    assert "not at equal FVU" not in over.note
    _, over = agreement.goals([gba, line[0]])
    assert not over.met
    assert "not at equal FVU" in over.note
    longer = line[0] | {"tokens": 99}
    assert len(agreement.goals([gba, longer])) == 1  # other lengths are not compared
    assert agreement.goals([summary_row("gba", 0.1, 0.85)])[0].met
    wide = [summary_row(kind, 0.1, 0.5, "wide") for kind in agreement.KINDS]
    assert agreement.goals(wide[:-1]) == []  # a variant is judged once all kinds have it
    assert [goal.met for goal in agreement.goals(wide)] == [False] * 5


# ---- settings and cache ----


def test_settings_are_changed_where_they_live():
    found = agreement_saes.make_variant(
        "gba", "x", "reduced", tokens=10 * 1024,
        settings=["sae.tied=true", "gba.ratio=100", "gba.start=zero", "lr=0.001"],
    )  # fmt: skip
    assert (found.sae.tied, found.train.gba.ratio, found.train.gba.start) == (True, 100, "zero")
    assert (found.train.lr, found.train.steps) == (0.001, 10)
    assert agreement_saes.make_variant("relu", "x", "reduced").train.lr == 2e-3
    for bad in ("gba.colour=1", "nobody.x=1", "colour=1", "lr.x=1"):
        with pytest.raises(UserError, match=f"got '{bad}'"):
            agreement_saes.make_variant("gba", "x", "reduced", settings=[bad])


def test_a_trained_sae_is_taken_from_the_cache_and_only_where_it_is_the_same(monkeypatch, tmp_path):
    data = stored()
    first = agreement_saes.trained(data, variant(), 0, tmp_path)  # type: ignore[arg-type]
    other = agreement_saes.trained(data, variant(), 1, tmp_path)  # type: ignore[arg-type]
    assert first.hash() != other.hash()
    again = agreement_saes.trained(data, variant(), 0, tmp_path, fresh=True)  # type: ignore[arg-type]
    assert again.hash() == first.hash()

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(agreement_saes, "train", refuse)
    cached = agreement_saes.trained(data, variant(name="renamed"), 0, tmp_path)  # type: ignore[arg-type]
    assert cached.hash() == first.hash()
    longer = variant(train=replace(variant().train, steps=5))
    for changed, source in ((longer, data), (variant(), stored(seed=1))):
        with pytest.raises(AssertionError, match="trained again"):
            agreement_saes.trained(source, changed, 0, tmp_path)  # type: ignore[arg-type]


def test_a_seed_decides_both_weights_and_order(monkeypatch, tmp_path):
    orders = []
    real = agreement_saes.batches

    def noted(*args, seed: int):
        orders.append(seed)
        return real(*args, seed=seed)

    monkeypatch.setattr(agreement_saes, "batches", noted)
    still = variant(train=replace(variant().train, lr=1e-12))  # weights stay where they began
    a, b = (agreement_saes.trained(stored(), still, seed, tmp_path) for seed in (0, 1))  # type: ignore[arg-type]
    assert orders == [0, 1]
    assert float((a.W_dec * b.W_dec).sum(1).abs().max().detach()) < 0.9


def test_the_whole_suite_on_a_small_scale(monkeypatch, tmp_path):
    """Through the command: train three seeds, measure, write; a second time nothing is trained."""

    class Small:
        lm, train, held_out = None, stored(), stored(1024, seed=3)

    argv = ["agreement", "--kinds", "topk", "--tokens", "4096", "--d-sae", "24", "--k", "4"]
    monkeypatch.setattr("sys.argv", [*argv, "--variant", "small"])
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(agreement_saes, "D_IN", D)
    monkeypatch.setattr(agreement, "prepare", lambda size: Small)
    monkeypatch.setattr(agreement, "prepare_labelled", lambda *_: [])
    monkeypatch.setattr(agreement, "cache_dir", lambda: tmp_path)
    agreement.main()
    text = (tmp_path / "agreement.json").read_text()
    (row,) = json.loads(text)["rows"]
    assert row["l0"] == pytest.approx(4, abs=0.1)
    assert row["chance_pw_mcc"] < row["pw_mcc"] < 1
    assert len(list(Path(tmp_path / "benchmarks" / "agreement").iterdir())) == 3
    monkeypatch.setattr(agreement_saes, "train", None)
    agreement.main()
    (same,) = json.loads((tmp_path / "agreement.json").read_text())["rows"]
    assert same == row


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--seeds", "1"], "at least 2 seeds, got 1"), (["--k", "32"], "need a name of their own")],
)
def test_a_command_that_makes_no_sense_is_refused(monkeypatch, capsys, argv, message):
    monkeypatch.setattr("sys.argv", ["agreement", *argv])
    with pytest.raises(SystemExit):
        agreement.main()
    assert message in capsys.readouterr().err
