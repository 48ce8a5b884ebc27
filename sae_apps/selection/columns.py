"""Which columns of a record are its prompt and its response.

Conventions of instruction data that are recognised without being named: chat messages
(``messages`` with role/content; ShareGPT's ``conversations`` with from/value), pairs of columns
such as instruction + input / output or question / answer, and one column of plain text.
"""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from sae_core.errors import UserError
from sae_core.records import Record

CHAT_NAMES = ("messages", "conversations", "conversation")
PROMPT_NAMES = (
    *("instruction", "prompt", "question", "query", "problem"),
    *("input", "inputs", "source", "user"),
)
CONTEXT_NAMES = ("input", "inputs", "context", "system_prompt", "system")
"""Beside a prompt column these belong to the prompt; a system prompt stands before it."""
RESPONSE_NAMES = (
    *("output", "outputs", "response", "completion", "answer", "target", "targets"),
    *("solution", "assistant"),
)
ORIGIN_NAMES = ("source", "user")
"""Prompts where no other column is one; beside another they say where a row comes from."""
MARKER = "response"


@dataclass(frozen=True)
class Layout:
    """Where prompt and response stand. One of ``messages``, ``prompt``, ``template`` is set."""

    messages: str | None = None
    """Column with the list of messages."""
    prompt: tuple[str, ...] = ()
    """Columns of the prompt, joined by a newline; blank ones are left out."""
    response: str | None = None
    """Column of the response; None: the text has none."""
    template: str | None = None
    """Format string with {column}; the response begins at {response}."""
    system: str | None = None
    """Column of the system prompt."""

    @property
    def label(self) -> str:
        """The layout in a few characters, for the id of the data."""
        if self.template is not None:
            return f"template@{hashlib.sha256(self.template.encode()).hexdigest()[:12]}"
        if self.messages is not None:
            return self.messages
        head = "+".join([*([self.system] if self.system else []), *self.prompt])
        return f"{head}>{self.response}" if self.response else head


def no_such_column(name: str, record: Mapping[str, Any], where: str) -> UserError:
    """The error for a column that is not there, with the nearest that are."""
    columns = [str(one) for one in record]
    near = difflib.get_close_matches(name, columns, n=3, cutoff=0.6)
    nearest = f" (nearest: {', '.join(near)})" if near else ""
    have = ", ".join(columns) or "none"
    return UserError(f"{where} has no column {name!r}{nearest}; its columns are: {have}.")


def choose_layout(
    record: Record,
    where: str,
    *,
    prompt: str | Sequence[str] | None = None,
    response: str | None = None,
    messages: str | None = None,
    template: str | None = None,
) -> Layout:
    """The layout asked for, or the one that the names of the record's columns tell.

    Args:
        record: the first of the data.
        where: the data's name, for messages.
        prompt, response, messages, template: as for ``open_instructions``; naming any of them
            switches the detection off.
    Raises:
        UserError: a column that is not there, arguments that exclude each other, a template that
            cannot be read, or names that fit several layouts or none (with the names found).
    """
    given = {"messages": messages, "prompt": prompt, "template": template}
    named = [key for key, value in given.items() if value is not None]
    if len(named) > 1 or (response is not None and named != ["prompt"]):
        extra = ["response"] if response is not None else []
        raise UserError(
            f"{where}: expected messages, or template, or prompt with or without response, got "
            f"{' and '.join([*named, *extra])}."
        )
    if template is not None:
        layout = Layout(template=template)
    elif messages is not None:
        layout = Layout(messages=messages)
    elif prompt is not None:
        columns = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        layout = Layout(prompt=columns, response=response)
    else:
        return _detected(record, where)
    for name in columns_of(layout, record, where):
        if name not in record:
            raise no_such_column(name, record, where)
    return layout


def columns_of(layout: Layout, record: Mapping[str, Any], where: str) -> list[str]:
    """The columns that a layout reads from a record."""
    if layout.template is not None:
        return [name for _, name in template_parts(layout.template, record, where) if name]
    single = (layout.system, layout.messages, *layout.prompt, layout.response)
    return [name for name in single if name]


def _detected(record: Record, where: str) -> Layout:
    chats = [name for name in CHAT_NAMES if _is_chat(record.get(name))]
    if len(chats) > 1:
        raise _ambiguous(where, "columns of messages", chats, "messages")
    if chats:
        return Layout(messages=chats[0])
    prompts = [name for name in PROMPT_NAMES if name in record]
    responses = [name for name in RESPONSE_NAMES if name in record]
    if "text" in record and "code" in record and not prompts and not responses:
        return Layout(prompt=("text",), response="code")
    contexts = [name for name in CONTEXT_NAMES if name in record]
    heads = [name for name in prompts if name not in contexts]
    if len(heads) > 1:
        heads = [name for name in heads if name not in ORIGIN_NAMES]
    if not heads:  # `input` alone is the prompt; beside `instruction` it is the context
        heads = [name for name in prompts if name in contexts][:1]
        contexts = [name for name in contexts if name not in heads]
    if prompts and responses:
        if len(heads) > 1:
            raise _ambiguous(where, "columns of prompts", heads, "prompt")
        if len(responses) > 1:
            raise _ambiguous(where, "columns of responses", responses, "prompt and response")
        systems = [name for name in contexts if name.startswith("system")]
        behind = [name for name in contexts if name not in systems]
        if len(systems) > 1 or len(behind) > 1:
            raise _ambiguous(where, "columns of context", contexts, "prompt and response")
        return Layout(
            prompt=(*heads, *behind), response=responses[0], system=systems[0] if systems else None
        )
    strings = [key for key, value in record.items() if isinstance(value, str)]
    if "text" in record:
        return Layout(prompt=("text",))
    if len(strings) == 1:
        return Layout(prompt=(strings[0],))
    raise UserError(
        f"{where}: expected chat messages, a prompt and a response, or one column of text, got "
        f"the columns {', '.join(map(str, record)) or 'none'}: name the prompt and the response."
    )


def _ambiguous(where: str, what: str, names: Sequence[str], ask: str) -> UserError:
    return UserError(f"{where} has several {what}: {', '.join(names)}; name {ask}.")


def _is_chat(value: Any) -> bool:
    if isinstance(value, Mapping):  # `datasets` may hold a list of objects as an object of lists
        return bool({"role", "from"} & set(value))
    return isinstance(value, Sequence) and all(isinstance(one, Mapping) for one in value)


def template_parts(
    template: str, record: Mapping[str, Any], where: str
) -> list[tuple[str, str | None]]:
    """(literal text, column behind it) pairs of a template; ``""`` is the bare marker.

    Raises:
        UserError: unbalanced braces, {}, or more than a column's name within braces.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"Cannot read the template {template!r}: {error}.") from error
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parsed:
        if name == "" or spec or conversion:
            raise UserError(
                f"The template {template!r} must hold bare names of columns in its braces, got "
                f"{{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}."
            )
        parts.append((literal, "" if name == MARKER and name not in record else name))
    if not any(name for _, name in parts):
        raise UserError(f"{where}: expected {{column}} in the template, got {template!r}.")
    return parts
