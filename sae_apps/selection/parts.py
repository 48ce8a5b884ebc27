"""Prompt and response out of one record, along a ``Layout``.

A conversation keeps its messages; what stands before the last assistant message is its prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sae_apps.selection.columns import MARKER, Layout, no_such_column, template_parts
from sae_core.errors import UserError
from sae_core.records import Record

Turn = tuple[str, str]
"""(role, content) of one message; the role is system, user, assistant or tool."""
ROLES = {
    **{name: "system" for name in ("system", "developer")},
    **{name: "user" for name in ("user", "human", "prompter")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "bot", "model")},
    **{name: "assistant" for name in ("bing", "bard", "function_call", "tool_call")},
    **{name: "tool" for name in ("tool", "function", "ipython", "observation")},
    **{name: "tool" for name in ("function_response", "tool_response")},
}


class Parts(NamedTuple):
    """Prompt and response of one record."""

    prompt: str
    response: str
    turns: tuple[Turn, ...] = ()
    """The messages, where the record is a conversation or has a system prompt."""
    joint: str = "\n"
    """What stands between prompt and response in plain text."""


def parts_of(record: Record, layout: Layout, place: str) -> Parts | None:
    """Prompt and response of a record; None where a text is null or all are blank.

    Raises:
        UserError: a column that is not there, a value that is no text, an unknown role.
    """
    if layout.template is not None:
        parts = _filled(record, layout.template, place)
    elif layout.messages is not None:
        turns = _turns(record, layout.messages, place)
        parts = conversation(turns) if turns else None
    else:
        parts = _pair(record, layout, place)
    if parts is None or not (parts.prompt.strip() or parts.response.strip()):
        return None
    _refuse_surrogates(parts, place)
    return parts


def _refuse_surrogates(parts: Parts, place: str) -> None:
    try:
        (parts.prompt + parts.response).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: the text holds an unpaired surrogate: {error.reason}.") from None


def _value(record: Record, name: str, place: str) -> Any:
    if name not in record:
        raise no_such_column(name, record, place)
    return record[name]


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: expected text in column {name!r}, got {type(value).__name__}.")
    return value


def _pair(record: Record, layout: Layout, place: str) -> Parts | None:
    head, *context = layout.prompt
    texts = [_value(record, head, place)]
    # what completes a prompt may be absent or null; without its head there is none
    texts += [record.get(name) or "" for name in context]
    response = _value(record, layout.response, place) if layout.response else ""
    if texts[0] is None or response is None:
        return None
    if _is_list(texts[0]) and len(texts) == 1:  # a conversation in two columns
        asked = _messages(texts[0], head, place)
        answered = (
            _messages(response, layout.response or "", place)
            if _is_list(response)
            else [("assistant", _text(response, layout.response or "", place))]
        )
        return conversation([*asked, *(answered if layout.response else [])])
    texts = [_text(value, name, place) for value, name in zip(texts, layout.prompt, strict=True)]
    prompt = "\n".join(text for text in texts if text.strip()) or texts[0]
    response = _text(response, layout.response or "", place)
    system = record.get(layout.system) if layout.system else None
    if not system:
        return Parts(prompt, response)
    system = _text(system, layout.system or "", place)
    answer = (("assistant", response),) if layout.response else ()
    return conversation((("system", system), ("user", prompt), *answer))


def conversation(turns: Sequence[Turn]) -> Parts:
    """What stands before the last assistant message is the prompt, the rest the response."""
    cut = last_assistant(turns)
    before, after = ([content for _, content in part] for part in (turns[:cut], turns[cut:]))
    return Parts("\n".join(before), "\n".join(after), tuple(turns))


def last_assistant(turns: Sequence[Turn]) -> int:
    """Index of the last assistant message; the number of messages where there is none."""
    found = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
    return found[-1] if found else len(turns)


def _turns(record: Record, name: str, place: str) -> list[Turn] | None:
    value = _value(record, name, place)
    return None if value is None else _messages(value, name, place)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _messages(value: Any, name: str, place: str) -> list[Turn]:
    if isinstance(value, Mapping):  # `datasets` may hold a list of objects as an object of lists
        keys, lengths = list(value), [len(one) if _is_list(one) else 0 for one in value.values()]
        if len(set(lengths)) != 1 or not lengths[0]:
            raise UserError(
                f"{place}: expected lists of one length in column {name!r}, got {lengths}."
            )
        value = [dict(zip(keys, one, strict=True)) for one in zip(*value.values(), strict=True)]
    if not _is_list(value):
        kind = type(value).__name__
        raise UserError(f"{place}: expected a list of messages in column {name!r}, got {kind}.")
    return [_turn(message, number, place) for number, message in enumerate(value)]


def _turn(message: Any, number: int, place: str) -> Turn:
    where = f"{place}, message {number}"
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: expected an object, got {type(message).__name__}.")
    role_key, text_key = ("role", "content") if "role" in message else ("from", "value")
    if role_key not in message:
        raise UserError(
            f"{where}: expected the keys role and content, or from and value, got "
            f"{', '.join(map(str, message)) or 'none'}."
        )
    role = ROLES.get(str(message[role_key]).lower())
    if role is None:
        names = ", ".join(ROLES)
        raise UserError(f"{where}: unknown role {message[role_key]!r}; expected one of {names}.")
    return role, _content(message.get(text_key), text_key, where)


def _content(value: Any, key: str, where: str) -> str:
    """Text of a message: a string, null (a bare tool call), or a list of parts that are text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise UserError(f"{where}: expected text under {key!r}, got {type(value).__name__}.")
    texts: list[str] = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(f"{where}: expected parts of text under {key!r}, got {kind}.")
        texts.append(text)
    return "".join(texts)


def _filled(record: Record, template: str, place: str) -> Parts | None:
    halves = ["", ""]
    side = 0
    for literal, name in template_parts(template, record, place):
        halves[side] += literal
        if name == "" or name == MARKER:
            side = 1
        if name:
            value = _value(record, name, place)
            if value is None:
                return None
            if not isinstance(value, str | int | float):
                raise _not_scalar(name, value, place)
            halves[side] += str(value)
    return Parts(halves[0], halves[1], joint="")


def _not_scalar(name: str, value: Any, place: str) -> UserError:
    kind = type(value).__name__
    return UserError(f"{place}: expected text or a number in column {name!r}, got {kind}.")
