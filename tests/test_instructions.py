"""Instruction data: columns are recognised or refused, rows survive every format, chat templates
keep each message where the spans say."""

import csv
import gzip
import json
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_apps.selection.instructions import (
    InstructionRow,
    choose_form,
    open_instructions,
    render,
    source_from_rows,
)
from sae_core.errors import CorruptFileError, UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]


def one(record: dict[str, Any], **columns: Any) -> InstructionRow:
    (row,) = open_instructions([record], **columns)
    return row


def label(record: dict[str, Any], **columns: Any) -> str:
    return open_instructions([record], **columns).id.partition("#")[2]


# ---- columns ----

DETECTED = [
    ({"instruction": "i", "input": "x", "output": "o"}, "instruction+input>output", "i\nx", "o"),
    ({"instruction": "i", "input": "", "output": "o"}, "instruction+input>output", "i", "o"),
    ({"instruction": "i", "input": None, "response": "o"}, "instruction+input>response", "i", "o"),
    ({"instruction": "i", "context": "c", "response": "o", "category": "k"},
     "instruction+context>response", "i\nc", "o"),
    ({"prompt": "p", "completion": "c", "template": "t"}, "prompt>completion", "p", "c"),
    ({"prompt": "p", "response": "r"}, "prompt>response", "p", "r"),
    ({"question": "q", "answer": "a"}, "question>answer", "q", "a"),
    ({"input": "i", "target": "t", "task": "k"}, "input>target", "i", "t"),
    ({"input": "i", "output": "t"}, "input>output", "i", "t"),
    ({"inputs": "i", "targets": "t"}, "inputs>targets", "i", "t"),
    ({"source": "s", "target": "t"}, "source>target", "s", "t"),
    ({"instruction": "i", "output": "o", "source": "web"}, "instruction>output", "i", "o"),
    ({"query": "q", "response": "r", "type": "k"}, "query>response", "q", "r"),
    ({"problem": "q", "solution": "r"}, "problem>solution", "q", "r"),
    ({"text": "t", "code": "c", "test_list": ["x"]}, "text>code", "t", "c"),
    ({"text": "t", "instruction": "i", "output": "o"}, "instruction>output", "i", "o"),
    ({"text": "t", "title": "x"}, "text", "t", ""),
    ({"body": "t", "n": 3}, "body", "t", ""),
    ({"system_prompt": "s", "question": "q", "response": "r"},
     "system_prompt+question>response", "s\nq", "r"),
    ({"system_prompt": "", "question": "q", "response": "r"},
     "system_prompt+question>response", "q", "r"),
    ({"messages": CHAT, "prompt": "2 + 2?"}, "messages",
     "Be brief.\n2 + 2?\n4\nAnd 3 + 3?", "6"),
    ({"prompt": CHAT[:2], "completion": CHAT[2:3]}, "prompt>completion",
     "Be brief.\n2 + 2?", "4"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected", "prompt", "response"), DETECTED)
def test_the_usual_columns_are_recognised(
    record: dict[str, Any], expected: str, prompt: str, response: str
) -> None:
    assert label(record) == expected
    row = one(record)
    assert (row.row_id, row.prompt, row.response, row.group) == (0, prompt, response, None)
    assert row.record == record


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"prompt": "p", "question": "q", "answer": "a"},
         "several columns of prompts: prompt, question; name prompt"),
        ({"problem": "p", "solution": "s", "answer": "a"},
         "several columns of responses: answer, solution; name prompt and response"),
        ({"messages": CHAT, "conversations": CHAT},
         "several columns of messages: messages, conversations; name messages"),
        ({"question": "q", "input": "i", "context": "c", "answer": "a"},
         "several columns of context: input, context"),
        ({"a": "x", "b": "y"}, "got the columns a, b: name the prompt and the response"),
        ({"n": 1}, "one column of text, got the columns n"),
    ],
)  # fmt: skip
def test_an_ambiguity_is_refused_with_the_names_found(
    record: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        open_instructions([record])


def test_named_columns_switch_the_detection_off() -> None:
    record = {"question": "q", "answer": "a", "hint": "h", "turns": CHAT[1:3]}
    assert one(record, prompt="hint")[1:3] == ("h", "")
    assert one(record, prompt=["question", "hint"], response="answer")[1:3] == ("q\nh", "a")
    assert one(record, messages="turns")[1:3] == ("2 + 2?", "4")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"prompt": "qestion"}, r"no column 'qestion' \(nearest: question\); its columns are: "
                                "question, answer"),
        ({"prompt": "question", "response": "zzz"}, "no column 'zzz'; its columns are"),
        ({"template": "{questions}"}, r"no column 'questions' \(nearest: question\)"),
        ({"group": "anwser"}, r"no column 'anwser' \(nearest: answer\)"),
        ({"id_column": "id"}, "no column 'id'"),
        ({"response": "answer"}, "or prompt with or without response, got response"),
        ({"prompt": "question", "messages": "answer"}, "got messages and prompt"),
        ({"template": "{question}", "response": "answer"}, "got template and response"),
        ({"template": "{question"}, "Cannot read the template"),
        ({"template": "{}"}, r"bare names of columns in its braces, got \{\}"),
        ({"template": "{question!r}"}, r"bare names .* got \{question!r\}"),
        ({"template": "{question:>9}"}, r"bare names .* got \{question:>9\}"),
        ({"template": "no column"}, r"expected \{column\} in the template"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_are_refused(columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        open_instructions([{"question": "q", "answer": "a"}], **columns)


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        ("Q: {question}\nA: {response}{answer}.", "Q: q\nA: ", "a."),
        ("Q: {question}\nA: {answer}", "Q: q\nA: a", ""),
        ("{{{question}}} {n}", "{q} 3", ""),
        ("{response}{answer}", "", "a"),
    ],
)
def test_the_response_of_a_template_begins_at_its_mark(
    template: str, prompt: str, response: str
) -> None:
    row = one({"question": "q", "answer": "a", "n": 3}, template=template)
    assert (row.prompt, row.response) == (prompt, response)
    rendered = render(row, form="plain")
    assert rendered.text == prompt + response  # nothing comes between
    assert rendered.prompt_end == len(prompt)


