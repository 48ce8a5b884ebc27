"""The fuzzer's command lines reach behind the parser, and its counts are those asked for."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import fuzz
from benchmarks.fuzz_options import base_arguments, option_inputs
from benchmarks.fuzz_pickle import mutate_state
from benchmarks.fuzz_readers import Reader
from sae_core.errors import UserError
from sae_core.sae import SAE, SAEConfig, save_sae


@pytest.fixture
def root(tmp_path: Path) -> Path:
    sae = SAE(SAEConfig(4, 8, kind="topk", k=2), generator=torch.Generator().manual_seed(0))
    save_sae(tmp_path / "run" / "sae", sae, {"hook_point": "layers.0.out"})
    (tmp_path / "run" / "run.json").write_text("{}")
    return tmp_path


def test_hostile_options_of_convert_are_judged_by_the_command(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = root / "work" / "in"
    found, whole = Counter(), 0
    for number, (told, act) in enumerate(option_inputs(root, "convert", 0, work)):
        monkeypatch.chdir(root / "work")
        try:
            act()
            found["accepted"] += 1
            is_written = (root / "work" / "out" / "cfg.json").is_file()
            assert is_written == ("whole" in told and "to=native" not in told)
            whole += is_written
        except UserError:
            found["refused"] += 1
            assert number, "the good command line itself is refused"
        if number == 50:
            break
    assert found["accepted"] > 5 and found["refused"] > 20 and whole > 0, found


def test_only_a_dry_run_is_given_another_place_to_write(root: Path) -> None:
    inputs = option_inputs(root, "convert", 1, root / "work" / "in")
    lines = [act.args[0] for _, act in (next(inputs) for _ in range(400))]  # type: ignore[attr-defined]
    outs = [line for line in lines if sum(one.split("=")[0] == "--out" for one in line) > 1]
    assert len(outs) > 20 and all("--dry-run" in line for line in outs)
    assert sum("--dry-run" not in line for line in lines) > 50
    assert base_arguments(root, "convert")[-1] == "--dry-run"


@pytest.mark.parametrize(("each", "wanted"), [(7, [7, 7]), (None, [80, 20])])
def test_as_many_inputs_of_each_as_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: int | None, wanted: list[int]
) -> None:
    asked = []
    one = Reader("a", tmp_path, lambda _: None)
    monkeypatch.setattr(fuzz, "make_readers", lambda _: [one])
    monkeypatch.setattr(fuzz, "option_names", lambda: ["train"])

    def run(_root: Path, _name: str, n: int, _make: object) -> dict[str, int]:
        asked.append(n)
        return {"accepted": n}

    monkeypatch.setattr(fuzz, "run_inputs", run)
    rows = fuzz.fuzz_rows(tmp_path, 100, 0, None, each)
    assert asked == wanted == [row["inputs"] for row in rows]
    assert all(row["seconds"] >= 0 and row["traceback"] == 0 for row in rows)


def test_changed_pickles_are_seeded_and_of_many_kinds(tmp_path: Path) -> None:
    import numpy as np

    torch.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "x.pt")
    good = (tmp_path / "x.pt").read_bytes()
    runs = [[mutate_state(good, np.random.default_rng([s, i])) for i in range(60)]
            for s in (0, 0, 1)]  # fmt: skip
    assert runs[0] == runs[1] != runs[2]
    assert sum(one != good for one in runs[0]) > 50
    assert any(b"posix" in one for one in runs[0]) and any(len(one) > 9000 for one in runs[0])
