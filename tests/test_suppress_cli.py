"""``sae-apps suppress`` through its main: what is written, continued, refused."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sae_apps.suppression.app import load_app
from sae_apps.suppression.generations import COVER
from sae_apps.tasks.main import main as sae_apps
from sae_apps.tasks.suppress import main

NAMES, PLACES = ["Tom", "Mia", "Ben", "Lily", "Sam"], ["park", "house", "garden", "wood"]


@pytest.fixture(scope="module")
def data(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run, and dogs against cars in pairs."""
    folder = tmp_path_factory.mktemp("suppress")
    rows = []
    for i in range(40):
        name, place = NAMES[i % 5], PLACES[i % 4]
        for label, thing in (("dog", "happy dog"), ("car", "red car")):
            text = f"One day {name} saw a {thing} in the {place}. The {thing} was big."
            rows.append({"text": text, "label": label, "pair": i})
    labelled, prompts = folder / "labelled.jsonl", folder / "prompts.txt"
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_text("Tom saw a dog\nMia had a\n")
    argv = ["train", "--model", str(stories260k), "--text", str(labelled), "--tokens", "1k"]
    argv += ["--d-sae", "128", "--k", "8", "--batch-size", "128", "--context-size", "64"]
    argv += ["--eval-tokens", "100", "--loss-tokens", "50", "--quiet"]
    assert sae_apps([*argv, "--out", str(folder / "run")]) == 0
    return {"run": str(folder / "run"), "data": str(labelled), "prompts": str(prompts)}


def arguments(data: dict[str, str], out: Path, *more: str) -> list[str]:
    argv = ["--run", data["run"], "--data", data["data"], "--group", "pair", "--out", str(out)]
    return [*argv, "--units", "residual", "--n-units", "8", "--quiet", *more]


def test_it_fits_measures_and_continues(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ["--concept", "dog", "--evaluate", "--strengths", "0,1,2", "--n-draws", "20"]
    more += ["--prompts", data["prompts"], "--new-tokens", "5", "--strength", "3", "--json"]
    assert main(arguments(data, out, *more)) == 0
    summary = json.loads(capsys.readouterr().out)
    app = load_app(out / "app")
    assert app.concepts == ("dog",) and summary["units"] == app.units.n_units > 0
    curves = pq.read_table(out / "curves.parquet").to_pylist()
    methods = {row["method"] for row in curves}
    assert {"app", "mask", "range", "aura", "direction", "random", "instruction"} <= methods
    assert {"app_direction", "residual_direction"} <= methods
    assert all(row["erased_fixed"] == 0 for row in curves if row["strength"] == 0)
    assert len(pq.read_table(out / "matched.parquet")) == 2 * len(methods)
    lines = (out / "generations.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["Tom saw a dog", "Mia had a"]
    page = (out / "report.html").read_text()
    assert "Suppressing dog" in page and "app_direction" in page and 'class="line s3"' in page
    assert "are covered" in page and COVER in page
    shown = tmp_path / "shown"
    assert main([*arguments(data, shown, *more), "--show-texts", "true"]) == 0
    assert "Texts are shown as they are" in (shown / "report.html").read_text()
    capsys.readouterr()
    written = (out / "summary.json").stat().st_mtime_ns
    assert main(arguments(data, out, *more)) == 0  # nothing to do
    assert json.loads(capsys.readouterr().out) == summary
    assert (out / "summary.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "Expected a concept out of car, dog, got none"),
        (["--concept", "cat"], "Expected one of the concepts car, dog, got 'cat'"),
        (["--concept", "dog", "--n-units", "0"], "at least 1, got 0"),
        (["--concept", "dog", "--strength", "-1"], "at least 0, got -1"),
        (["--concept", "dog", "--strengths", "0,x"], "joined by commas, got '0,x'"),
        (["--concept", "dog", "--label", "kind"], "expected the column 'kind'"),
    ],
)
def test_bad_input_is_one_sentence(
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert main(arguments(data, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_concept_that_is_no_name_of_a_folder_needs_one(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text(Path(data["data"]).read_text().replace('"dog"', '"../dog"'))
    argv = ["--run", data["run"], "--data", str(labelled), "--concept", "../dog", "--dry-run"]
    assert main(argv) == 2
    assert "no name of a folder, got '../dog'" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0


def test_a_dry_run_writes_nothing(data: dict[str, str], tmp_path: Path) -> None:
    argv = arguments(data, tmp_path / "out", "--concept", "dog", "--dry-run")
    assert main(argv) == 0
    assert main([*argv, "--model", "nowhere.gguf"]) == 2  # though no model is read for an estimate
    assert not (tmp_path / "out").exists()
