"""``sae-apps monet`` through its main: what is written, what it finds, what it refuses."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae_apps.tasks.main import main
from sae_core.models import load_model
from sae_core.monet.masks import ExpertMask, masked_experts
from tests.command import refusal, run_json
from tests.tiny_monet import WORDS, save_monet, tiny_monet

SIDES = {"en": WORDS[1:16], "de/at": WORDS[16:33]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model with large routing weights, which random words of two languages part already."""
    folder = tmp_path_factory.mktemp("monet")
    model = save_monet(folder / "model", tiny_monet())
    rng, rows = np.random.default_rng(0), []
    for domain, words in SIDES.items():
        for _ in range(60):
            text = " ".join(rng.choice(words, 20))
            rows.append({"text": text, "domain": domain, "harm": float(domain == "en")})
    path = folder / "docs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": str(model), "data": str(path)}


def arguments(data: dict[str, str], out: object, *more: str) -> list[str]:
    argv = ["monet", "--model", data["model"], "--data", data["data"], "--out", str(out)]
    return [*argv, "--n-boot", "20", "--permutations", "9", "--quiet", *more]


def test_it_assigns_masks_and_measures(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    summary = run_json(capsys, *arguments(data, out, "--score", "harm", "--correlation", "0.3"))
    by_mask = {row["mask"]: row for row in summary["masks"]}
    assert list(by_mask) == ["de/at", "en", "harm >= 0.3"]
    assert set(summary["plain"]) == set(SIDES) and summary["documents"][0] > 30
    for name, file in (("en", "en"), ("de/at", "de-at"), ("harm >= 0.3", "harm-0.3")):
        mask = ExpertMask.load(out / "masks" / f"{file}.safetensors")
        assert mask.size == by_mask[name]["n_experts"] > 0
    experts = pq.read_table(out / "experts.parquet").to_pylist()
    assert all(row["weight"] >= 2 * row["second_weight"] for row in experts)
    assert all(row["expert"] == row["i"] * 8 + row["j"] for row in experts)
    counted = [sum(row["domain"] == name for row in experts) for name in ("de/at", "en")]
    assert counted == [by_mask[name]["n_experts"] for name in ("de/at", "en")]
    english = {(row["layer"], row["expert"]) for row in experts if row["domain"] == "en"}
    harm = ExpertMask.load(out / "masks" / "harm-0.3.safetensors")
    chosen = {(layer, e) for layer, one in harm.removed.items() for e in one.tolist()}
    assert len(english & chosen) > len(english) / 2  # the score is the language
    rows = pq.read_table(out / "damage.parquet").to_pylist()
    assert len(rows) == 2 * 3 * (1 + 3)  # domains, masks, random draws
    page = (out / "report.html").read_text()
    assert "Deleted experts" in page and "de/at" in page
    assert f"<td>{summary['plain']['en']:.2f}</td>" in page  # four digits, not "44"
    # the folder is taken as it is, and refused where the settings differ
    again = run_json(capsys, *arguments(data, out, "--score", "harm", "--correlation", "0.3"))
    assert again == summary
    assert "score is 'harm' there and None here" in refusal(capsys, *arguments(data, out))


def test_a_written_mask_gives_the_perplexity_that_was_reported(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sae_apps.experts import text_losses

    out = tmp_path / "out"
    run_json(capsys, *arguments(data, out))
    rows = pq.read_table(out / "damage.parquet").to_pylist()
    (row,) = [r for r in rows if r["mask"] == "en" and r["domain"] == "en"]
    lm, mask = load_model(data["model"]), ExpertMask.load(out / "masks" / "en.safetensors")
    from sae_core.text import is_held_out

    docs = [json.loads(line) for line in Path(data["data"]).read_text().splitlines()]
    held = [doc for i, doc in enumerate(docs) if is_held_out(i, 0.5, 0)]
    texts = [doc["text"] for doc in held if doc["domain"] == "en"]
    with masked_experts(lm.model, mask):
        nll, n = text_losses(lm, texts)
    assert np.exp(nll.sum() / n.sum()) == pytest.approx(row["perplexity"], rel=1e-5)
    assert row["low"] <= row["rise"] <= row["high"]


def test_a_dry_run_writes_nothing_and_people_get_lines(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_json(capsys, *arguments(data, out, "--dry-run"))["passes"] == 1 + 2 * 4
    assert not out.exists()
    assert main(arguments(data, out)) == 0
    said = capsys.readouterr().out
    assert "perplexity" in said and "own / others" in said and str(out) in said


def test_what_does_not_fit_is_refused(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], stories260k: Path
) -> None:
    out = tmp_path / "out"

    def said(*more: str) -> str:
        return refusal(capsys, *arguments(data, out, *more))

    assert "column 'topic', got text, domain, harm" in said("--label", "topic")
    assert said("--model", "nowhere.gguf", "--dry-run").startswith("File not found: expected a mod")
    assert "number in 'text'" in said("--score", "text")
    assert "between 0 and 1, got 1.0" in said("--eval-frac", "1")
    assert "--random-draws of at least 1, got 0" in said("--random-draws", "0")
    assert "Expected a Monet model with routers, got Llama" in said("--model", str(stories260k))
    assert "experts of some domain, got none" in said("--ratio", "1e9")
    assert "documents at" in said("--data", str(tmp_path / "none.jsonl"))
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "the cat", "domain": "en"}\n' * 4)
    assert "at least two domains in 'domain', got en" in said("--data", str(one))
    one.write_text('{"text": "the cat", "domain": "a b"}\n{"text": "der hund", "domain": "a/b"}\n')
    assert "differ in letters or digits" in said("--data", str(one))
    one.write_text('{"text": "the cat", "domain": "a"}\n{"text": "der hund", "domain": "b"}\n')
    assert "documents of every domain to" in said("--data", str(one))
    assert refusal(capsys, "monet", "--data", str(one)).startswith("Expected a Monet model")
    assert not out.exists()
