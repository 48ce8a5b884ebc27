"""Text sources: all formats give the same rows, bad files their sentence, splits are fixed."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_apps.tasks.text import interleave, open_text, python_chunks, split_source
from sae_core import records
from sae_core.errors import UserError
from sae_core.text import (
    TextRow,
    held_out_mask,
    is_held_out,
    read_text_file,
    rows_from_texts,
    split_rows,
    splitmix64,
)

RECORDS = [
    {"text": 'one, "two"', "label": "a"},
    {"text": "drei\nvier ü 日本", "label": "b"},
    {"text": "", "label": "c"},
]
ROWS = [TextRow(i, r["text"], {"label": r["label"]}) for i, r in enumerate(RECORDS)]


def write_csv(delimiter: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import csv

        with open(path, "w", encoding="utf-8", newline="") as handle:
            table = csv.writer(handle, delimiter=delimiter)
            table.writerow(RECORDS[0])
            table.writerows(list(r.values()) for r in RECORDS)

    return write


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: p.write_text("\n\n".join(map(json.dumps, RECORDS)), encoding="utf-8"),
    "a.json": lambda p: p.write_text(json.dumps(RECORDS, ensure_ascii=False, indent=2), "utf-8"),
    "lines.json": lambda p: p.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8"),
    "bom.jsonl": lambda p: p.write_text("\n".join(map(json.dumps, RECORDS)), "utf-8-sig"),
    "a.csv": write_csv(","),
    "a.tsv": write_csv("\t"),
    "a.parquet": lambda p: pq.write_table(pa.Table.from_pylist(RECORDS), p),
}


ZIPPED = [f"{name}.gz" for name in WRITERS if not name.endswith(".parquet")]


@pytest.mark.parametrize("name", [*WRITERS, *ZIPPED])
def test_every_format_gives_the_same_rows_again_and_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / name.removesuffix(".gz")
    WRITERS[path.name](path)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
    source = read_text_file(tmp_path / name)
    assert list(source) == ROWS
    assert list(source) == ROWS


def test_a_line_of_txt_is_a_row_and_blank_lines_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"first \r\n\n  \nsecond")
    assert list(read_text_file(path)) == [TextRow(0, "first ", {}), TextRow(1, "second", {})]


def test_the_id_changes_with_the_bytes_and_the_column(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,other\nx,y\n")
    ids = {read_text_file(path).id, read_text_file(path, column="other").id}
    path.write_text("text,other\nx,z\n")
    ids |= {read_text_file(path).id}
    assert len(ids) == 3
    assert all(one.startswith("a.csv@") for one in ids)


def test_scalars_go_to_meta_and_the_rest_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    record = {"text": "x", "n": 3, "f": 0.5, "ok": True, "none": None, "list": [1], "row_id": 9}
    path.write_text(json.dumps(record))
    (row,) = read_text_file(path)
    assert row.meta == {"n": 3, "f": 0.5, "ok": True, "row_id_": 9}


@pytest.mark.parametrize(
    ("content", "column", "expected"),
    [
        ('{"n": 1, "body": "x"}', None, "x"),  # the only string column
        ('{"text": "t", "body": "x"}', None, "t"),  # "text" comes first
        ('{"text": "t", "body": "x"}', "body", "x"),
    ],
)
def test_the_text_column_is_found(
    tmp_path: Path, content: str, column: str | None, expected: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    assert [row.text for row in read_text_file(path, column=column)] == [expected]


GOOD = b'{"text": "x"}\n'
BAD_FILES = [
    ("a.jsonl", b"", "a.jsonl is empty"),
    ("a.txt", b"\n \n", "a.txt is empty"),
    ("a.json", b"[ ]", "a.json is empty"),
    ("a.csv", b"text\n", "a.csv is empty"),
    ("a.txt", b"fine\nna\xefve\n", "a.txt line 2: expected UTF-8 text, got the byte 0xef"),
    ("a.csv", b"text\nfine\n\xff\n", "a.csv line 3: expected UTF-8"),
    ("a.json", b'[{"text": "x"},\n\n{"text": "\xff"}]', "a.json line 3: expected UTF-8"),
    ("a.json", b'[{"text": "x"}]\n\xc3', "a.json line 2: expected UTF-8"),
    ("a.jsonl", GOOD + b'{"text": ', "a.jsonl line 2: expected one JSON object, got invalid JSON"),
    ("a.jsonl", GOOD + b'["x"]', "a.jsonl line 2: expected a JSON object, got list"),
    ("a.json", b'[{"text": "x"},\n{"text": }]', "a.json line 2: .*invalid JSON"),
    ("a.json", b'[{"text": "x"}\n{"text": "y"}]', "a.json line 2: .*Expecting ','"),
    ("a.json", b'[{"text": "x"},\n{"text": "y"}', "a.json line 2: .*invalid JSON"),
    ("a.json", b'[{"text": "x"},\n3]', "a.json line 2: expected a JSON object, got int"),
    ("a.json", b'[{"text": "x"}]\n[1]', "a.json: expected one JSON array"),
    ("a.csv", b"text,b\nx,y\nz\n", "a.csv line 3: expected 2 fields, got 1"),
    ("a.csv", b'text\n"x" y\n', "a.csv line 2: invalid table row"),
    ("a.csv", b'text\nx\n"open\n\n', "a.csv line 4: invalid table row"),
    ("a.csv", b"text,text\nx,y\n", "a.csv line 1: a column name appears twice"),
    ("a.csv", b"b,c\nx,y\n", "no column 'text' and 2 string columns.*columns are: b, c"),
    ("a.jsonl", b'{"n": 1}', "no column 'text' and 0 string columns"),
    ("a.jsonl", b'{"text": null}', "a.jsonl line 1: expected a string in column 'text', got null"),
    ("a.jsonl", GOOD + b'{"b": "x"}', "a.jsonl line 2 has no column 'text'; its columns are: b"),
    ("a.jsonl", GOOD + b'{"text": "\\ud800"}', "a.jsonl line 2: .*unpaired surrogate"),
    ("a.docx", b"x", r"ends in \.jsonl.*got '\.docx'"),
    ("a.txt.gz", b"x", "a.txt.gz is a damaged gzip file"),
    ("a.txt.gz", gzip.compress(b"x\n" * 9)[:-9], "a.txt.gz is a damaged gzip file"),
    ("a.parquet", b"PAR1", "a.parquet is not a whole parquet file"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), BAD_FILES)
def test_a_bad_file_gives_its_sentence(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        list(read_text_file(tmp_path / name))


def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,y\n")
    with pytest.raises(UserError, match="no column 'body'; its columns are: text, label"):
        read_text_file(tmp_path / "a.csv", column="body")


@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=8),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    escape=st.booleans(),
)
def test_a_json_array_reads_the_same_whatever_the_size_of_the_blocks(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    chunk: int,
    indent: int | None,
    escape: bool,
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    objects = [{"text": text, "n": 1.5} for text in texts]
    path.write_text(json.dumps(objects, indent=indent, ensure_ascii=escape), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_CHUNK", chunk)
        got = [row.text for row in read_text_file(path, column="text")]
    assert got == texts


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Peak of the Python heap while reading 12 MB, of which one record is 20 kB."""
    import tracemalloc

    record = {"text": "word " * 4000}
    line = json.dumps(record)
    (tmp_path / "a.jsonl").write_text(f"{line}\n" * 600)
    (tmp_path / "a.json").write_text(f"[{','.join([line] * 600)}]")
    (tmp_path / "a.csv").write_text("text\n" + f"{record['text']}\n" * 600)
    for name in ("a.jsonl", "a.json", "a.csv"):
        tracemalloc.start()
        n_rows = sum(1 for _ in read_text_file(tmp_path / name))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n_rows == 600
        assert peak < 6e6, (name, peak)  # half of the file; a block is 1 MB


