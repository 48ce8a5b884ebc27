"""The comparison with other trainers: what it measures, how it picks, and what its goals say."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.peers import (
    LR_TIMES,
    SETTINGS,
    Driver,
    chosen,
    measured,
    quality,
    row,
    spec_of,
    speed,
    spread,
    write_arrays,
)
from benchmarks.peers_drivers import batches, repeated
from benchmarks.peers_drivers import quality as fvu_and_l0
from benchmarks.peers_table import TIMES, goals, measure, peers
from sae_core.activations import HarvestConfig
from sae_core.errors import UserError
from sae_core.harvest import harvest_shards
from sae_core.text import TextRow

D_IN, D_SAE = 16, 64


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random tokens as the benchmark stores them."""
    folder = tmp_path_factory.mktemp("peers")
    generator = np.random.default_rng(0)
    paths = {}
    for name, n in (("train", 8192), ("held_out", 1024)):
        np.save(folder / f"{name}.npy", generator.normal(size=(n, D_IN)).astype(np.float32))
        paths[name] = str(folder / f"{name}.npy")
    return paths


def spec(files: dict[str, str], trainer: str, setting: str, **more: Any) -> dict[str, Any]:
    return spec_of(trainer, setting, files, d_sae=D_SAE, threads=1, **{"round": 2} | more)


def speed_row(trainer: str, cpu_ms: float, **more: Any) -> dict[str, Any]:
    """A record of the speed part with one time for everything."""
    described = {"trainer": trainer, "setting": "s", "d_sae": 4608, "threads": 1, "lr_times": 1}
    columns = {"peak_MiB": 500.0, "times_floor": 3.0, "load": 0.5, "wall_ms": 50.0}
    columns |= spread("cpu_ms", [cpu_ms]) | more
    return row("speed", described | {"threads": more.get("threads", 1)}, **columns)


def quality_row(trainer: str, fvu: float, lr_times: int = 1) -> dict[str, Any]:
    described = {"trainer": trainer, "setting": "s", "d_sae": 4608, "threads": 1}
    return row("quality", described | {"lr_times": lr_times}, fvu=fvu, l0=32.0)


def test_batches_come_in_order_and_start_again(tmp_path: Path) -> None:
    x = np.arange(7 * 3, dtype=np.float32).reshape(7, 3)
    np.save(tmp_path / "x.npy", x)
    stream = batches(tmp_path / "x.npy", 3)
    found = [next(stream).numpy() for _ in range(3)]
    np.testing.assert_array_equal(found[0], x[:3])
    np.testing.assert_array_equal(found[1], x[3:6])
    np.testing.assert_array_equal(found[2], x[:3])  # the seventh row makes no batch


def test_a_round_is_so_many_steps() -> None:
    seen: list[float] = []
    stream = iter([torch.full((1, 1), float(i)) for i in range(5)])
    advance = repeated(lambda x: seen.append(float(x)), stream, 2)
    advance()
    advance()
    assert seen == [0, 1, 2, 3]


