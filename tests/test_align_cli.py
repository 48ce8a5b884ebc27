"""``sae-apps align`` through its main: what is written, what it finds, what it refuses."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae_apps.alignment import relational_alignment
from sae_apps.tasks.align_run import item_codes
from sae_apps.tasks.main import main
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.models import load_model
from sae_core.sae import SAE, SAEConfig, load_sae
from sae_core.text import rows_from_texts
from tests.command import refusal, run_json, train_small

ANIMALS = ("dog", "cat", "bird", "fish", "mouse", "bear", "frog", "duck")
NAMES = ("Lily", "Tom", "Sam", "Ben", "Mia", "Sue", "Tim", "Anna")


@pytest.fixture(scope="module")
def data(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run, and animals in the west, names in the east."""
    folder = tmp_path_factory.mktemp("align")
    rng = np.random.default_rng(0)
    rows = []
    for side, words in ((0, ANIMALS), (100, NAMES)):
        for word in words:
            lat, lon = rng.uniform(-5, 5), side + rng.uniform(-5, 5)
            rows.append({"text": word, "lat": lat, "lon": lon, "side": f"side {side}"})
    items, texts = folder / "items.jsonl", folder / "text.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stories = [
        f"One day {a} saw a {b} in the {c}. The {b} was big."
        for a in NAMES for b in ANIMALS for c in ("park", "wood", "house", "garden")
    ]  # fmt: skip
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    return {"run": train_small(stories260k, texts, folder / "run"), "items": str(items)}


def arguments(data: dict[str, str], out: object, *more: str) -> list[str]:
    argv = ["align", "--run", data["run"], "--items", data["items"], "--out", str(out)]
    return [*argv, "--template", "There was {}", "--permutations", "199", "--n-boot", "50",
            "--quiet", *more]  # fmt: skip


def test_it_compares_and_writes(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], stories260k: Path
) -> None:
    out = tmp_path / "out"
    summary = run_json(capsys, *arguments(data, out))
    assert summary["p"] <= 0.05 and summary["rho"] > 0.1  # two kinds of words, two sides
    within = run_json(capsys, *arguments(data, tmp_path / "within", "--strata", "side"))
    assert within["rho"] == summary["rho"] and within["p"] > summary["p"]
    assert within["how"]["is_stratified"]
    rows = pq.read_table(out / "items.parquet").to_pylist()
    assert [row["text"] for row in rows] == [*ANIMALS, *NAMES]
    assert sum(row["has_code"] for row in rows) == summary["n_items"]
    assert all((row["rho"] is None) != row["has_code"] for row in rows)
    # the function gives the same
    records = [json.loads(line) for line in Path(data["items"]).read_text().splitlines()]
    lm, sae = load_model(str(stories260k)), load_sae(Path(data["run"]) / "sae")[0]
    hook = summary["hook_point"]
    texts = [f"There was {row['text']}" for row in records]
    units, codes = item_codes(lm, hook, texts, {"x": sae})
    from sae_apps.alignment import great_circle

    km = great_circle(*(np.array([row[name] for row in records]) for name in ("lat", "lon")))
    found = relational_alignment(
        codes["x"], km, distances=True, permutations=9, n_boot=0, baseline=units - units.mean(0)
    )
    assert found.rho == pytest.approx(summary["rho"])
    assert found.baseline_rho == pytest.approx(summary["baseline_rho"], abs=1e-3)
    stamp = (out / "summary.json").stat().st_mtime_ns
    assert run_json(capsys, *arguments(data, out)) == summary  # nothing to do
    assert (out / "summary.json").stat().st_mtime_ns == stamp
    said = refusal(capsys, *arguments(data, out, "--strata", "side"))
    assert "strata is None there and 'side' here" in said


def test_pooling_takes_the_last_token_or_all(stories260k: Path) -> None:
    lm = load_model(str(stories260k))
    texts = ["Tom had a dog", "Mia", "One day Ben went to the park and saw a bird"]
    last, _ = item_codes(lm, "layers.2.out", texts, {}, "last")
    mean, _ = item_codes(lm, "layers.2.out", texts, {}, "mean")
    alone, _ = item_codes(lm, "layers.2.out", texts[2:], {}, "last")
    assert np.allclose(alone[0], last[2], atol=1e-4)
    assert not np.allclose(mean[2], last[2], atol=0.1)


def test_the_last_token_of_a_text_in_pieces_is_one_token(stories260k: Path) -> None:
    """Pieces are read by falling length, so that those of two long texts come in turns."""
    lm, hook = load_model(str(stories260k)), "layers.2.out"
    long = [" ".join(f"{word} ran" for _ in range(n)) for word, n in (("Tom", 170), ("Mia", 150))]
    sae = SAE(SAEConfig(lm.d_model, 32, "relu")).eval()
    units, codes = item_codes(lm, hook, [long[0], "Ben sat.", long[1]], {"x": sae}, "last")
    for i, text in ((0, long[0]), (2, long[1])):
        alone = [
            (int(batch.position[-1]), batch.x[-1].numpy())
            for found in stream_activations(
                lm, rows_from_texts([text]), [hook], HarvestConfig(context_size=256)
            )
            for batch in found.values()
        ]
        assert len(lm.tokenizer(text)["input_ids"]) > 2 * 256
        expected = max(alone, key=lambda one: one[0])[1]
        np.testing.assert_allclose(units[i], expected, atol=1e-4)
        code = sae.encode(torch.from_numpy(expected)[None])[0]
        np.testing.assert_allclose(codes["x"][[i]].toarray()[0], code, atol=1e-4)


def test_an_embedding_in_a_file(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "space.npy"
    np.save(file, np.eye(2)[[0] * 8 + [1] * 8] + 0.1 * np.random.default_rng(0).random((16, 2)))
    found = run_json(capsys, *arguments(data, tmp_path / "a", "--against", str(file)))
    same = run_json(
        capsys, *arguments(data, tmp_path / "b", "--against", "lat,lon", "--metric", "euclidean")
    )
    assert found["p"] <= 0.05 and found["rho"] != same["rho"]
    np.save(file, np.eye(3))
    said = refusal(capsys, *arguments(data, tmp_path / "c", "--against", str(file)))
    assert "shape [16, q]" in said and "[3, 3]" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--items", "nowhere.csv"], "Expected a file of items at nowhere.csv"),
        (["--model", "nowhere.gguf", "--dry-run"], "File not found: expected a model folder"),
        (["--text", "word"], "expected the column 'word', got text, lat, lon, side"),
        (["--against", "side"], "expected a number in 'side', got 'side 0'"),
        (["--against", "gone.npy"], "Expected a .npy file at gone.npy"),
        (["--strata", "kind"], "expected the column 'kind'"),
        (["--template", "no place"], "Expected one {} in --template"),
        (["--permutations", "0"], "at least 1 permutation"),
    ],
)
def test_bad_input_is_one_sentence(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: list[str], message: str,
) -> None:  # fmt: skip
    assert message in refusal(capsys, *arguments(data, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_braces_of_a_template_are_text(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(data, tmp_path / "out", "--template", "{name} met {}")
    assert run_json(capsys, *argv)["n_items"] > 0


def test_a_dry_run_writes_nothing(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(data, tmp_path / "out", "--dry-run")) == 0
    assert "120 pairs" in capsys.readouterr().out and not (tmp_path / "out").exists()
