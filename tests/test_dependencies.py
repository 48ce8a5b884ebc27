"""docs/dependencies.md: a row for every direct dependency, no licence unknown, copyleft told."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import dependencies
from benchmarks.dependencies import ABSENT, COPYLEFT, PAGE, UNKNOWN, closure, missing_rows, stated

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.split("<!-- dependencies -->")[1].splitlines()
    if line.startswith("| ")
][2:]


def test_every_direct_dependency_has_a_row_and_a_licence() -> None:
    assert missing_rows(PAGE) == [] and len(ROWS) > 60
    names = [row[0] for row in ROWS]
    assert names == sorted(set(names))
    assert all(row[2] and row[2] != UNKNOWN for row in ROWS)
    assert {row[0] for row in ROWS if row[2] == ABSENT} <= {"faiss-gpu"}
    told = {extra.strip() for row in ROWS for extra in row[3].split(",")}
    assert {"always", "cpu", "geo", "dev"} <= told <= set(dependencies.direct())


def test_a_missing_row_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(re.sub(r"\n\| torch \|[^\n]*", "", TEXT))
    assert missing_rows(page) == ["torch"]


def test_copyleft_is_told_in_prose() -> None:
    prose = TEXT.split("<!-- dependencies -->")[0]
    found = [row[0] for row in ROWS if COPYLEFT.search(row[2])]
    assert "certifi" in found and all(name in prose for name in found)
    assert "MIT" not in [row[2] for row in ROWS if row[0] in found]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (("MIT", "other", ()), "MIT"),
        ((None, "BSD-3-Clause", ["License :: OSI Approved :: MIT License"]), "BSD-3-Clause"),
        ((None, "The text\nof it", ["License :: OSI Approved :: MIT License"]), "MIT License"),
        ((None, "x" * 61, ["License :: OSI Approved :: ISC"]), "ISC"),
        ((None, "UNKNOWN", ["Topic :: Text"]), UNKNOWN),
        ((None, None, ()), UNKNOWN),
    ],
)
def test_the_first_field_that_names_a_licence(fields: tuple, wanted: str) -> None:
    assert stated(*fields) == wanted


def test_the_walk_follows_extras_and_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = {"a": ["b[x]", "never; python_version < '3'"], "b": ["c", "d; extra == 'x'", "a",
             "e; extra == 'y'"]}  # fmt: skip

    class Found:
        def __init__(self, name: str) -> None:
            self.requires = graph.get(name)

    monkeypatch.setattr(dependencies, "installed", Found)
    assert closure([Requirement("A")]) == {"a", "b", "c", "d"}
    assert closure([Requirement("b")]) == {"a", "b", "c", "d"}  # through a
    assert closure([Requirement("c")]) == {"c"}
