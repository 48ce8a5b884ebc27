"""`sae-apps train` under torchrun: the run of one process; a killed process costs nothing."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from sae_apps.tasks import main as command
from sae_apps.tasks import processes, train
from sae_apps.tasks.common import Interrupted, StopSignal
from sae_apps.tasks.fit import _heard, start_or_resume
from sae_apps.tasks.inputs import open_inputs, provenance
from sae_apps.tasks.main import main
from sae_apps.tasks.runs import RunFolder, read_metrics
from sae_apps.tasks.train import parse, training_config
from sae_core.errors import UserError
from sae_core.parallel import ALONE, Axis, Layout
from sae_core.shards import ShardedActivations

RUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMAND = ["-m", "sae_apps.tasks.main"]
WAIT_S = 120
RTOL = 5e-3  # float32 sums in another order, over 20 steps of Adam


@pytest.fixture(scope="module")
def flags(shared_data: Path, stories260k: Path, tmp_path_factory: pytest.TempPathFactory):
    """A small training, without --out."""
    text = tmp_path_factory.mktemp("torchrun") / "text.jsonl"
    with gzip.open(shared_data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        text.write_text("".join(line for line, _ in zip(lines, range(60), strict=False)))
    argv = ["train", "--model", str(stories260k), "--text", str(text), "--column", "question"]
    argv += ["--tokens", "2560", "--epochs", "2", "--d-sae", "128", "--k", "8", "--quiet"]
    argv += ["--batch-size", "256", "--context-size", "64", "--eval-tokens", "300"]
    argv += ["--train.gba.calibrate_tokens", "1000", "--train.log_every", "2"]
    argv += ["--loss-tokens", "50", "--text.held_out_frac", "0.3", "--checkpoint-every", "4"]
    return argv


@pytest.fixture(scope="module")
def alone(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main([*flags, "--out", str(out)]) == 0
    return out


def launched(arguments: list[str], *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*RUN, *options, *COMMAND, *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def same_run(out: Path, alone: Path) -> None:
    for part in ("train", "held_out"):
        ours, theirs = (
            ShardedActivations.open(run / "activations" / part, "layers.2.out")
            for run in (out, alone)
        )
        assert len(ours.manifest["shards"]) == len(theirs.manifest["shards"])
        for one, other in zip(ours.iter_sequential(500), theirs.iter_sequential(500), strict=True):
            assert torch.equal(one.row_id, other.row_id)
            assert torch.equal(one.position, other.position)
            torch.testing.assert_close(one.x, other.x, rtol=1e-4, atol=1e-5)
    found, expected = (json.loads((run / "results.json").read_text()) for run in (out, alone))
    for name in ("fvu", "l0", "steps", "n_tokens", "n_stored_tokens", "n_eval_tokens"):
        assert found[name] == pytest.approx(expected[name], rel=RTOL), name
    ours, theirs = read_metrics(out / "metrics.jsonl"), read_metrics(alone / "metrics.jsonl")
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == list(range(2, 21, 2))
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=RTOL)


@pytest.mark.parametrize("parts", ["1", "2"])
def test_two_processes_make_the_run_of_one(flags, alone, tmp_path, parts) -> None:
    out = tmp_path / "run"
    process = launched([*flags, "--out", str(out), "--latent-parts", parts, "--json"])
    told, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, error
    assert json.loads(told)["steps"] == 20  # one process prints
    same_run(out, alone)
    assert main([*flags, "--out", str(out)]) == 0  # one process finds the same run, finished


def workers(parent: int) -> dict[int, int]:
    """The processes below torchrun by their rank, as far as they are there."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found = {}
    for child in children:
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {rank: int(child) for rank in (0, 1) if b"RANK=%d" % rank in environment}
    return found


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@NEEDS_PROC
@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_signals_save_the_step_whoever_sends_how_many(flags, tmp_path, ranks) -> None:
    out = tmp_path / "run"
    process = launched(
        [*flags, "--epochs", "4000", "--checkpoint-every", "9999999", "--out", str(out)]
    )
    end = time.monotonic() + WAIT_S
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    found = workers(process.pid)
    for signum in (signal.SIGTERM, signal.SIGINT):
        for rank in ranks:
            os.kill(found[rank], signum)
    _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode != 0
    (saved,) = (out / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) == read_metrics(out / "metrics.jsonl")[-1]["step"]


@NEEDS_PROC
def test_a_killed_process_is_replaced_and_nothing_is_lost(flags, alone, tmp_path) -> None:
    out = tmp_path / "run"
    process = launched([*flags, "--out", str(out)], "--max-restarts", "1")
    killed, end = None, time.monotonic() + WAIT_S
    while killed is None and process.poll() is None and time.monotonic() < end:
        if (out / "metrics.jsonl").exists() and (killed := workers(process.pid).get(1)) is not None:
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.002)
    _, error = process.communicate(timeout=WAIT_S)
    assert killed is not None and process.returncode == 0, error
    same_run(out, alone)


