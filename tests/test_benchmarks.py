"""The arithmetic of the benchmarks: frontier, goals, tables. Timings are not tested."""

import json
from math import log

import pytest

from benchmarks import common, sae_quality, tables


def row(kind: str, l0: float, fvu: float, **more) -> dict:
    known: dict = {
        "loss_recovered": 0.9,
        "name": f"{kind}-{l0}",
        "kind": kind,
        "l0": l0,
        "fvu": fvu,
        "dead_fraction": 0.0,
    }
    return known | {"latents_above_1.1_ceiling": 0, "worst_over_ceiling": 1.0} | more


POINTS = [row("topk", 32.0, 0.3), row("topk", 64.0, 0.2), row("topk", 128.0, 0.14)]


@pytest.mark.parametrize("order", [1, -1])
def test_the_frontier_is_linear_in_log_l0(order):
    points = POINTS[::order]
    assert sae_quality.frontier(points, "topk", 64.0) == pytest.approx(0.2)
    assert sae_quality.frontier(points, "topk", 32 * 2**0.5) == pytest.approx(0.25)
    assert sae_quality.frontier(points, "topk", 256.0) == pytest.approx(0.08)
    beyond = 0.3 - 0.1 * log(16 / 32) / log(2)
    assert sae_quality.frontier(points, "topk", 16.0) == pytest.approx(beyond)


def test_goals_say_what_was_kept_and_what_not():
    good = row("gba", 64.0, 0.19)
    bad = row("gba", 64.0, 0.21, dead_fraction=0.06, worst_over_ceiling=1.2)
    assert [g.met for g in sae_quality.goals([*POINTS, good])] == [True, True, True]
    goals = sae_quality.goals([*POINTS, bad])
    assert [g.met for g in goals] == [False, False, False]
    assert goals[0].value == pytest.approx(0.05)


def test_a_table_shows_a_dash_for_nothing_and_no_goal_is_hidden():
    assert common.table([{"a": None, "b": 0.123456}]).splitlines()[-1] == "| – | 0.1235 |"
    goal = {"name": "speed", "value": 2.0, "goal": "<= 1", "met": False, "note": ""}
    assert "**no**" in tables.goals({"goals": [goal]})


def test_results_are_flat_records_with_their_origin():
    for file in common.RESULTS.glob("*.json"):
        result = json.loads(file.read_text())
        names = {"name", "command", "commit", "date", "machine", "versions", "seconds"}
        assert names | {"rows", "goals"} == set(result)
        assert all(not isinstance(v, (dict, list)) for r in result["rows"] for v in r.values())
        assert result["command"].startswith("python -m benchmarks.")


def test_merged_results_replace_rows_by_name_and_keep_both_origins():
    old = {"command": "a", "commit": "1", "seconds": 2.0, "rows": [{"name": "x"}, {"name": "y"}]}
    new = {"command": "b", "commit": "2", "seconds": 3.0, "rows": [{"name": "y", "new": 1}]}
    found = common.merged(old, new)
    assert found["rows"] == [{"name": "x"}, {"name": "y", "new": 1}]
    assert (found["command"], found["commit"], found["seconds"]) == ("a; b", "1, 2", 5.0)
