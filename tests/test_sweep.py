"""``sweep``: one harvest for all runs, and each run is the one that ``train`` makes."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sae_apps.tasks import sweep_run
from sae_apps.tasks.main import main
from sae_core.activations import HarvestConfig
from sae_core.errors import UserError
from sae_core.harvest import harvest_each, harvest_shards
from sae_core.models import LanguageModel
from sae_core.text import rows_from_texts
from tests.command import refusal, run_json

N_ROWS = 300
# Quantities of results.json that say how long and where, not what.
VARYING = ("seconds", "wall_seconds", "peak_memory_bytes", "out", "machine", "seal")
HOOKS, KINDS = ("layers.3.out", "layers.1.out"), ("gba", "topk")
RUNS = [f"{hook}-{kind}-128-seed0" for hook in HOOKS for kind in KINDS]


@pytest.fixture(scope="module")
def shared(
    shared_data: Path, stories260k: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """What all runs share: two shards of training tokens, 40 steps, checkpoints every 20."""
    file = tmp_path_factory.mktemp("text") / "problems.jsonl"
    with gzip.open(shared_data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(next(lines)) for _ in range(N_ROWS)]
    file.write_text("".join(json.dumps({"text": r["question"]}) + "\n" for r in records))
    argv = ["--model", str(stories260k), "--text", str(file), "--tokens", "10k", "--k", "8"]
    argv += ["--batch-size", "256", "--context-size", "64", "--eval-tokens", "500"]
    argv += ["--loss-tokens", "100", "--checkpoint-every", "20", "--train.log_every", "5"]
    argv += ["--train.init_tokens", "2048", "--train.gba.calibrate_tokens", "2048"]
    return [*argv, "--harvest.window_rows", "8", "--quiet"]


@pytest.fixture(scope="module")
def lists() -> list[str]:
    return ["--hooks", *HOOKS, "--kinds", *KINDS, "--widths", "128"]


@pytest.fixture(scope="module")
def swept(
    shared: list[str], lists: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:  # fmt: skip
    """A sweep that nothing interrupted. Tests leave it as it is."""
    out = tmp_path_factory.mktemp("sweep") / "x"
    assert main(["sweep", *shared, *lists, "--out", str(out)]) == 0
    return out


def results(run: Path) -> dict:
    found = json.loads((run / "results.json").read_text())
    return {name: value for name, value in found.items() if name not in VARYING}


def assert_same_run(run: Path, reference: Path) -> None:
    """Settings, weights and metrics are equal bit by bit, and so is the evaluation."""
    for name in ("run.json", "metrics.jsonl", "sae/sae.safetensors"):
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    assert results(run) == results(reference)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_sweep(out: Path, whole: Path, names: list[str]) -> None:
    """The sweep holds these runs of the whole one, and nothing else."""
    assert {p.name for p in out.iterdir()} == {
        *names, "activations", "sweep.json", "summary.json"
    }  # fmt: skip
    for name in names:
        assert_same_run(out / name, whole / name)
    assert files(out / "activations") == files(whole / "activations")
    rows = json.loads((whole / "summary.json").read_text())["runs"]
    found = json.loads((out / "summary.json").read_text())["runs"]
    assert found == [row for row in rows if row["run"] in names]


# ---- one harvest ----


def test_one_pass_writes_what_each_hook_point_alone_would(
    tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    rows = rows_from_texts([f"Tom saw a tree and {i} dogs. Sue was happy." for i in range(40)])
    config, calls = HarvestConfig(batch_tokens=128, context_size=64, window_rows=8), 0

    def counted(*_: object) -> None:
        nonlocal calls
        calls += 1

    folders = {hook: tmp_path / hook for hook in HOOKS}
    handle = tiny_lm.model.base_model.register_forward_pre_hook(counted)
    try:
        found = harvest_each(tiny_lm, rows, folders, config, shard_tokens=100, data_id="rows")
        together, calls = calls, 0
        for hook in HOOKS:
            alone = tmp_path / "alone" / hook
            harvest_shards(tiny_lm, rows, [hook], alone, config, shard_tokens=100, data_id="rows")
            assert files(alone) == files(folders[hook])
            assert found[hook].hook_point == hook and len(found[hook].maps) > 3
        assert calls == 2 * together > 6
        calls = 0
        again = harvest_each(tiny_lm, rows, folders, config, shard_tokens=100, data_id="rows")
        assert again.keys() == found.keys() and calls == 0
    finally:
        handle.remove()


@pytest.mark.parametrize("lead", [1, 3])
def test_folders_of_different_length_end_alike(
    lead: int, tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    """As a kill between two folders leaves them, or a hook point that came later."""
    rows = rows_from_texts([f"Tom saw a tree and {i} dogs. Sue was happy." for i in range(40)])
    config = HarvestConfig(batch_tokens=128, context_size=64, window_rows=8)
    whole = {hook: tmp_path / "whole" / hook for hook in HOOKS}
    harvest_each(tiny_lm, rows, whole, config, shard_tokens=100, data_id="rows")
    folders = {hook: tmp_path / "cut" / hook for hook in HOOKS}
    ahead = HOOKS[1]
    shutil.copytree(whole[ahead], folders[ahead])
    (folders[ahead] / "manifest.json").unlink()
    journal = folders[ahead] / "progress.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: 1 + lead]))
    for shard in sorted(folders[ahead].glob("shard-*"))[lead:]:
        shard.unlink()
    kept = [p.stat().st_mtime_ns for p in sorted(folders[ahead].glob("shard-*"))]
    harvest_each(tiny_lm, rows, folders, config, shard_tokens=100, data_id="rows")
    for hook in HOOKS:
        assert files(folders[hook]) == files(whole[hook])
    assert [p.stat().st_mtime_ns for p in sorted(folders[ahead].glob("shard-*"))][:lead] == kept


def test_folders_for_one_pass_are_checked(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    rows, config = rows_from_texts(["Tom saw a tree."]), HarvestConfig()
    with pytest.raises(UserError, match="each with a folder of its own"):
        harvest_each(tiny_lm, rows, {}, config, data_id="x")
    with pytest.raises(UserError, match="each with a folder of its own"):
        harvest_each(tiny_lm, rows, dict.fromkeys(HOOKS, tmp_path / "a"), config, data_id="x")
    assert list(tmp_path.iterdir()) == []


# ---- the command ----


def test_every_run_is_that_of_train(swept: Path, shared: list[str], tmp_path: Path) -> None:
    for hook, kind in (("layers.3.out", "gba"), ("layers.1.out", "topk")):
        alone = tmp_path / f"{hook}-{kind}"
        argv = ["train", *shared, "--hook", hook, "--kind", kind, "--d-sae", "128"]
        assert main([*argv, "--out", str(alone)]) == 0
        run = swept / f"{hook}-{kind}-128-seed0"
        assert_same_run(run, alone)
        assert files(alone / "activations") == files(swept / "activations" / hook)
        assert (run / "activations").samefile(swept / "activations" / hook)
    weights = {(swept / name / "sae" / "sae.safetensors").read_bytes() for name in RUNS}
    assert len(weights) == len(RUNS)


def test_summary_as_text_and_json(
    swept: Path, shared: list[str], lists: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sweep_run, "open_inputs", None)  # a finished sweep opens no model
    before = files(swept)
    loud = [a for a in shared if a != "--quiet"]
    capsys.readouterr()
    assert main(["sweep", *loud, *lists, "--out", str(swept)]) == 0
    shown = capsys.readouterr()
    assert "finished: nothing to do" in shown.err
    table = shown.out.splitlines()[1:-1]
    assert len({len(line) for line in table}) == 1 and len(table) == 1 + len(RUNS)
    found = run_json(capsys, "sweep", *shared, *lists, "--out", str(swept))
    assert [row["run"] for row in found["runs"]] == RUNS and found["n_runs"] == 4
    for row, line in zip(found["runs"], table[1:], strict=True):
        own = results(swept / row["run"])
        assert (row["fvu"], row["l0"]) == (own["fvu"], own["l0"])
        assert row["loss_recovered"] == own["loss_recovered"]["recovered_zero"]
        assert line.split()[:5] == [row["hook_point"], row["kind"], "128", "0", f"{row['fvu']:.4f}"]
    assert files(swept) == before


def test_other_commands_take_every_run(swept: Path, shared: list[str], tmp_path: Path) -> None:
    one = swept / RUNS[3]  # not the first of its hook point
    assert main(["identify", str(one), str(swept / RUNS[2]), "--dry-run", "--quiet"]) == 0
    features = ["featurize", "--run", str(one), "--stored", "--out", str(tmp_path / "f")]
    assert main([*features, "--quiet"]) == 0
    argv = ["train", *shared, "--hook", HOOKS[1], "--kind", "relu", "--d-sae", "64"]
    argv += ["--activations", str(one), "--epochs", "0.3"]
    assert main([*argv, "--out", str(tmp_path / "relu")]) == 0
    moved = tmp_path / "moved"
    shutil.copytree(swept, moved, symlinks=True)
    assert (moved / RUNS[3] / "activations").samefile(moved / "activations" / HOOKS[1])


def test_a_sweep_grows_and_holds_out_the_same_rows(
    swept: Path, shared: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    shutil.copytree(swept, out, symlinks=True)
    before = files(out)
    more = ["--hooks", HOOKS[1], "layers.2.out", "--kinds", "topk", "--widths", "128"]
    found = run_json(capsys, "sweep", *shared, *more, "--seeds", "0", "1", "--out", str(out))
    assert found["n_runs"] == 4
    after = files(out)
    assert {k: v for k, v in after.items() if k in before and k != "summary.json"} == {
        k: v for k, v in before.items() if k != "summary.json"
    }
    alone = tmp_path / "alone"
    argv = ["train", *shared, "--hook", HOOKS[1], "--kind", "topk", "--d-sae", "128"]
    argv += ["--seed", "1", "--text.split_seed", "0", "--out", str(alone)]
    assert main(argv) == 0
    assert_same_run(out / f"{HOOKS[1]}-topk-128-seed1", alone)
    shards = {hook: files(out / "activations" / hook) for hook in (HOOKS[1], "layers.2.out")}
    assert shards[HOOKS[1]].keys() == shards["layers.2.out"].keys()
    changed = ["sweep", *shared, *more, "--out", str(out)]
    assert "text.split_seed is 0 there and 1 here" in refusal(capsys, *changed, "--seeds", "1")
    assert "k is 8 there and 9 here" in refusal(capsys, *changed, "--k", "9")
    assert files(out) == after


BAD = {
    "a hook point twice": (["--hooks", "layers.1.out", "layers.1.out"], "'layers.1.out' twice"),
    "under two names": (["--hooks", "layers.1.out", "model.layers.1.out"], "under two names"),
    "an unknown hook point": (["--hooks", "layers.1.out", "layers.9.out"], "0..4"),
    "no hook points": ([], "--hooks"),
    "an empty list": (["--hooks", "layers.1.out", "--kinds"], "--kinds"),
    "an unknown kind": (["--hooks", "layers.1.out", "--kinds", "topk", "topkk"], "'topk'"),
    "a kind twice": (["--hooks", "layers.1.out", "--kinds", "gba", "gba"], "--kinds once"),
    "a seed twice": (["--hooks", "layers.1.out", "--seeds", "3", "3"], "got 3 twice"),
    "no number": (["--hooks", "layers.1.out", "--seeds", "0", "x"], "--seeds must be a whole"),
    "no width": (["--hooks", "layers.1.out", "--widths", "64", "0"], "at least 1, got 0"),
    "a width below k": (["--hooks", "layers.1.out", "--kinds", "topk", "--widths", "4"], "4"),
    "one hook": (["--hook", "layers.1.out"], "--hooks"),
    "too little text": (["--hooks", "layers.1.out", "--tokens", "5M"], "5000000"),
    "an absent package": (["--hooks", "layers.1.out", "--log", "wandb"], "pip install wandb"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lists_are_one_sentence_and_leave_nothing(
    case: str, shared: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    flags, said = BAD[case]
    assert said in refusal(capsys, "sweep", *shared, *flags, "--out", str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_lists_from_a_file(shared: list[str], tmp_path: Path) -> None:
    from sae_apps.tasks.sweep import parse

    file = tmp_path / "sweep.yaml"
    file.write_text("hooks: [layers.1.out, layers.2.out]\nseeds: [4, 5]\nsae:\n  k: 3\n")
    plan, _ = parse(["--config", str(file), "--out", "x", "--kinds", "relu"])
    assert [(one.run.hook, one.run.seed) for one in plan.runs] == [
        ("layers.1.out", 4), ("layers.1.out", 5), ("layers.2.out", 4), ("layers.2.out", 5)
    ]  # fmt: skip
    assert {(one.sae["k"], one.sae["kind"], one.split_seed) for one in plan.runs} == {
        (3, "relu", 4)
    }
    file.write_text("hooks: []\n")
    with pytest.raises(UserError, match="at least one hook point, got none"):
        parse(["--config", str(file), "--out", "x"])


def test_a_folder_of_something_else_is_left_alone(
    swept: Path, shared: list[str], lists: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "notes.txt").write_text("mine")
    argv = ["sweep", *shared, *lists, "--out"]
    assert "other files" in refusal(capsys, *argv, str(tmp_path))
    assert "got a file" in refusal(capsys, *argv, str(tmp_path / "notes.txt"))
    assert "other files" in refusal(capsys, *argv, str(swept / RUNS[0]))
    assert "--out FOLDER" in refusal(capsys, *argv[:-1])
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_dry_run_estimates_and_writes_nothing(
    shared: list[str], lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sweep", *shared, *lists, "--seeds", "0", "1", "--out", str(tmp_path / "x")]
    found = run_json(capsys, *argv, "--dry-run")
    assert list(tmp_path.iterdir()) == [] and len(found["runs"]) == 8
    per_hook = (10_000 + 500) * (64 * 4 + 12)  # once for each hook point, however many SAEs
    assert found["disk_bytes"]["activations"] == 2 * per_hook
    assert found["disk_bytes"]["sae"] == 8 * 4 * (2 * 64 * 128 + 3 * 128 + 64)
    assert found["seconds"]["total"] > found["seconds"]["train"] > 0
    assert main([*argv, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "8 SAEs, 39 steps each, on one harvest of layers.3.out, layers.1.out" in shown
    assert f"{RUNS[0]}\n" in shown and "nothing was written" in shown


# ---- kill and resume ----

# a sweep of two runs, for the time of the tests
FEW, FEW_RUNS = ["--hooks", *HOOKS, "--kinds", "topk", "--widths", "128"], RUNS[1::2]
KILLS = {
    "between the hook points of a shard": "file:shard-00001.safetensors:2",
    "between the hook points at the end": "file:manifest.json:2",
    "before a run's settings are in place": "file:run.json:2",
    "in the second training": "train:1:25",
    "before the summary is in place": "file:summary.json:1",
}
# Each kill happens in a fork, so that the imports are paid for once.
KILLER = """
import os, signal, sys
from sae_apps.tasks import sweep, sweep_run, settings, evaluation
from sae_core import checkpoint, metrics, shards, train as _, models, store
import transformers.models.llama.modeling_llama
from sae_apps.tasks.main import main
from sae_apps.tasks.progress import Progress
try:
    from sae_core.kernels import cpu