def test_the_nested_columns_of_parquet_come_where_asked_for(tmp_path: Path) -> None:
    record = {"text": "x", "turns": [{"role": "user", "content": "a"}], "tags": ["b", "c"]}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    read = records.read_records
    assert list(read(tmp_path / "a.parquet")) == [("a.parquet row 0", {"text": "x"})]
    assert list(read(tmp_path / "a.parquet", nested=True)) == [("a.parquet row 0", record)]


def test_a_csv_field_may_be_as_long_as_a_novel(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 400_000 + "\n")
    assert [len(row.text) for row in read_text_file(tmp_path / "a.csv")] == [400_000]


@pytest.mark.parametrize(
    ("file", "column", "n_rows"),
    [
        ("paradetox/paradetox.tsv.gz", "toxic", 11_927),
        ("hate_offensive/labeled_data.csv.gz", "tweet", 24_783),
        ("gsm8k/test.jsonl.gz", "question", 1_319),
        ("gpteacher/codegen-instruct.json.gz", "response", 4_535),
    ],
)
def test_real_files_have_the_number_of_rows_their_source_states(
    shared_data: Path, file: str, column: str, n_rows: int
) -> None:
    assert sum(1 for _ in read_text_file(shared_data / file, column=column)) == n_rows


def test_texts_from_memory() -> None:
    source = rows_from_texts(["a", "b"], [{"k": 1}, {"k": 2}])
    assert list(source) == list(source) == [TextRow(0, "a", {"k": 1}), TextRow(1, "b", {"k": 2})]
    assert source.id == rows_from_texts(["a", "b"]).id
    assert source.id != rows_from_texts(["ab", ""]).id
    with pytest.raises(UserError, match="each of 2 texts, got 1"):
        rows_from_texts(["a", "b"], [{}])
    with pytest.raises(UserError, match="at least one text, got none"):
        rows_from_texts([])
    with pytest.raises(UserError, match="got one string"):
        rows_from_texts("ab")
    with pytest.raises(UserError, match="Text 1: .*unpaired surrogate"):
        rows_from_texts(["a", "\ud800"])


