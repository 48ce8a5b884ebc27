"""``sae-apps separability`` through main([...]): what is written, repeated, refused."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sae_apps.tasks.main import main
from sae_core.store import verify_folder
from tests.command import refusal, run_json, train_small

NAMES, PLACES = ("Tom", "Mia", "Ben", "Lily", "Sam"), ("park", "house", "garden", "wood")


@pytest.fixture(scope="module")
def data(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run, and texts of sad and happy things; the same texts with labels that mean nothing."""
    folder = tmp_path_factory.mktemp("separability")
    real, void = [], []
    for i in range(60):
        name, place = NAMES[i % 5], PLACES[i % 4]
        for k, end in enumerate(("was sad and cried and cried.", "was happy and laughed.")):
            text = f"One day {name} went to the {place}. {name} {end}"
            real.append({"text": text, "label": ("sad", "happy")[k], "story": 2 * i + k})
            void.append({"text": text, "label": ("one", "two")[(i // 3 + k) % 2]})
    paths = {}
    for kind, rows in (("real", real), ("void", void)):
        file = folder / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths[kind] = str(file)
    return paths | {"run": train_small(stories260k, paths["real"], folder / "run")}


def arguments(data: dict[str, str], out: object, which: str = "real", *more: str) -> list[str]:
    argv = ["separability", "--run", data["run"], "--data", data[which], "--out", str(out)]
    return [*argv, "--units", "latents,residual", "--quiet", *more]


def test_real_labels_separate_and_void_ones_do_not(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    summary = run_json(capsys, *arguments(data, out))
    void = run_json(capsys, *arguments(data, tmp_path / "void", "void"))
    assert set(verify_folder(out)["files"]) == {
        "latents.parquet", "residual.parquet", "summary.json"
    }  # fmt: skip
    for kind, n in (("latents", 128), ("residual", 64)):
        real, none = summary["units"][kind], void["units"][kind]
        assert len(pq.read_table(out / f"{kind}.parquet")) == real["units"] == n
        assert real["passing"] > 5 and none["passing"] <= real["live"] // 20
        assert real["debiased_live"] > 3 * none["debiased_live"]
        assert {row["concept"] for row in real["leading"]} <= {"sad", "happy"}
    assert summary["texts"] == {"happy": 60, "sad": 60}
    stamp = (out / "summary.json").stat().st_mtime_ns
    assert run_json(capsys, *arguments(data, out)) == summary  # nothing to do
    assert (out / "summary.json").stat().st_mtime_ns == stamp


def test_a_dry_run_writes_nothing(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(data, tmp_path / "out"), "--dry-run"]) == 0
    assert "4 passes" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_dry_run_downloads_nothing(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*arguments(data, tmp_path / "out"), "--dry-run", "--model", "owner/nowhere"]
    assert main(argv) == 0
    assert "not estimated: the model owner/nowhere is not on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--units", "latent"], "Expected --units out of latents, residual, neurons"),
        (["--label", "mood"], "expected the column 'mood', got text, label, story"),
        (["--concepts", "sad"], "two"),
        (["--data", "nowhere.csv"], "Expected a file of labelled texts at nowhere.csv"),
        (["--permutations", "1"], "at least 2 --permutations"),
        (["--model", "nowhere.gguf", "--dry-run"], "File not found: expected a model folder"),
    ],
)
def test_bad_input_is_one_sentence(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: list[str], message: str,
) -> None:  # fmt: skip
    assert message in refusal(capsys, *arguments(data, tmp_path / "out"), *more)
    assert not (tmp_path / "out").exists()