def test_a_column_of_the_marks_name_is_the_response() -> None:
    record = {"instruction": "i", "response": "r"}
    assert one(record, template="{instruction}\n\n{response}!")[1:3] == ("i\n\n", "r!")


@given(record=st.fixed_dictionaries({"a{b": st.text(), "c": st.text()}), rest=st.text(max_size=9))
def test_a_template_is_the_same_as_python_format(record: dict[str, str], rest: str) -> None:
    template = "x{c}y" + rest.replace("{", "{{").replace("}", "}}")
    row = one(record, template=template)
    assert row.prompt == template.format(**record)


# ---- conversations ----


@pytest.mark.parametrize(
    ("roles", "n_before"),
    [
        (["user", "assistant"], 1),
        (["system", "user", "assistant", "user", "assistant"], 4),
        (["user"], 1),
        (["assistant"], 0),
        (["user", "assistant", "user"], 1),
        (["user", "assistant", "tool", "assistant"], 3),
    ],
)
def test_the_last_assistant_message_begins_the_response(roles: list[str], n_before: int) -> None:
    contents = [f"text {i}" for i in range(len(roles))]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    row = one({"messages": messages})
    assert row.prompt == "\n".join(contents[:n_before])
    assert row.response == "\n".join(contents[n_before:])
    assert row.turns == tuple(zip(roles, contents, strict=True))


def test_sharegpt_parts_and_objects_of_lists_are_conversations() -> None:
    wanted = (("system", "s"), ("user", "q"), ("assistant", "a"))
    names = [("system", "s"), ("human", "q"), ("gpt", "a")]
    share = [{"from": role, "value": text} for role, text in names]
    parts = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in [("developer", "s"), ("user", "q"), ("Assistant", "a")]
    ]
    lists = {"role": [r for r, _ in wanted], "content": [c for _, c in wanted]}
    for record in ({"conversations": share}, {"messages": parts}, {"messages": lists}):
        assert one(record).turns == wanted