# Splits

# The first outputs of Vigna's reference splitmix64.c for the seeds 0 and 1234567.
SPLITMIX_GOLDEN = {0: 0xE220A8397B1DCDAF, 1234567: 6457827717110365317}


def test_splitmix64_is_the_published_function() -> None:
    for state, output in SPLITMIX_GOLDEN.items():
        assert splitmix64(state) == output
    states = np.array(list(SPLITMIX_GOLDEN), dtype=np.uint64)
    assert splitmix64(states).tolist() == list(SPLITMIX_GOLDEN.values())


@given(
    ids=st.lists(st.integers(0, 2**63 - 1), max_size=20),
    frac=st.floats(0, 1, exclude_max=True),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_the_mask_of_an_array_is_that_of_its_ids(ids: list[int], frac: float, seed: int) -> None:
    mask = held_out_mask(np.array(ids, dtype=np.int64), frac, seed)
    assert mask.tolist() == [is_held_out(i, frac, seed) for i in ids]


def test_the_held_out_part_has_the_size_asked_for_and_depends_on_the_seed() -> None:
    ids = np.arange(100_000)
    for frac in (0.0, 0.05, 0.5):
        n_held = held_out_mask(ids, frac).sum()
        assert abs(n_held - 1e5 * frac) <= 5 * (1e5 * frac * (1 - frac)) ** 0.5  # 5 sigma
    one, same, other = (held_out_mask(ids, 0.5, seed) for seed in (0, 0, 1))
    assert (one == same).all()
    assert abs((one == other).mean() - 0.5) < 0.01  # two independent coins agree half the time


def test_another_process_holds_out_the_same_rows() -> None:
    code = "from sae_core.text import is_held_out as f; print([i for i in range(99) if f(i, 0.3)])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str([i for i in range(99) if is_held_out(i, 0.3)])


def test_the_two_parts_are_disjoint_and_whole() -> None:
    source = rows_from_texts([str(i) for i in range(500)])
    train, held_out = split_rows(source, 0.2, seed=3)
    assert sorted([*train, *held_out]) == list(source)
    assert list(train) == list(train) and list(held_out) == list(held_out)
    assert 60 < len(list(held_out)) < 140
    assert len({source.id, train.id, held_out.id, split_rows(source, 0.2, seed=4)[0].id}) == 4
    for frac in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=rf"held_out_frac must be in \[0, 1\), got {frac}"):
            split_rows(source, frac)


# Text by name