def test_quality_of_the_mean_is_one_and_of_the_truth_nought(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(3, 1, size=(2048, D_IN)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mean = torch.from_numpy(x.mean(0))
    codes = torch.tensor([1.0, 0.0, -2.0])

    def by_mean(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mean.expand_as(part), codes.expand(len(part), 3)

    found = fvu_and_l0(by_mean, tmp_path / "x.npy")
    assert found["fvu"] == pytest.approx(1, abs=1e-6)  # float32 sums of 32,768 numbers
    assert found["l0"] == 2
    assert fvu_and_l0(lambda part: (part, part), tmp_path / "x.npy")["fvu"] == 0


def test_stored_tokens_have_one_norm(tmp_path: Path, tiny_lm: Any) -> None:
    rows = [TextRow(row_id=i, text="Once upon a time there was a dog.", meta={}) for i in range(3)]
    folders = harvest_shards(
        tiny_lm, rows, ["layers.2.out"], tmp_path / "a", HarvestConfig(), data_id="dogs"
    )
    stored = folders["layers.2.out"]
    places = np.array([4, 1])
    write_arrays(stored, places, tmp_path / "x.npy")
    x = torch.from_numpy(np.load(tmp_path / "x.npy"))
    wanted = stored.gather(torch.from_numpy(places)).x.float()
    torch.testing.assert_close(x.norm(dim=1), torch.full((2,), stored.d_in**0.5))
    torch.testing.assert_close(torch.cosine_similarity(x, wanted), torch.ones(2))


def test_ours_settles_before_it_is_timed(files: dict[str, str]) -> None:
    given = spec(files, "ours gba", "float32", steps=400)
    with Driver(sys.executable, given) as driver:
        first = driver.ask("round")["l0"]
        settled = driver.ask("settle")["l0"]
        after = driver.ask("round")["l0"]
    assert first > 0 and settled >= 0.95 * given["k"] and after > 0.8 * given["k"]


def test_ours_is_timed_beside_the_floor(files: dict[str, str]) -> None:
    specs = [spec(files, "floor", "bfloat16"), spec(files, "ours topk", "float32")]
    pythons = {"floor": sys.executable, "ours topk": sys.executable}
    floor, mine = speed(pythons, specs, rounds=2)
    assert floor["times_floor"] == 1
    assert mine["times_floor"] == mine["cpu_ms"] / floor["cpu_ms"]
    assert 0 < mine["cpu_ms_low"] <= mine["cpu_ms"] <= mine["cpu_ms_high"]
    assert mine["peak_MiB"] >= mine["start_MiB"] > 50  # torch alone is more


def test_training_brings_the_error_down(files: dict[str, str]) -> None:
    few, many = (
        quality(sys.executable, spec(files, "ours topk", "float32", steps=n, round=n, k=8))
        for n in (1, 20)
    )
    assert many["fvu"] < 0.9 * few["fvu"]
    assert many["l0"] <= 8
    assert many["tokens"] == 20 * 2048


def test_the_quickest_setting_goes_on_and_a_broken_one_is_noted(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "ours topk", ("float32", "float7"))
    best, rows = chosen({"ours topk": sys.executable}, files, D_SAE, 1, steps=1)
    assert best == {"ours topk": "float32"}
    assert rows[0]["cpu_ms"] > 0
    assert "to answer 'round', got:" in rows[1]["note"]


def test_only_the_comparisons_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(_pythons: object, _files: object, *size: int, steps: int) -> tuple[dict, list]:
        asked.append(size)
        return {}, []

    monkeypatch.setattr("benchmarks.peers.chosen", noted)
    monkeypatch.setattr("benchmarks.peers.speed", lambda *_: [])
    args = argparse.Namespace(size="full", part="speed", only=["18432x1", "4608x2"])
    assert measured(args, {}, {}) == []
    assert asked == [(4608, 2), (18432, 1)]


def test_quality_is_that_of_either_optimiser_of_sparsify(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(_python: object, described: dict[str, Any]) -> dict[str, Any]:
        asked.append((described["trainer"], described["setting"], described["lr_times"]))
        return row("quality", described)

    best = {"sparsify": "bfloat16", "ours topk": "float32"}
    monkeypatch.setattr("benchmarks.peers.chosen", lambda *_, **__: (best, []))
    monkeypatch.setattr("benchmarks.peers.quality", noted)
    args = argparse.Namespace(size="full", part="quality", only=None)
    rows = measured(args, dict.fromkeys(best, "python"), {})
    pairs = [("sparsify", "bfloat16"), ("ours topk", "float32"), ("sparsify", "adam bfloat16")]
    assert asked == [(*pair, times) for pair in pairs for times in LR_TIMES]  # ours as theirs
    assert len({one["name"] for one in rows}) == 3 * len(LR_TIMES)


def test_a_trainer_that_is_not_there_is_an_error(files: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"Expected unknown \(s\) to answer 'round', got: KeyError"):
        quality(sys.executable, spec(files, "unknown", "s"))


def test_goals_compare_the_quicker_of_ours_with_each_peer() -> None:
    rows = [
        speed_row("sparsify", 300, peak_MiB=600.0), speed_row("sae_lens", 600, peak_MiB=900.0),
        speed_row("ours gba", 150, peak_MiB=660.0, times_floor=1.5), speed_row("ours topk", 200),
    ]  # fmt: skip
    found = {goal.name.split(",")[0]: goal for goal in goals(rows)}
    by_peer = {peer: found[f"times as quick as {peer} (s)"] for peer in ("sparsify", "sae_lens")}
    assert (by_peer["sparsify"].value, by_peer["sparsify"].met) == (2, True)
    assert (by_peer["sae_lens"].value, by_peer["sae_lens"].met) == (4, False)
    assert found["step over the bfloat16 encoder product"].met
    memory = found["peak memory over the leanest peer's"]
    assert (memory.value, memory.met) == (pytest.approx(1.1), False)


def test_two_threads_are_judged_by_the_clock() -> None:
    assert (measure(1), measure(2)) == ("cpu_ms", "wall_ms")
    rows = [
        speed_row("sparsify", 1, threads=2, wall_ms=90.0),
        speed_row("ours gba", 1, threads=2, wall_ms=30.0),
    ]
    (first, *_) = goals(rows)
    assert (first.value, first.note) == (3, "ours gba s; load average 0.5")


def test_quality_is_judged_against_the_better_rate() -> None:
    rows = [
        quality_row("sparsify", 0.5), quality_row("sparsify", 0.2, lr_times=4),
        quality_row("ours gba", 0.3), quality_row("ours topk", 0.2),
        quality_row("ours gba", 0.4, lr_times=2), quality_row("ours topk", 0.4, lr_times=2),
    ]  # fmt: skip
    gba, topk = goals(rows)
    assert (gba.value, gba.met) == (pytest.approx(1.5), False)
    assert (topk.value, topk.met) == (1, True)


def test_the_table_shows_the_better_fvu() -> None:
    rows = [speed_row("sparsify", 300), speed_row("floor", 100)]
    rows += [quality_row("sparsify", 0.5), quality_row("sparsify", 0.25, lr_times=4)]
    head, _, *lines = peers({"rows": rows}).splitlines()
    assert head.startswith("| trainer | setting |")
    assert lines == ["| sparsify | s | 4608 | 1 | 300 | 300–300 | 3 | – | 500 | 0.25 |"]


def test_every_peer_has_settings_and_a_goal() -> None:
    assert {name for name in SETTINGS if not name.startswith("ours")} == set(TIMES)
