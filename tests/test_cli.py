"""The commands, through ``main([...])`` and as installed: results, refusals, kills, resumes."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_apps.tasks import inspect as inspect_task
from sae_apps.tasks.main import COMMANDS, main
from sae_apps.tasks.progress import Progress
from sae_apps.tasks.runs import read_metrics
from sae_core.errors import UserError
from tests.command import installed, refusal, run_json

N_ROWS = 300
# Quantities of results.json that say how long and where, not what.
VARYING = ("seconds", "wall_seconds", "peak_memory_bytes", "out", "machine", "seal")


@pytest.fixture(scope="module")
def text(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real word problems, each labelled with one of two domains."""
    file = tmp_path_factory.mktemp("text") / "problems.jsonl"
    with gzip.open(shared_data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(next(lines)) for _ in range(N_ROWS)]
    file.write_text(
        "".join(
            json.dumps({"text": r["question"], "domain": "ab"[i % 2]}) + "\n"
            for i, r in enumerate(records)
        )
    )
    return file


@pytest.fixture(scope="module")
def arguments(stories260k: Path, text: Path) -> list[str]:
    """A run of a second: two shards of training tokens, 60 steps, checkpoints every 20."""
    return [
        *("--model", str(stories260k), "--text", str(text), "--tokens", "10k"),
        *(
            "--d-sae",
            "128",
            "--k",
            "8",
            "--batch-size",
            "256",
            "--epochs",
            "1.55",
            "--context-size",
            "64",
        ),
        *("--eval-tokens", "1k", "--loss-tokens", "300", "--checkpoint-every", "20"),
        *("--train.log_every", "5", "--quiet"),
    ]


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, with features of 100 rows. Tests leave it as it is."""
    out = tmp_path_factory.mktemp("run") / "x"
    assert main(["train", *arguments, "--out", str(out)]) == 0
    source = arguments[arguments.index("--text") + 1]
    assert main(["featurize", "--run", str(out), "--text", source, "--rows", "100"]) == 0
    return out


def weights(run: Path) -> bytes:
    return (run / "sae" / "sae.safetensors").read_bytes()


def results(run: Path) -> dict:
    found = json.loads((run / "results.json").read_text())
    return {name: value for name, value in found.items() if name not in VARYING}


def assert_same_run(run: Path, reference: Path) -> None:
    """Weights and metrics are equal bit by bit, and so is the evaluation."""
    assert weights(run) == weights(reference)
    assert (run / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    assert results(run) == results(reference)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- help ----


def test_help_names_every_command_quickly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in COMMANDS)
    code = "import sys; from sae_apps.tasks.main import main; main(['--help'])\n"
    code += "assert not {'torch', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"example:\n  sae-apps {command}" in text and "--json" in text
    assert ("default:" in text) and ("--dry-run" in text) == (command != "doctor")


def test_version_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sae-apps 0")
    assert "'train'" in refusal(capsys, "trian")


def test_installed_command() -> None:
    done = subprocess.run([installed(), "doctor", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["torch"]["threads"] >= 1
    done = subprocess.run([installed(), "train", "--d-sea", "3"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "sae-apps: error: Unknown option --d-sea; the nearest is --d-sae.\n"


# ---- train ----


def test_train_leaves_a_whole_run(finished: Path, stories260k: Path) -> None:
    names = {"run.json", "activations", "checkpoints", "metrics.jsonl", "sae", "results.json"}
    assert names <= {path.name for path in finished.iterdir()}
    run = json.loads((finished / "run.json").read_text())
    assert run["config"]["sae"]["d_sae"] == 128 and run["config"]["tokens"] == 10_000
    assert run["provenance"]["model_id"] == str(stories260k)
    found = results(finished)
    assert 0 < found["fvu"] < 0.9 and 0 < found["l0"] < 128 and found["n_eval_tokens"] == 1000
    assert found["n_tokens"] == found["steps"] * 256 == 60 * 256
    assert len(found["groups"]) == 10 and sum(g["n_latents"] for g in found["groups"]) == 128
    loss = found["loss_recovered"]
    assert loss["ce_clean"] < loss["ce_zero"] and loss["n_tokens"] > 100
    steps = [record["step"] for record in read_metrics(finished / "metrics.jsonl")]
    assert steps == list(range(5, 61, 5))


def test_held_out_rows_are_not_trained_on(finished: Path) -> None:
    rows = {
        part: {
            int(i)
            for file in (finished / "activations" / part).glob("shard-*.safetensors")
            for i in load_file(file)["row_id"]
        }
        for part in ("train", "held_out")
    }
    assert rows["train"] and rows["held_out"] and not rows["train"] & rows["held_out"]


def test_same_seed_same_weights_other_seed_others(
    arguments: list[str], finished: Path, tmp_path: Path
) -> None:
    for name, extra in (("same", []), ("other", ["--seed", "1"])):
        assert main(["train", *arguments, *extra, "--out", str(tmp_path / name)]) == 0
    assert_same_run(tmp_path / "same", finished)
    assert weights(tmp_path / "other") != weights(finished)


def test_a_finished_run_is_not_run_again(
    arguments: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(finished)
    loud = [a for a in arguments if a != "--quiet"]
    capsys.readouterr()
    assert main(["train", *loud, "--out", str(finished)]) == 0
    assert "finished: nothing to do" in capsys.readouterr().err
    assert files(finished) == before


def test_train_from_a_configuration_file_and_json(
    arguments: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["train", *arguments, "--print_config"]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    found = run_json(capsys, "train", "--config", str(file), "--out", str(tmp_path / "x"))
    assert found["fvu"] == results(finished)["fvu"] and found["out"] == str(tmp_path / "x")
    assert weights(tmp_path / "x") == weights(finished)


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_preset_in_a_configuration_file_counts(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: paper_main\ntrain: {gba: {ltf: 0.002}}\n")
    assert main([command, "--config", str(file), "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "rule: published" in text and "ltf: 0.002" in text  # of the preset and of the file
    assert main([command, "--config", str(file), "--preset", "ba", "--print-config"]) == 0
    assert "n_groups: 1\n" in capsys.readouterr().out  # the last one named


def test_preset_is_a_default_that_flags_override(tmp_path: Path) -> None:
    from sae_apps.tasks.train import parse

    settings, _ = parse(["--preset", "paper_main", "--ltf", "0.002", "--sae.tied"])
    gba = settings.train.gba
    assert (gba.period, gba.start, gba.ltf, settings.sae["tied"]) == (50, "zero", 0.002, True)
    plain, _ = parse([])
    assert plain.train.gba.start == "quantile"
    assert plain.sae_config(576).d_sae == 4608  # eight times the width where none is asked for


def test_every_kind_trains(arguments: list[str], tmp_path: Path) -> None:
    for kind in ("topk", "batch_topk", "relu", "jumprelu"):
        short = ["--kind", kind, "--epochs", "0.2", "--out", str(tmp_path / kind)]
        assert main(["train", *arguments, *short]) == 0
        found = results(tmp_path / kind)
        assert found["kind"] == kind and found["groups"] == [] and found["fvu"] < 1.5


def test_dry_run_estimates_and_writes_nothing(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run_json(capsys, "train", *arguments, "--out", "x", "--dry-run")
    assert list(tmp_path.rglob("*")) == []
    assert (found["stored_tokens"], found["steps"], found["d_in"]) == (10_000, 60, 64)
    # what the run itself leaves there, up to the few files beside the arrays
    assert 0.9 < found["disk_bytes"]["activations"] / ((10_000 + 1_000) * (64 * 4 + 12)) < 1.1
    assert found["seconds"]["total"] > 0 and found["memory_bytes"]["total"] > 0
    capsys.readouterr()
    assert main(["train", *arguments, "--dry-run"]) == 0
    assert "tokens/s through the model" in capsys.readouterr().out


def test_dry_run_refuses_what_the_run_would(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "layers.9" in refusal(capsys, "train", *arguments, "--dry-run", "--hook", "layers.9.out")
    message = refusal(capsys, "train", *arguments, "--dry-run", "--tokens", "9M")
    assert "9000000" in message and "hold only" in message


# ---- stop and resume ----


def stop_at(monkeypatch: pytest.MonkeyPatch, what: str, done: int, act: Callable[[], None]) -> None:
    """Let ``act`` happen once, when the stage ``what`` has finished ``done`` units."""
    original, happened = Progress.update_to, []

    def update_to(self: Progress, n: int) -> None:
        original(self, n)
        if self._what == what and n >= done and not happened:
            happened.append(n)
            act()

    monkeypatch.setattr(Progress, "update_to", update_to)


@pytest.mark.parametrize(
    ("signum", "code", "what", "done"),
    [
        (signal.SIGTERM, 143, "train", 35),
        (signal.SIGINT, 130, "train", 60),
        (signal.SIGTERM, 143, "harvest train", 9000),
    ],
)
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    signum: int,
    code: int,
    what: str,
    done: int,
    arguments: list[str],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x"
    with monkeypatch.context() as patch:
        stop_at(patch, what, done, lambda: os.kill(os.getpid(), signum))
        assert main(["train", *arguments, "--out", str(out)]) == code
    assert "Traceback" not in capsys.readouterr().err
    assert not (out / "results.json").exists()
    if what == "train":  # at a step that is no multiple of checkpoint_every
        assert (out / "checkpoints" / f"step-{done:08d}").is_dir()
    assert main(["train", *arguments, "--out", str(out)]) == 0
    assert_same_run(out, finished)


KILLS = {
    "in the second shard of the harvest": "stage:harvest train:9000",
    "in the held-out harvest": "stage:harvest held_out:1",
    "before the first checkpoint": "stage:train:15",
    "between metrics and checkpoint": "stage:train:40",
    "in the middle of writing a checkpoint": "file:step-00000040",
    "before the SAE is in place": "file:sae",
    "before the results are in place": "file:results.json",
}
# Each kill happens in a fork, so that the imports are paid for once.
KILLER = """
import os, signal, sys
from sae_apps.tasks import train, settings, evaluation, estimate
from sae_core.errors import UserError
from sae_core import checkpoint, metrics, shards, train as _, models, store
import transformers
from sae_apps.tasks.main import main
from sae_apps.tasks.progress import Progress

