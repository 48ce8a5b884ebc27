"""``sae-apps identify`` through ``main([...])``: table, files, what inspect shows, refusals."""

import errno
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_apps.tasks.main import main
from sae_core.sae import load_sae, save_sae


@pytest.fixture(scope="module")
def text(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "problems.jsonl"
    with gzip.open(shared_data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.dumps({"text": json.loads(next(lines))["question"]}) for _ in range(120)]
    file.write_text("\n".join(rows) + "\n")
    return file


@pytest.fixture(scope="module")
def trained(stories260k: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs 0, 1, 2 with three SAEs and one of another hook point; tests copy what they change."""
    folder = tmp_path_factory.mktemp("runs")
    for name, extra in (
        ("0", ["--seed", "0"]),
        ("1", ["--seed", "1"]),
        ("other", ["--hook", "layers.1.out"]),
    ):
        argv = ["train", "--model", str(stories260k), "--text", str(text), "--tokens", "2k"]
        argv += ["--d-sae", "128", "--k", "8", "--batch-size", "256", "--context-size", "64"]
        argv += ["--eval-tokens", "1k", "--loss-tokens", "100", "--quiet"]
        assert main([*argv, *extra, "--out", str(folder / name)]) == 0
    shutil.copytree(folder / "1", folder / "2")  # a third dictionary without a third training
    sae, extra = load_sae(folder / "2" / "sae")
    with torch.no_grad():
        noise = torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(2))
        sae.W_dec.add_(0.2 * noise)
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    save_sae(folder / "2" / "sae", sae, extra, overwrite=True)
    assert main(["featurize", "--run", str(folder / "0"), "--text", str(text), "--rows", "20"]) == 0
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> list[str]:
    shutil.copytree(trained, tmp_path / "runs")
    return [str(tmp_path / "runs" / name) for name in ("0", "1", "2")]


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence of a command that refuses its input."""
    capsys.readouterr()
    assert main(["identify", *argv]) == 2
    seen = capsys.readouterr()
    lines = seen.err.splitlines()
    assert len(lines) == 1 and seen.out == "", seen
    return lines[0]


def inspected(capsys: pytest.CaptureFixture[str], run: str, *argv: str) -> str:
    capsys.readouterr()
    command = ["inspect", "--run", run, "--latent", "0,1,2,3", "--texts", "1", "--quiet"]
    assert main([*command, *argv]) == 0
    return capsys.readouterr().out


def test_one_run(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "from one run" not in inspected(capsys, runs[0])
    assert main(["identify", runs[0], "--quiet"]) == 0
    shown = capsys.readouterr().out
    for name in ("H1", "H2", "H3", "V1", "target frequency", "width"):
        assert f"\n{name}" in shown
    assert "one run only" in shown and "reliable latents" in shown
    kept = json.loads((Path(runs[0]) / "identify.json").read_text())
    assert kept["mean_consistency"] is None and sum(kept["flags"].values()) == 128
    assert "consistency" not in load_file(Path(runs[0]) / "identify.safetensors")
    assert "from one run, " in inspected(capsys, runs[0])


def test_several_runs_are_kept_with_the_sae_and_shown(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before, _ = load_sae(Path(runs[0]) / "sae")
    capsys.readouterr()
    assert main(["identify", *runs, "--tokens", "600", "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((Path(runs[0]) / "identify.json").read_text())
    assert report["n_tokens"] == 600 and report["runs"] == runs and len(report["conditions"]) == 6
    after, extra = load_sae(Path(runs[0]) / "sae")
    assert before.hash() == after.hash() == report["sae_hash"]
    arrays = load_file(Path(runs[0]) / "identify.safetensors")
    kept = extra["identify"]
    assert kept["n_runs"] == 3
    assert kept["consistency"] == pytest.approx(arrays["consistency"].tolist())
    # its mean over the two other runs, from the dictionaries themselves
    w, *others = (load_sae(Path(run) / "sae")[0].W_dec.detach() for run in runs)
    alive = [[f > 0 for f in load_sae(Path(run) / "sae")[1]["freq"]] for run in runs[1:]]
    found = [(w @ o[a].T).max(1).values for o, a in zip(others, alive, strict=True)]
    expected = torch.stack(found).mean(0)
    live = [j for j, f in enumerate(extra["freq"]) if f > 0]
    assert arrays["consistency"][live].tolist() == pytest.approx(expected[live].tolist(), abs=1e-5)
    assert f"consistency {kept['consistency'][3]:.2f} over 3 runs, " in inspected(capsys, runs[0])
    cards = json.loads(inspected(capsys, runs[0], "--json"))["latents"]
    assert cards[2]["verdict"]["consistency"] == kept["consistency"][2]
    assert {card["verdict"]["flag"] for card in cards} <= {"reliable", "doubtful", "unreliable"}
    assert not (Path(runs[1]) / "identify.json").exists()  # only the first run's folder is written
    assert "identify" not in load_sae(Path(runs[1]) / "sae")[1]


def test_same_input_same_result_and_other_tokens_another(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(*argv: str) -> list[float]:
        assert main(["identify", *runs[:2], *argv, "--quiet"]) == 0
        return load_file(Path(runs[0]) / "identify.safetensors")["score"].tolist()

    assert scores() == scores() != scores("--tokens", "500")
    assert scores("--part", "train") != scores()


def test_dry_run_writes_nothing(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["identify", *runs, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_runs"] == 3 and found["n_tokens"] <= 1000 and found["memory_bytes"] > 0
    assert not list(Path(runs[0]).glob("identify*"))


def test_refuses(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(Path(runs[0]).with_name("other"))
    message = refusal(capsys, runs[0], other)
    assert "one hook point" in message and "layers.2.out" in message and "layers.1.out" in message
    assert "at least one run, got none" in refusal(capsys)
    assert "no folder" in refusal(capsys, runs[0], str(tmp_path / "nothing"))
    assert "different seeds" in refusal(capsys, runs[0], runs[1], runs[0])
    assert "--tokens must be a count" in refusal(capsys, runs[0], "--tokens", "none")
    assert "--token" in refusal(capsys, runs[0], "--tokns", "3")
    (Path(runs[1]) / "results.json").unlink()
    assert "finished run" in refusal(capsys, *runs)
    shutil.rmtree(Path(runs[0]) / "activations")
    assert "stored activations" in refusal(capsys, runs[0])
    assert not list(Path(runs[0]).glob("identify*"))


def test_nothing_half_written_on_a_full_disk(
    runs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", runs[0])

    monkeypatch.setattr("sae_core.sae.save_sae", full)
    assert "disk is full" in refusal(capsys, runs[0], "--quiet").lower()
    left = {path.name for path in Path(runs[0]).glob("*identify*")}
    assert left <= {"identify.safetensors"}  # whole; identify.json, written last, is absent
    load_file(Path(runs[0]) / "identify.safetensors")
    assert "identify" not in load_sae(Path(runs[0]) / "sae")[1]
