"""What fuzzing found in the masks, options and results of Monet, kept as tests."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.fuzz_monet import make_monet, monet_arguments, read_mask, read_monet, read_result
from sae_core.errors import CorruptFileError, UserError
from sae_core.monet.masks import FORMAT, ExpertMask
from tests.command import one_sentence, refusal, run_json


def test_the_examples_are_read(tmp_path: Path, capsys) -> None:
    make_monet(tmp_path)
    read_monet(tmp_path / "model")
    read_mask(tmp_path, tmp_path / "masks")
    read_result(tmp_path, tmp_path / "out")
    assert run_json(capsys, *monet_arguments(tmp_path, "x"), "--dry-run")["passes"] == 7
    config = tmp_path / "model" / "config.json"
    good = config.read_text()
    for change in ({"num_hidden_layers": 1 << 40}, {"model_type": "llama", "n_layer": 1025},
                   {"text_config": {"num_layers": 1 << 31}}):  # fmt: skip
        config.write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(UserError, match=r"at most 1024 layers of .*, got [12],"):
            read_monet(tmp_path / "model")
    summary = tmp_path / "out" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"identity": {}}))
    with pytest.raises(UserError, match="holds another result"):
        read_result(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint64])
def test_a_mask_of_another_type_of_number(tmp_path: Path, kind: type) -> None:
    """torch takes bytes for a 0/1 mask: of all 16 experts, expert 0 would have stayed."""
    file, facts = tmp_path / "m.safetensors", {"format": FORMAT, "n": "4", "note": ""}
    save_file({"layers.0.removed": np.arange(16)}, file, facts)
    assert ExpertMask.load(file).size == 16
    save_file({"layers.0.removed": np.arange(16).astype(kind)}, file, facts)
    one_sentence(lambda: ExpertMask.load(file), f"{kind.__name__} under", CorruptFileError)


@pytest.mark.parametrize("name", ["layers.00.removed", "layers.-1.removed", "layers.0.kept", "0"])
def test_a_mask_under_another_name(tmp_path: Path, name: str) -> None:
    file, facts = tmp_path / "m.safetensors", {"format": FORMAT, "n": "4", "note": ""}
    save_file({name: np.arange(3)}, file, facts)
    one_sentence(lambda: ExpertMask.load(file), "got ValueError", CorruptFileError)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--seed", "-1", "at least 0, got -1"),
        ("--n-boot", "0", "at least 1, got 0"),
        ("--permutations", "-1", "at least 0, got -1"),
        ("--permutations", str(1 << 60), "at most 1,000,000, got 1,152,921,504,606,846,976"),
        ("--random-draws", str(1 << 60), "at most 1,000, got"),
    ],
)
def test_counts_that_are_a_slip(capsys, flag: str, value: str, message: str) -> None:
    assert message in refusal(capsys, "monet", "--model", "m", "--data", "d", flag, value)


@pytest.mark.parametrize(
    "change", [{"plain": 3}, {"masks": [{}]}, {"plain": {"a": "x"}}, None, [1]], ids=str
)
def test_a_summary_of_another_shape(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    from sae_apps.tasks import monet_run
    from sae_apps.tasks.finished import carry_out
    from sae_apps.tasks.monet_plan import Documents, Plan

    whole = {"plain": {"a": 2.0}, "out": "o", "masks": [
        {"mask": "a", "n_experts": 1, "rise": None, "selectivity": None}]}  # fmt: skip
    none = Documents([], [], [])
    plan = Plan(None, none, none, Path("o"), {})  # type: ignore[arg-type]
    found = whole | change if isinstance(change, dict) else change
    monkeypatch.setattr(monet_run, "finished_folder", lambda *_: whole)

    def shown() -> object:
        return carry_out(monet_run, plan, dry_run=False, overwrite=False)[0]

    assert shown() == whole
    if change is None:
        return
    monkeypatch.setattr(monet_run, "finished_folder", lambda *_: found)
    one_sentence(shown, "summary of this command", CorruptFileError)