def arm(kill):
    how, _, rest = kill.partition(":")
    def die():
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stage":
        what, _, done = rest.partition(":")
        original = Progress.update_to
        def update_to(self, n):
            original(self, n)
            if self._what == what and n >= int(done):
                die()
        Progress.update_to = update_to
    else:
        original = os.replace
        def replace(source, target, **kwargs):
            if os.path.basename(os.fspath(target)) == rest:
                die()
            return original(source, target, **kwargs)
        os.replace = replace

folder, kills, argv = sys.argv[1], sys.argv[2].split("|"), sys.argv[3:]
for number, kill in enumerate(kills):
    child = os.fork()
    if child == 0:
        arm(kill)
        os._exit(main(["train", *argv, "--out", f"{folder}/{number}"]))
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (kill, status)
"""


@pytest.fixture(scope="module")
def killed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for each entry of KILLS, killed with SIGKILL there."""
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run(
        [sys.executable, "-c", KILLER, str(folder), "|".join(KILLS.values()), *arguments],
        check=True,
    )
    return folder


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_ends_as_if_unbroken(
    moment: str, killed: Path, arguments: list[str], finished: Path
) -> None:
    run = killed / str(list(KILLS).index(moment))
    assert (run / "run.json").exists() and not (run / "results.json").exists()
    assert main(["train", *arguments, "--out", str(run)]) == 0
    assert_same_run(run, finished)
    # nothing half-written is left behind
    assert not [p for p in run.rglob(".*") if "tmp" in p.name], list(run.rglob(".*"))