except ImportError:  # numba is an extra
    pass

def arm(kill):
    how, *rest = kill.split(":")
    seen = []
    def die():
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "file":
        original = os.replace
        def replace(source, target, **kwargs):
            if os.path.basename(os.fspath(target)) == rest[0]:
                seen.append(target)
                if len(seen) == int(rest[1]):
                    die()
            return original(source, target, **kwargs)
        os.replace = replace
        return
    original = Progress.update_to
    def update_to(self, n):
        original(self, n)
        if how == "train" and self._what == "train":
            seen.append(self) if self not in seen else None
            if len(seen) > int(rest[0]) and n >= int(rest[1]):
                die()
    Progress.update_to = update_to

folder, kills, argv = sys.argv[1], sys.argv[2].split("|"), sys.argv[3:]
for number, kill in enumerate(kills):
    child = os.fork()
    if child == 0:
        arm(kill)
        os._exit(main(["sweep", *argv, "--out", f"{folder}/{number}"]))
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (kill, status)
"""


@pytest.fixture(scope="module")
def killed(shared: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sweep for each entry of KILLS, killed with SIGKILL there."""
    folder = tmp_path_factory.mktemp("killed")
    argv = [sys.executable, "-c", KILLER, str(folder), "|".join(KILLS.values()), *shared, *FEW]
    subprocess.run(argv, check=True)
    return folder


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_sweep_ends_as_if_unbroken(
    moment: str, killed: Path, swept: Path, shared: list[str]
) -> None:
    out = killed / str(list(KILLS).index(moment))
    assert (out / "sweep.json").exists() and not (out / "summary.json").exists()
    done = {p: p.stat().st_mtime_ns for p in out.glob("*/results.json")}
    assert main(["sweep", *shared, *FEW, "--out", str(out)]) == 0
    assert_same_sweep(out, swept, FEW_RUNS)
    assert {p: p.stat().st_mtime_ns for p in done} == done  # what is finished is not done again
    assert not [p for p in out.rglob(".*") if "tmp" in p.name], list(out.rglob(".*"))


def test_a_signal_in_a_training_saves_it(
    swept: Path, shared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_apps.tasks.progress import Progress

    original, out = Progress.update_to, tmp_path / "x"

    def update_to(self: Progress, n: int) -> None:
        original(self, n)
        if self._what == "train" and n == 15:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update_to", update_to)
        assert main(["sweep", *shared, *FEW, "--out", str(out)]) == 143
    assert (out / FEW_RUNS[0] / "checkpoints" / "step-00000015").is_dir()
    assert not (out / FEW_RUNS[1]).exists()
    assert main(["sweep", *shared, *FEW, "--out", str(out)]) == 0
    assert_same_sweep(out, swept, FEW_RUNS)