def test_a_bare_tool_call_has_no_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert one({"messages": [CHAT[1], call]}).turns == (("user", "2 + 2?"), ("assistant", ""))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([{"role": "narrator", "content": "x"}],
         r"records row 1, message 0: unknown role 'narrator'; expected one of system, "),
        ([CHAT[1], {"text": "x"}], "message 1: expected the keys role and content, .* got text"),
        ([CHAT[1], "x"], "message 1: expected an object, got str"),
        ({"role": ["user"], "content": ["a", "b"]}, r"lists of one length .*got \[1, 2\]"),
        ({"role": "user", "content": 3}, r"lists of one length .*got \[0, 0\]"),
        ("hello", "expected a list of messages in column 'messages', got str"),
        ([{"role": "user", "content": 3}], "message 0: expected text under 'content', got int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "parts of text .* got image_url"),
    ],
)  # fmt: skip
def test_a_bad_conversation_gives_its_sentence(value: Any, sentence: str) -> None:
    good: dict[str, Any] = {"messages": CHAT}
    with pytest.raises(UserError, match=sentence):
        list(open_instructions([good, {"messages": value}], messages="messages"))


# ---- files ----

RECORDS = [
    {"id": 7, "question": 'one, "two"', "answer": "drei\nvier ü 日本", "task": "a"},
    {"id": 3, "question": "x", "answer": "", "task": "b"},
]


def write_csv(delimiter: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with open(path, "w", encoding="utf-8", newline="") as handle:
            table = csv.writer(handle, delimiter=delimiter)
            table.writerow(RECORDS[0])
            table.writerows(list(r.values()) for r in RECORDS)

    return write


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: p.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8"),
    "a.json": lambda p: p.write_text(json.dumps(RECORDS), encoding="utf-8"),
    "a.csv": write_csv(","),
    "a.tsv": write_csv("\t"),
    "a.parquet": lambda p: pq.write_table(pa.Table.from_pylist(RECORDS), p),
}
ZIPPED = [f"{name}.gz" for name in WRITERS if name != "a.parquet"]


@pytest.mark.parametrize("name", [*WRITERS, *ZIPPED])
def test_every_format_gives_the_same_rows_again_and_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / name.removesuffix(".gz")
    WRITERS[path.name](path)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
    source = open_instructions(str(tmp_path / name), group="task")
    rows = [(i, r["question"], r["answer"], r["task"]) for i, r in enumerate(RECORDS)]
    assert [row[:4] for row in source] == rows
    assert list(source) == list(source)


def test_messages_survive_parquet_and_datasets(tmp_path: Path) -> None:
    from datasets import Dataset

    records = [{"messages": CHAT, "task": "a"}, {"messages": CHAT[1:3], "task": "b"}]
    wanted = [row[1:] for row in open_instructions(records, group="task")]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    data = Dataset.from_list(records)
    stream = data.to_iterable_dataset()
    for spec in (tmp_path / "a.parquet", data, stream, data.with_format("torch")):
        source = open_instructions(spec, group="task")
        assert [row[1:] for row in source] == [row[1:] for row in source] == wanted
    assert open_instructions(data).id == open_instructions(stream).id
    assert open_instructions(data).id != open_instructions(data.select([1, 0])).id


pairs = st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=5)