def test_sigterm_to_the_installed_command(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "x"
    argv = [installed(), "train", *arguments, "--epochs", "4000", "--out", str(out)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors and shown == ""
    assert list((out / "checkpoints").glob("step-*/state.safetensors"))


# ---- what train refuses ----


def text_file(folder: Path, content: bytes, name: str = "bad.txt") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


BAD_INPUT = {
    "unknown model": (["--model", "smolm2-135m"], ["smolm2-135m", "smollm2-135m"]),
    "no such folder": (["--model", "./nowhere"], ["nowhere"]),
    "unknown hook point": (["--hook", "layers.1.mpl.out"], ["layers.1.mlp.out"]),
    "layer out of range": (["--hook", "layers.5.out"], ["0..4", "5"]),
    "no such column": (["--column", "body"], ["body", "text", "domain"]),
    "no such text": (["--text", "./nowhere.jsonl"], ["nowhere.jsonl"]),
    "too few tokens": (["--tokens", "5M"], ["5000000"]),
    "no count": (["--tokens", "many"], ["--tokens", "'many'"]),
    "unknown option": (["--d-sea", "9"], ["--d-sae"]),
    "wrong type": (["--d-sae", "x"], ["d_sae", "'x'"]),
    "wrong choice": (["--kind", "gab"], ["gba"]),
    "k above d_sae": (["--kind", "topk", "--k", "500"], ["500", "128"]),
    "rate above one": (["--htf", "1.5"], ["1.5"]),
    "targets above one": (["--k", "100"], ["k=100", "d_sae=128"]),
    "more groups than latents": (["--groups", "129"], ["128", "129"]),
    "no held-out rows": (["--text.held_out_frac", "0"], ["held_out_frac"]),
    "context too long": (["--harvest.batch_tokens", "32"], ["64", "32"]),
    "no such device": (["--device", "tpu9"], ["tpu9"]),
    "absent log package": (["--log", "wandb"], ["pip install wandb"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    case: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    flags, words = BAD_INPUT[case]
    message = refusal(capsys, "train", *arguments, *flags, "--out", str(tmp_path / "x"))
    for word in words:
        assert word in message, message
    assert list(tmp_path.iterdir()) == []


def test_bad_text_files(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "empty": (text_file(tmp_path, b"", "empty.jsonl"), "empty"),
        "undecodable": (text_file(tmp_path, b"good line\n\xff\xfe bad\n" * 3), "line 2"),
        "blank": (text_file(tmp_path, b"\n\n", "blank.txt"), "blank.txt"),
        "suffix": (text_file(tmp_path, b"x", "text.doc"), ".doc"),
    }
    for file, word in cases.values():
        message = refusal(capsys, "train", *arguments, "--text", file, "--out", str(tmp_path / "x"))
        assert word in message
        assert not (tmp_path / "x").exists()


def test_out_is_needed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out" in refusal(capsys, "train", *arguments)


def test_unknown_key_in_a_configuration_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  gba:\n    htv: 0.1\n")
    message = refusal(capsys, "train", "--config", str(file))
    assert "train.gba.htv" in message and "train.gba.htf" in message


def test_the_broken_padding_id_of_a_gguf(
    stories260k: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = str(stories260k / "stories260K.original.gguf")
    message = refusal(capsys, "train", *arguments, "--model", broken, "--out", str(tmp_path / "x"))
    assert "padding" in message and "4294967295" in message
    assert list(tmp_path.iterdir()) == []


def test_nan_activations_name_the_row(
    stories260k: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(stories260k, model, ignore=shutil.ignore_patterns("*.gguf"))
    model.chmod(0o755)
    tensors = load_file(model / "model.safetensors")
    name = next(n for n in tensors if "layers.0.mlp.down_proj" in n)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    out = tmp_path / "x"
    message = refusal(capsys, "train", *arguments, "--model", str(model), "--out", str(out))
    assert "nan" in message and "row_id" in message
    assert not out.exists()


def test_an_out_folder_with_another_run_is_left_alone(
    arguments: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(finished)
    message = refusal(capsys, "train", *arguments, "--d-sae", "64", "--out", str(finished))
    assert "sae.d_sae is 128 there and 64 here" in message
    assert "seed is 0 there and 3 here" in refusal(
        capsys, "train", *arguments, "--seed", "3", "--out", str(finished)
    )
    assert files(finished) == before
    (tmp_path / "notes.txt").write_text("mine")
    assert "other files" in refusal(capsys, "train", *arguments, "--out", str(tmp_path))
    assert "file" in refusal(capsys, "train", *arguments, "--out", str(tmp_path / "notes.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def unfinished_copy(finished: Path, folder: Path) -> Path:
    """The run as it was before its last step was evaluated."""
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "sae")
    (folder / "results.json").unlink()
    return folder


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_a_truncated_shard_is_named_and_the_rest_kept(
    arguments: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished_copy(finished, tmp_path / "x")
    shard = sorted((run / "activations" / "train").glob("shard-*"))[0]
    truncate(shard)
    before = files(run)
    assert shard.name in refusal(capsys, "train", *arguments, "--out", str(run))
    assert files(run) == before


def test_a_damaged_checkpoint_falls_back_and_two_are_refused(
    arguments: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished_copy(finished, tmp_path / "x")
    newest, older = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    truncate(newest / "state.safetensors")
    other = tmp_path / "y"
    shutil.copytree(run, other)
    assert main(["train", *arguments, "--out", str(run)]) == 0
    assert_same_run(run, finished)
    truncate(other / "checkpoints" / older.name / "state.safetensors")
    before = files(other)
    capsys.readouterr()
    assert main(["train", *arguments, "--out", str(other)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("sae-apps: error:") and f"{newest.name}/state.safetensors" in last
    assert files(other) == before


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    arguments: list[str],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import errno

    out, original = tmp_path / "x", os.replace

    def full(source: str, target: str, **kwargs: object) -> None:
        if "step-" in os.fspath(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(target))
        original(source, target, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "full" in refusal(capsys, "train", *arguments, "--out", str(out))
    assert list((out / "checkpoints").iterdir()) == []
    assert main(["train", *arguments, "--out", str(out)]) == 0
    assert_same_run(out, finished)


def test_a_text_that_changed_is_not_mixed_into_a_run(
    arguments: list[str],
    finished: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = unfinished_copy(finished, tmp_path / "x")
    original = text.read_bytes()
    try:
        text.write_bytes(original + b'{"text": "one more", "domain": "a"}\n')
        message = refusal(capsys, "train", *arguments, "--out", str(run))
    finally:
        text.write_bytes(original)
    assert "data_id" in message


# ---- featurize ----


def test_features_of_the_rows(
    finished: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from sae_core.store import load_features

    features = load_features(finished / "features")
    assert features.n_rows == 100 and features.d_sae == 128 and features.acts.nnz > 100
    assert {"row_id", "text", "domain", "n_tokens"} <= set(features.rows.column_names)
    argv = ["featurize", "--run", str(finished), "--text", str(text), "--rows", "20"]
    found = run_json(capsys, *argv, "--pooling", "mean", "--out", str(tmp_path / "mean"))
    assert found["n_rows"] == 20 and "pooling mean" in found["provenance"]["data_id"]
    mean = load_features(tmp_path / "mean").acts.toarray()
    peak = features.acts.toarray()[:20]
    assert (mean <= peak + 1e-6).all() and (mean < peak - 1e-6).any()


def test_features_are_reused_or_left_alone(
    finished: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(finished)
    argv = ["featurize", "--run", str(finished), "--text", str(text)]
    assert main([*argv, "--rows", "100"]) == 0
    assert "holds these features already" in capsys.readouterr().err
    assert "first 100 rows" in refusal(capsys, *argv, "--rows", "50", "--quiet")
    assert "pooling" in refusal(capsys, *argv, "--rows", "100", "--pooling", "mean", "--quiet")
    assert files(finished) == before


def test_stored_activations_give_the_features_of_a_forward_pass(
    finished: Path, text: Path, tmp_path: Path
) -> None:
    from sae_core.store import load_features

    run = ["featurize", "--run", str(finished), "--quiet"]
    assert main([*run, "--stored", "--out", str(tmp_path / "stored")]) == 0
    assert main([*run, "--text", str(text), "--out", str(tmp_path / "fresh")]) == 0
    stored, fresh = (load_features(tmp_path / name) for name in ("stored", "fresh"))
    assert 50 < stored.n_rows < fresh.n_rows
    places = fresh.row_index(stored.row_ids)
    same = fresh.acts[places].toarray()
    # batches differ in composition, so the activations differ by rounding
    np.testing.assert_allclose(stored.acts.toarray(), same, atol=1e-4)
    assert stored.rows["text"].to_pylist() == fresh.rows["text"].take(places).to_pylist()


def test_featurize_dry_run_writes_nothing(
    finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f"
    argv = ["featurize", "--run", str(finished), "--text", str(text), "--rows", "20"]
    found = run_json(capsys, *argv, "--out", str(out), "--dry-run")
    assert found["stored_tokens"] > 100 and found["seconds"]["total"] > 0
    assert not out.exists()


def test_featurize_dry_run_refuses_a_file_that_is_not_there_and_takes_the_consent(
    finished: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["featurize", "--run", str(finished), "--text", str(text), "--rows", "20", "--dry-run"]
    assert "File not found: expected a model" in refusal(capsys, *argv, "--model", "nowhere.gguf")
    monkeypatch.setattr("sae_apps.tasks.cached.is_model_cached", lambda _: True)
    asked: list[bool] = []

    def consent(*_: object, accept_terms: bool = False) -> None:
        asked.append(accept_terms)
        raise UserError("asked")

    monkeypatch.setattr("sae_apps.tasks.settings.open_model", consent)
    refusal(capsys, *argv, "--model", "gemma-3-270m", "--accept-terms")
    assert asked == [True]


def test_featurize_refuses(
    finished: Path,
    text: Path,
    stories260k: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    def bad(*flags: str) -> str:
        base = ("featurize", "--text", str(text), "--quiet", "--out", str(tmp_path / "f"))
        message = refusal(capsys, *base, *flags)
        assert not (tmp_path / "f").exists()
        return message

    assert "--run" in bad()
    assert "run.json" in bad("--run", str(tmp_path))
    run = ["--run", str(finished)]
    assert "400" in bad(*run, "--rows", "400") and "--rows" in bad(*run, "--rows", "x")
    assert "pooling" in bad(*run, "--pooling", "median")
    assert "column" in bad(*run, "--column", "body")
    assert "finished" in bad("--run", str(unfinished_copy(finished, tmp_path / "u")))
    config = AutoConfig.from_pretrained(stories260k)
    config.hidden_size, config.intermediate_size, config.head_dim = 32, 64, 8
    narrow = tmp_path / "narrow"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(narrow)
    for file in stories260k.glob("tokenizer*"):
        shutil.copy(file, narrow)
    message = bad(*run, "--model", str(narrow))
    assert "64" in message and "32" in message and "d_in" in message


def test_a_damaged_sae_is_named(
    finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "x")
    truncate(tmp_path / "x" / "sae" / "sae.safetensors")
    argv = ["--run", str(tmp_path / "x"), "--text", str(text), "--quiet"]
    assert "sae.safetensors" in refusal(capsys, "featurize", *argv)


# ---- inspect ----


def test_inspect_shows_latents_with_their_texts(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, "inspect", "--run", str(finished), "--top", "4", "--texts", "2")
    assert len(found["latents"]) == 4
    for card in found["latents"]:
        assert card["texts"] and 0 <= card["freq"] <= 1 and 0 < card["freq_rows"] <= 1
        assert 0 < card["taf"] <= 0.2 and card["max_act"] > 0
        for shown in card["texts"]:
            assert len(shown["tokens"]) == len(shown["acts"]) and max(shown["acts"]) > 0
    latent = found["latents"][0]["latent"]
    capsys.readouterr()
    assert main(["inspect", "--run", str(finished), "--latent", f"{latent},0"]) == 0
    text = capsys.readouterr().out
    assert f"latent {latent}: fires on" in text and "latent 0: fires on" in text
    assert "[[" in text and "\033" not in text and "domain=" in text


def test_inspect_orders(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sae_core.store import load_features

    freq = load_features(finished / "features").freq
    argv = ["inspect", "--run", str(finished), "--top", "3", "--texts", "1"]
    frequent = run_json(capsys, *argv, "--order", "frequent")["latents"]
    assert [c["freq_rows"] for c in frequent] == sorted(freq)[::-1][:3]
    strong = run_json(capsys, *argv, "--order", "strong")["latents"]
    assert strong[0]["max_act"] >= max(c["max_act"] for c in [*strong, *frequent]) - 1e-6


def test_inspect_a_row(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "inspect", "--run", str(finished), "--row", "7", "--top", "5")
    acts = [entry["act"] for entry in found["latents"]]
    assert found["row"]["row_id"] == 7 and len(acts) == 5 and acts == sorted(acts)[::-1]
    assert main(["inspect", "--run", str(finished), "--row", "7"]) == 0
    assert capsys.readouterr().out.startswith("row 7: ")


def test_inspect_refuses(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["inspect", "--run", str(finished)]
    assert "127" in refusal(capsys, *run, "--latent", "128")
    assert "'a'" in refusal(capsys, *run, "--latent", "a")
    assert "row" in refusal(capsys, *run, "--row", "100000")
    assert "featurize" in refusal(capsys, *run, "--features", str(tmp_path / "none"))
    assert "top" in refusal(capsys, *run, "--top", "0")


def test_highlight_in_colour_and_in_brackets() -> None:
    tokens, acts = ["A", " big", "\n", " \x1b[2Jdog"], [0.0, 1.0, 0.05, 0.3]
    bare = inspect_task.highlight(tokens, acts, 1.0, in_colour=False)
    assert bare == "A [[big]]\u21b5 [[\ufffd[2Jdog]]"  # no escape sequence of the text survives
    colour = inspect_task.highlight(tokens, acts, 1.0, in_colour=True)
    strong, weak = inspect_task.BRIGHT_MARK, inspect_task.DIM_MARK
    assert f"{strong} big\033[0m" in colour and f"{weak} \ufffd[2Jdog\033[0m" in colour


# ---- doctor ----


def test_doctor_reports_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAE_APPS_CACHE", str(tmp_path / "cache"))
    found = run_json(capsys, "doctor")
    assert not (tmp_path / "cache").exists()
    assert found["cache"] == {"folder": str(tmp_path / "cache"), "entries": []}
    assert found["packages"]["torch"]["version"] and found["torch"]["threads"] >= 1
    assert found["extras"]["cpu"]["install"] == 'pip install "sae-apps[cpu]"'
    assert found["disk"]["cache"]["free_bytes"] > 0 and found["ok"] == (not found["problems"])
    (tmp_path / "cache" / "models" / "m").mkdir(parents=True)
    (tmp_path / "cache" / "models" / "m" / "w").write_bytes(b"x" * 2048)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "models/m" in text and "2.0 KiB" in text and "torch" in text


def test_settings_need_no_argument() -> None:
    from sae_apps.tasks.settings import TrainSettings

    assert TrainSettings().sae_config(64).d_sae == 512


# ---- activations of another run ----


def test_a_run_on_the_activations_of_another_is_the_run_that_harvests(
    arguments: list[str], finished: Path, tmp_path: Path
) -> None:
    used, own = tmp_path / "used", tmp_path / "own"
    before = files(finished)
    other = ["--seed", "3", "--activations", str(finished)]
    assert main(["train", *arguments, *other, "--out", str(used)]) == 0
    assert files(finished) == before and not (used / "activations").exists()
    split = ["--seed", "3", "--text.split_seed", "0"]
    assert main(["train", *arguments, *split, "--out", str(own)]) == 0
    assert_same_run(used, own)
    assert weights(used) != weights(finished)
    assert (used / "run.json").read_bytes() == (own / "run.json").read_bytes()
    assert main(["identify", str(finished), str(used), "--dry-run", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--tokens", "9k"], "max_tokens"),
        (["--text.split_seed", "1"], "data_id"),
        (["--hook", "layers.1.out"], "hook_points"),
    ],
)
def test_activations_of_another_harvest_are_refused(
    arguments: list[str],
    finished: Path,
    tmp_path: Path,
    changed: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["train", *arguments, *changed, "--activations", str(finished)]
    assert said in refusal(capsys, *argv, "--out", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_activations_need_a_finished_run(
    arguments: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", *arguments, "--out", str(tmp_path / "x"), "--activations"]
    assert "got no folder" in refusal(capsys, *argv, str(tmp_path / "nothing"))
    bare = shutil.copytree(finished, tmp_path / "bare")
    shutil.rmtree(bare / "activations")
    assert "without the folder activations" in refusal(capsys, *argv, str(bare))
    changed = shutil.copytree(finished, tmp_path / "changed")
    shard = next((changed / "activations" / "train").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert str(shard) in refusal(capsys, *argv, str(changed))
