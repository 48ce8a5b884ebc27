"""Rows as the text that a model reads: its chat template, or plain text.

A template puts headers around each message, and some add a system prompt of their own. The text
keeps both, since that is what a model tuned with this template reads; ``Rendered.spans`` says which
characters are the row's own, so that what all rows share need not enter an average over tokens.
"""

import logging
import os.path
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from sae_apps.selection.parts import Turn, last_assistant
from sae_core.errors import UserError

_LOG = logging.getLogger(__name__)
FORMS = ("chat", "plain")
# Stands in for a message while the template is rendered: two private-use characters, which no
# template writes by itself.
_MARK = re.compile("\ue000(\\d+)\ue001")


class InstructionRow(NamedTuple):
    """One instruction: what is asked, what is answered, and the record both come from."""

    row_id: int
    """The running number of the record, or its own integer id."""
    prompt: str
    response: str
    """Empty where the record is a text without response."""
    group: str | None = None
    """E.g. the task of a target."""
    record: dict[str, Any] = {}  # shared by all rows without one, and never written to
    """The original."""
    turns: tuple[Turn, ...] = ()
    """(role, content) of each message; empty: a user's prompt and an assistant's response."""
    joint: str = "\n"
    """What stands between prompt and response in plain text."""


class Rendered(NamedTuple):
    """The text of a row."""

    text: str
    prompt_end: int
    """Character at which the response begins; the length of the text where there is none."""
    spans: tuple[tuple[int, int], ...]
    """[start, stop) of each message within the text, in order: all but the template's own words."""
    form: str
    """``chat`` (special tokens are part of the text: add no others) or ``plain``."""


def choose_form(tokenizer: Any, form: str = "chat") -> str:
    """The form that a tokenizer can give; where ``chat`` was asked for in vain, the log says so.

    Raises:
        UserError: a form that is neither ``chat`` nor ``plain``.
    """
    if form not in FORMS:
        raise UserError(f"Expected the form 'chat' or 'plain', got {form!r}.")
    if form == "chat" and not getattr(tokenizer, "chat_template", None):
        _LOG.warning("The tokenizer has no chat template: rows are read as plain text.")
        return "plain"
    return form


def render(row: InstructionRow, tokenizer: Any | None = None, form: str = "chat") -> Rendered:
    """The text of a row: through the tokenizer's chat template, or its messages joined.

    Without tokenizer or chat template the form is plain, whatever was asked for (``choose_form``
    tells the user). Plain text joins a pair by a newline, the halves of a template by nothing and
    the messages of a conversation by newlines, without roles. In chat form a template that refuses
    a system message gets it in front of the first user message, as Gemma's makers advise.

    Args:
        row: the instruction.
        tokenizer: of transformers, for its ``apply_chat_template``.
        form: ``chat`` or ``plain``.
    Raises:
        UserError: another form, or a conversation that the chat template refuses.
    """
    if form not in FORMS:
        raise UserError(f"Expected the form 'chat' or 'plain', got {form!r}.")
    if form == "plain" or not getattr(tokenizer, "chat_template", None):
        return _plain(row)
    turns = row.turns or _as_turns(row)
    try:
        return _chat(turns, tokenizer)
    except Exception as error:  # whatever the template raises; its library is not imported here
        folded = _without_system(turns)
        if folded is None:
            raise _refused(row, turns, error) from error
    try:
        return _chat(folded, tokenizer)
    except Exception as error:
        raise _refused(row, turns, error) from error


def _refused(row: InstructionRow, turns: Sequence[Turn], error: Exception) -> UserError:
    roles = ", ".join(role for role, _ in turns)
    return UserError(
        f"Row {row.row_id}: expected messages that the chat template takes, got the roles {roles}: "
        f"{error}"
    )


def _plain(row: InstructionRow) -> Rendered:
    if row.turns:
        contents = [content for _, content in row.turns]
        joint, first = "\n", last_assistant(row.turns)
    else:
        contents = [row.prompt, row.response] if row.response else [row.prompt]
        joint, first = row.joint, 1
        if not row.prompt:  # nothing to join
            joint = ""
    text, spans = "", []
    for number, content in enumerate(contents):
        text += joint if number else ""
        spans.append((len(text), len(text) + len(content)))
        text += content
    prompt_end = spans[first][0] if first < len(spans) else len(text)
    return Rendered(text, prompt_end, tuple(spans), "plain")


def _as_turns(row: InstructionRow) -> tuple[Turn, ...]:
    answer = (("assistant", row.response),) if row.response else ()
    return (("user", row.prompt), *answer)


def _without_system(turns: Sequence[Turn]) -> tuple[Turn, ...] | None:
    """The system message put before the first user message; None where that is not the trouble."""
    if len(turns) < 2 or turns[0][0] != "system" or turns[1][0] != "user":
        return None
    return (("user", f"{turns[0][1]}\n{turns[1][1]}"), *turns[2:])


def _apply(tokenizer: Any, turns: Sequence[Turn]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _chat(turns: Sequence[Turn], tokenizer: Any) -> Rendered:
    """Render once with the messages and once with marks in their place: the marks tell where each
    message stands, also where its words occur in a header."""
    text = _apply(tokenizer, turns)
    marked = _apply(
        tokenizer, [(role, f"\ue000{number}\ue001") for number, (role, _) in enumerate(turns)]
    )
    first = last_assistant(turns)
    for contents in ([c for _, c in turns], [c.strip() for _, c in turns]):  # some templates trim
        built, spans = _fill(marked, contents)
        if built == text and len(spans) == len(turns):
            prompt_end = spans[first][0] if first < len(spans) else len(text)
            return Rendered(text, prompt_end, tuple(spans), "chat")
    return _searched(turns, tokenizer, text, first)


def _fill(marked: str, contents: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    pieces = _MARK.split(marked)
    text, spans = pieces[0], []
    for number, literal in zip(pieces[1::2], pieces[2::2], strict=True):
        content = contents[int(number)]
        spans.append((len(text), len(text) + len(content)))
        text += content + literal
    return text, spans


def _searched(turns: Sequence[Turn], tokenizer: Any, text: str, first: int) -> Rendered:
    """For templates that alter messages, e.g. drop earlier reasoning: what comes before the
    response does not depend on it, and messages are found where they stand unaltered."""
    prompt_end = len(text)
    if first < len(turns):
        other = [*turns[:first], (turns[first][0], "\ue0000\ue001"), *turns[first + 1 :]]
        before = _MARK.split(_apply(tokenizer, other))[0]
        prompt_end = len(os.path.commonprefix([before, text]))
    spans, start = [], 0
    for number, (_, content) in enumerate(turns):
        start = max(start, prompt_end) if number == first else start
        found = text.find(content.strip(), start)
        if found >= 0 and content.strip():
            start = found + len(content.strip())
            spans.append((found, start))
    return Rendered(text, prompt_end, tuple(spans), "chat")