@settings(max_examples=25)
@given(rows=pairs.filter(lambda rows: any("".join(row).strip() for row in rows)))
def test_any_text_comes_back_from_jsonl_and_parquet(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("round")
    records = [{"prompt": p, "response": r} for p, r in rows]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet")
    wanted = [(i, *row) for i, row in enumerate(rows) if "".join(row).strip()]
    for name in ("a.jsonl", "a.parquet"):
        assert [row[:3] for row in open_instructions(folder / name)] == wanted


def test_the_id_changes_with_the_bytes_and_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORDS[0]))
    ways: list[dict[str, Any]] = [{}, {"prompt": "answer"}, {"group": "task"}, {"id_column": "id"},
                                  {"template": "{question}"}, {"template": "{answer}"}]  # fmt: skip
    ids = {open_instructions(path, **way).id for way in ways}
    path.write_text(json.dumps(RECORDS[1]))
    ids |= {open_instructions(path).id}
    assert len(ids) == len(ways) + 1
    assert all(re.match(r"a\.jsonl@[0-9a-f]{12}#", name) for name in ids)
    assert open_instructions(path, name="owner/name@abc").id == "owner/name@abc#question>answer"
    assert len({open_instructions(RECORDS[:k]).id for k in (1, 2)}) == 2


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Peak of the Python heap while reading 8 MB, of which one record is 20 kB."""
    import tracemalloc

    line = json.dumps({"question": "word " * 2000, "answer": "word " * 2000})
    (tmp_path / "a.jsonl").write_text(f"{line}\n" * 400)
    source = open_instructions(tmp_path / "a.jsonl")
    tracemalloc.start()
    n_rows = sum(1 for _ in source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_rows == 400
    assert peak < 1e6  # an eighth of the file


def test_a_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(RECORDS[0]))
    source = open_instructions(tmp_path / "a.jsonl")
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b"", "a.jsonl is empty: expected at least one record, got none"),
        ("a.csv", b"question,answer\n", "a.csv is empty"),
        ("a.jsonl", b'{"question": ', "a.jsonl line 1: expected one JSON object"),
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "q"}',
         r"a.jsonl line 2 has no column 'answer'; its columns are: question"),
        ("a.jsonl", b'{"question": "q", "answer": 5}', "line 1: expected text .*, got int"),
        ("a.jsonl", b'{"question": "\\ud800", "answer": "a"}', "line 1: .*unpaired surrogate"),
        ("a.jsonl", b'{"question": " ", "answer": ""}', "records with text, got none in"),
        ("a.docx", b"x", "expected a file that ends in"),
    ],
)  # fmt: skip
def test_a_bad_file_gives_its_sentence(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        list(open_instructions(tmp_path / name))


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="File not found: .*nowhere.jsonl, got nothing"):
        open_instructions(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="got a folder"):
        open_instructions(tmp_path)
    with pytest.raises(UserError, match="sequence of dicts .* got int"):
        open_instructions(3)
    with pytest.raises(UserError, match=r"got an iterator \(list_iterator\): make it a list"):
        open_instructions(iter(RECORDS))
    with pytest.raises(UserError, match="records row 0: expected a dict, got str"):
        open_instructions(["a"])
    with pytest.raises(UserError, match="The list of records is empty"):
        open_instructions([])
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptFileError, match="not a whole parquet file"):
        open_instructions(tmp_path / "a.parquet")


# ---- rows without text ----

HOLES = [
    {"question": "q", "answer": "a"},
    {"question": " ", "answer": "\n"},
    {"question": None, "answer": "a"},
    {"question": "q", "answer": None},
    {"question": "", "answer": "only a response"},
]


def test_a_pool_counts_its_rows_without_text_and_keeps_their_numbers() -> None:
    reader = open_instructions(HOLES).open()
    assert [row.row_id for row in reader] == [0, 4]
    assert (reader.n_records, reader.n_textless) == (5, 3)
    whole = open_instructions(HOLES[:1]).open()
    assert len(list(whole)) == 1 and whole.n_textless == 0


@pytest.mark.parametrize("hole", HOLES[1:4])
def test_a_target_refuses_them_when_it_is_opened(hole: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="records row 1: .*got a target without text"):
        open_instructions([HOLES[0], hole], target=True)
    assert len(list(open_instructions([HOLES[0], HOLES[4]], target=True))) == 2


@pytest.mark.parametrize("value", [None, [1]])
def test_a_group_is_a_text_or_a_number(value: Any) -> None:
    records = [{"text": "x", "task": 3}, {"text": "y", "task": value}]
    with pytest.raises(UserError, match="records row 1: expected a group in column 'task'"):
        list(open_instructions(records, group="task"))
    assert one(records[0], group="task").group == "3"


# ---- ids ----


def with_ids(*ids: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "uid": value} for i, value in enumerate(ids)]


def test_integer_ids_are_kept_and_others_stay_in_the_record() -> None:
    rows = list(open_instructions(with_ids(7, 0, 2**63 - 1), id_column="uid"))
    assert [row.row_id for row in rows] == [7, 0, 2**63 - 1]
    rows = list(open_instructions(with_ids("b", "a", "7"), id_column="uid"))
    assert [(row.row_id, row.record["uid"]) for row in rows] == [(0, "b"), (1, "a"), (2, "7")]


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ((5, 6, 5), "unique ids in column 'uid', got 5 at records row 0 and at records row 2"),
        (("a", "b", "b"), "got 'b' at records row 1 and at records row 2"),
        ((1, None), "records row 1: expected an integer or a string as id .* got null"),
        ((1, True), "records row 1: .* got bool"),
        ((1, 2.0), "records row 1: .* got float"),
        ((1, "2"), "records row 1: expected ids of one kind .* int before and str here"),
        ((1, -1), "records row 1: expected an id from 0 to 2\\^63 - 1, got -1"),
        ((2**63,), "records row 0: expected an id from 0 .* got 9223372036854775808"),
    ],
)
def test_bad_ids_give_their_sentence(ids: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        open_instructions(with_ids(*ids), id_column="uid")
    assert len(list(open_instructions(with_ids(*ids)))) == len(ids)  # control: not asked for


# ---- rendering ----

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
)
TRIMMING = "{{ '<s>' }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<{{ m.role }}>\n{{ m.content | trim }}"
    "\n{% endfor %}"
)
DROPS_THOUGHT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}"
)


class Tokenizer:
    """What ``render`` asks of a tokenizer, through the template code of transformers."""

    def __init__(self, template: str | None) -> None:
        from transformers import PreTrainedTokenizerFast
        from transformers.utils.chat_template_utils import render_jinja_template

        assert hasattr(PreTrainedTokenizerFast, "apply_chat_template")
        self.chat_template = template
        self._render = render_jinja_template

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        texts, _ = self._render(conversations=[messages], chat_template=self.chat_template)
        return texts[0]


def pair(prompt: str, response: str) -> InstructionRow:
    return InstructionRow(0, prompt, response)


def test_the_default_system_prompt_is_in_the_text_and_in_no_span() -> None:
    rendered = render(pair("What is SmolLM?", "A user model."), Tokenizer(SMOLLM2))
    assert rendered.text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is SmolLM?<|im_end|>\n"
        "<|im_start|>assistant\nA user model.<|im_end|>\n"
    )
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["What is SmolLM?", "A user model."]
    assert rendered.text[: rendered.prompt_end].endswith("<|im_start|>assistant\n")
    own = render(one({"messages": CHAT}), Tokenizer(SMOLLM2))
    assert "named SmolLM" not in own.text
    assert own.text[own.spans[0][0] : own.spans[0][1]] == "Be brief."


turns = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.text("us er\n<|[]>a1é", max_size=12)),
    min_size=1,
    max_size=5,
)


@given(turns=turns, template=st.sampled_from([SMOLLM2, TRIMMING]))
def test_spans_are_the_messages_and_the_prompt_ends_where_the_response_begins(
    turns: list[tuple[str, str]], template: str
) -> None:
    row = InstructionRow(0, "", "", turns=tuple(turns))
    text, prompt_end, spans, form = render(row, Tokenizer(template))
    trim = str.strip if template == TRIMMING else str
    assert [text[a:b] for a, b in spans] == [trim(content) for _, content in turns]
    assert form == "chat"
    answers = [span for (role, _), span in zip(turns, spans, strict=True) if role == "assistant"]
    assert prompt_end == (answers[-1][0] if answers else len(text))
    outside = [text[a:b] for (_, a), (b, _) in zip(spans, spans[1:], strict=False)]
    assert all("|>" in gap or "]" in gap for gap in outside)  # the headers lie between the spans


def test_a_row_without_response_is_all_prompt() -> None:
    rendered = render(pair("Hello", ""), Tokenizer(SMOLLM2))
    assert rendered.prompt_end == len(rendered.text) and len(rendered.spans) == 1
    assert "assistant\n" not in rendered.text.split("<|im_end|>", 1)[1]
    assert render(pair("Hello", ""), form="plain") == ("Hello", 5, ((0, 5),), "plain")


def test_a_template_without_system_role_gets_it_with_the_first_question() -> None:
    rendered = render(one({"messages": CHAT[:3]}), Tokenizer(NO_SYSTEM))
    assert rendered.text == "<user>\nBe brief.\n2 + 2?\n<assistant>\n4\n"
    bad = one({"messages": [CHAT[1], CHAT[1]]})
    with pytest.raises(UserError, match="Row 0: .* roles user, user: Roles must alternate"):
        render(bad, Tokenizer(NO_SYSTEM))
    bad = one({"messages": [CHAT[0], CHAT[1], CHAT[1]]})
    with pytest.raises(UserError, match="roles system, user, user"):
        render(bad, Tokenizer(NO_SYSTEM))


def test_a_template_that_alters_messages_still_tells_where_the_response_begins() -> None:
    row = one({"messages": [
        {"role": "user", "content": "why? u"},
        {"role": "assistant", "content": "<think>hm</think>because"},
        {"role": "user", "content": "assist"},
        {"role": "assistant", "content": "<think>so</think>done"},
    ]})  # fmt: skip
    text, prompt_end, spans, _ = render(row, Tokenizer(DROPS_THOUGHT))
    assert text == "<user>why? u<assistant>because<user>assist<assistant>done"
    assert text[prompt_end:] == "done"
    assert [text[a:b] for a, b in spans] == ["why? u", "assist"]  # the others are not as they were
    # a response that is also the word of a header is found behind the prompt
    row = row._replace(turns=(*row.turns[:3], ("assistant", "assistant")))
    text, prompt_end, spans, _ = render(row, Tokenizer(DROPS_THOUGHT))
    assert spans[-1] == (prompt_end, len(text)) and text[prompt_end:] == "assistant"


def test_plain_text_has_no_headers_and_a_base_model_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    row = pair("q", "a")
    plain = ("q\na", 2, ((0, 1), (2, 3)), "plain")
    assert render(row) == render(row, Tokenizer(None)) == plain
    assert render(row, Tokenizer(SMOLLM2), "plain") == plain
    chat = render(one({"messages": CHAT}), form="plain")
    assert chat.text == "Be brief.\n2 + 2?\n4\nAnd 3 + 3?\n6"
    assert chat.text[chat.prompt_end :] == "6"
    assert render(pair("", "a")).prompt_end == 0
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        assert choose_form(Tokenizer(None)) == "plain"
    assert "no chat template" in caplog.text
    caplog.clear()
    assert choose_form(Tokenizer(SMOLLM2)) == "chat" and caplog.text == ""
    assert choose_form(Tokenizer(None), "plain") == "plain" and caplog.text == ""


@pytest.mark.parametrize("call", [lambda f: render(pair("q", "a"), None, f),
                                  lambda f: choose_form(None, f)])  # fmt: skip
def test_an_unknown_form_is_refused(call: Callable[[str], Any]) -> None:
    with pytest.raises(UserError, match="form 'chat' or 'plain', got 'xml'"):
        call("xml")


def test_rows_from_memory_are_a_source() -> None:
    source = source_from_rows("mine", [pair("q", "a")])
    assert source.id == "mine" and list(source) == list(source) == [pair("q", "a")]


# ---- real data ----


@pytest.mark.parametrize(
    ("file", "columns", "n_rows"),
    [
        ("gsm8k/test.jsonl.gz", "question>answer", 1_319),
        ("bbh/bbh.jsonl.gz", "input>target", 6_511),
        ("mbpp/mbpp.jsonl.gz", "text>code", 974),
        ("gpteacher/codegen-instruct.json.gz", "instruction+input>response", 4_535),
    ],
)
def test_real_files_are_recognised(shared_data: Path, file: str, columns: str, n_rows: int) -> None:
    source = open_instructions(shared_data / file)
    assert source.id.endswith("#" + columns)
    reader = source.open()
    assert sum(1 for _ in reader) + reader.n_textless == n_rows
