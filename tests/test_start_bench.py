"""The benchmark of imports: what it compares with what, and that a failed start is no short one."""

import sys

import pytest

from benchmarks import start
from sae_core.errors import UserError


def imports(name: str, library: str = start.OURS) -> start.Case:
    return start.imported(f"import {name}", library, sys.executable)


def test_each_case_is_compared_with_the_first_of_its_library(monkeypatch):
    seconds = {"import torch": 2.0, "import sae_core": 1.0, "import other": 9.0}

    def run(case: start.Case, argv: tuple[str, ...]) -> tuple[float, float, str]:
        times = 3 if case.library == "peer" else 1
        return times * seconds[case.name], 0.5, "a warning\ncounted 12 34.56\n"

    monkeypatch.setattr(start, "run", run)
    every = [imports("torch"), imports("sae_core")]
    every += [imports("torch", "peer"), imports("other", "peer")]
    rows = start.measured(every, 3)
    assert [row["times_torch"] for row in rows] == [1.0, 0.5, 1.0, 4.5]
    assert [row["name"] for row in rows[2:]] == ["peer: import torch", "peer: import other"]
    assert all(row["modules"] == 12 and row["peak_MiB"] == 34.6 for row in rows)


def test_modules_and_memory_are_those_of_the_process_itself():
    few, more = (start.counted(imports(name)) for name in ("sys", "json"))
    assert 10 < few["modules"] < more["modules"]
    assert 5 < few["peak_MiB"] < 50  # this process, its parent, holds torch


def test_a_command_that_fails_is_an_error_and_no_measurement():
    with pytest.raises(UserError, match="No module named 'absent_module'"):
        start.run(imports("absent_module"), imports("absent_module").argv)


def test_the_goals_are_met_strictly_below_their_bounds():
    row = dict.fromkeys(("times_torch_low", "times_torch_high", "seconds_low", "seconds_high"), 0.0)
    names = ("import sae_core", start.ALL_NAMES, "sae-apps --help", "sparsify: import sparsify")

    def met(times: float, seconds: float, peer: float) -> list[bool]:
        rows = [row | {"name": n, "times_torch": times, "seconds": seconds} for n in names[:3]]
        peers = [row | {"name": names[3], "times_torch": 1.0, "seconds": peer}]
        return [goal.met for goal in start.goals(rows + peers)]

    assert met(1.49, 0.99, 1.0) == [True] * 4
    assert met(1.5, 1.0, 1.0) == [False] * 4