def test_a_path_wins_over_the_hub_and_a_lost_path_is_said_to_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "a.txt").write_text("x\n")
    assert [row.text for row in open_text("owner/a.txt")] == ["x"]
    for lost in ("lost.jsonl", "lost.csv.gz", "./lost", "/lost/file", "a/b/c"):
        with pytest.raises(UserError, match="File not found"):
            open_text(lost)
    with pytest.raises(UserError, match="got a folder"):
        open_text("owner")


def test_a_dataset_that_cannot_be_reached_gives_a_sentence() -> None:
    with pytest.raises(UserError, match="Cannot open the text 'owner/nothing'.*split 'train'"):
        open_text("owner/nothing")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub that holds one dataset at one commit; the list receives what was asked for."""
    import datasets
    import huggingface_hub

    asked: list[tuple[Any, ...]] = []

    class Info:
        sha = "c0ffee" * 7

    def load(name: str, configuration: str | None, **options: Any) -> Any:
        asked.append((name, configuration, options["split"], options["revision"]))
        assert options["streaming"] is True
        table = [{"id": i, "body": f"text {i}"} for i in range(3)]

        def rows() -> Iterator[dict[str, Any]]:
            yield from table

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: Info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_hub_dataset_streams_from_a_fixed_commit(hub: list[tuple[Any, ...]]) -> None:
    source = open_text("owner/set:v2", split="test")
    expected = [TextRow(i, f"text {i}", {"id": i}) for i in range(3)]
    assert list(source) == expected
    assert list(source) == expected
    assert source.id == "owner/set:v2/test@c0ffeec0ffee#body"
    assert hub == [("owner/set", "v2", "test", "c0ffee" * 7)]
    with pytest.raises(UserError, match="no column 'nope'; its columns are: id, body"):
        open_text("owner/set", column="nope")


def test_any_prefix_of_the_interleaved_text_mixes_the_domains() -> None:
    texts = {
        name: [f"{name} {i}" for i in range(n)] for name, n in (("a", 90), ("b", 40), ("c", 55))
    }
    rows = interleave({**texts, "b": [*texts["b"], *texts["b"]]})  # repeated texts count once
    assert rows == interleave(texts)
    assert len(rows) == len(set(rows)) == 3 * 40
    for n in range(1, len(rows)):
        shares = Counter(domain for _, domain in rows[:n])
        assert max(shares.values()) - min(shares.get(name, 0) for name in texts) <= 1
    assert [text for text, domain in rows if domain == "b"] != texts["b"]  # shuffled
    assert len({domain for _, domain in rows[::3]}) == 3  # rounds differ in their order


SOURCE = '''"""Doc."""
import os

# about f
@decorated
def f():
    return "a\\x0cb"


def g(): pass
x = 1
'''


def test_source_is_cut_at_definitions_with_what_belongs_to_them() -> None:
    import ast

    chunks = list(split_source(SOURCE, ast.parse(SOURCE)))
    assert chunks == [
        '"""Doc."""\nimport os',
        '# about f\n@decorated\ndef f():\n    return "a\\x0cb"',
        "def g(): pass",
        "x = 1",
    ]


def test_long_definitions_are_cut_and_no_line_is_lost() -> None:
    import ast

    lines = [f"    x{i} = {i}" for i in range(200)]
    source = "\n".join(["a = 0\f", "class A:", *lines, "b = 1"]) + "\n"
    chunks = list(split_source(source, ast.parse(source)))
    assert "\n".join(chunks) == source.rstrip("\n")
    assert max(chunk.count("\n") + 1 for chunk in chunks) <= 45
    assert len(chunks) == 2 + 5  # 201 lines in blocks of ~40, and the lines around the class


def test_python_chunks_leave_out_tests_and_broken_files(tmp_path: Path) -> None:
    body = "def function():\n" + "    value = 'long enough to be kept'\n" * 4
    for name in ("b.py", "a/z.py", "test/x.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(body.replace("function", Path(name).stem))
    (tmp_path / "broken.py").write_text("def (" + "x" * 100)
    (tmp_path / "short.py").write_text("import os\n")
    chunks = list(python_chunks(tmp_path))
    assert [chunk.split("(")[0] for chunk in chunks] == ["def z", "def b"]