def test_a_damaged_checkpoint_is_told_once_and_an_older_one_goes_on(flags, alone, tmp_path) -> None:
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    (out / "results.json").unlink()
    newest = max((out / "checkpoints").glob("step-*")) / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    loud = [one for one in flags if one != "--quiet"]
    process = launched([*loud, "--out", str(out)])
    _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, error
    assert error.count("Using an older checkpoint") == 1
    same_run(out, alone)


def test_bad_input_is_told_once(flags, tmp_path) -> None:
    for arguments, sentence in (
        ([*flags, "--batch-size", "257"], "that 2 processes can share equally, got 257"),
        ([*flags, "--latent-parts", "3"], "divides the 2 processes, got 3"),
        # before hours of harvest, and not by each process
        (
            [*flags, "--latent-parts", "2", "--kind", "topk", "--k", "100"],
            "each of 2 parts, got 64",
        ),
        ([*flags, "--device", "cuda:7"], "gives each of 2 processes a card of its own, got cuda:7"),
    ):
        process = launched([*arguments, "--out", str(tmp_path / "run")])
        told, error = process.communicate(timeout=WAIT_S)
        assert process.returncode != 0 and told == ""
        assert error.count(sentence) == 1 and "exitcode  : 2" in error
        assert not (tmp_path / "run").exists()


def test_a_dry_run_states_the_memory_of_a_process(flags) -> None:
    process = launched([*flags, "--latent-parts", "2", "--dry-run"])
    told, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, error
    (line,) = [line for line in told.splitlines() if line.startswith("memory")]
    assert "in the first of 2 processes" in line and line.endswith("in each other")


def test_one_process_is_the_first_whatever_its_rank(flags, alone, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")  # of a launcher that started something else
    assert main([*flags, "--out", str(alone), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 20


def test_processes_that_nobody_joins_are_refused(flags, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "leave", lambda code: code)  # which ends the process
    monkeypatch.setenv("WORLD_SIZE", "2")  # and nothing that says where the other is
    assert main([*flags, "--out", str(tmp_path / "run")]) == 2
    assert "beside WORLD_SIZE=2, as torchrun sets them, got none of" in capsys.readouterr().err


def test_one_that_has_gone_ends_the_first_without_a_traceback(monkeypatch) -> None:
    def gone(_value: object) -> None:
        raise RuntimeError("gloo: Connection closed by peer [127.0.0.1]")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name, call in (("_store", object), ("_meet", lambda *_: None), ("_broadcast", gone)):
        monkeypatch.setattr(processes, name, call)
    with pytest.raises(SystemExit) as end, processes.joined("cpu") as team:
        team.tell("a word", more=True)
    assert end.value.code == 1
    with pytest.raises(UserError, match="its own"), processes.joined("cpu"):
        raise UserError("its own")


class Elsewhere(Layout):
    """A process that shares a training with one that has not found the checkpoint."""

    def smallest(self, x: torch.Tensor, *axes: Axis) -> torch.Tensor:
        return x.zero_()


def test_a_signal_during_the_exchange_is_heard_the_next_time() -> None:
    stop = StopSignal()

    class Slow(Layout):
        def largest(self, x: torch.Tensor, *axes: Axis) -> torch.Tensor:
            if stop.signum is None:
                stop.receive(signal.SIGTERM)
            return x

    with stop.deferred(patient=True):
        assert _heard(stop, Slow()) is False
        assert stop.signum == signal.SIGTERM
        assert _heard(stop, Slow()) is True
    with pytest.raises(Interrupted):
        stop.check()


def test_another_checkpoint_elsewhere_is_refused(flags, alone) -> None:
    settings, _ = parse([*flags[1:], "--out", str(alone)])
    config = training_config(settings, 2560)
    with pytest.raises(UserError, match="got those of step 0 to 20: .* a disk that all of them"):
        start_or_resume(settings, config, RunFolder(alone), 64, Elsewhere())
    assert start_or_resume(settings, config, RunFolder(alone), 64, ALONE)[1].step == 20


def test_another_text_elsewhere_is_refused(flags, monkeypatch) -> None:
    settings, _ = parse(flags[1:])
    first = provenance(settings, open_inputs(settings)) | {"data_id": "another"}

    class Told(processes.Team):
        def hear(self) -> object:
            return settings, first

    monkeypatch.setattr(train, "joined", lambda _device: nullcontext(Told()))
    with pytest.raises(UserError, match="of the first process in every one: data_id is 'another'"):
        train.follow(flags[1:])


def test_other_commands_run_in_one_process(monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "leave", lambda code: code)  # which ends the process
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 2
    assert "command train in 2 processes, got doctor" in capsys.readouterr().err


def test_one_process_refuses_latent_parts(flags, tmp_path, capsys) -> None:
    assert main([*flags, "--latent-parts", "2", "--out", str(tmp_path / "run")]) == 2
    assert "divides the 1 processes, got 2" in capsys.readouterr().err
    assert main([*flags, "--latent-parts", "0", "--out", str(tmp_path / "run")]) == 2
    assert "latent_parts must be at least 1, got 0" in capsys.readouterr().err
