"""Names of places as prompts, and which of their tokens are read.

The published procedure (De Sabbata, Mizzaro and Roitero, arXiv 2505.03368) reads "{name}, {admin}"
and averages over all tokens, BOS included: the label is in the prompt, and the BOS, the same for
every place, adds a term in 1 / T to every unit. The default here names no label and reads the last
token of the name alone.

The first token of a text is an attention sink: in SmolLM2-135M behind block 15 its norm is about
24,000 where others have 200, and it is the same whatever the token. So something must stand before
the name: a carrier sentence, or a BOS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sae_core.errors import UserError
from sae_core.tokenised import TokenisedRow

if TYPE_CHECKING:
    from sae_apps.geospatial.places import Places

TOKENS = ("name", "all")
PLACE_POOLINGS = ("last", "mean", "max")
SPACES = ("features", "activations")


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Literal text and the field behind it, ``{{`` and ``}}`` resolved."""
    try:
        parts = [(text, field, spec, how) for text, field, spec, how in Formatter().parse(template)]
    except ValueError as error:
        raise UserError(
            f"Expected a template such as '{{name}}', got {template!r}: {error}."
        ) from (error)
    for _, field, spec, how in parts:
        if field == "" or spec or how:
            raise UserError(f"Expected plain fields such as {{name}}, got {template!r}.")
    return [(text, field) for text, field, _, _ in parts]


@dataclass(frozen=True)
class ProbeConfig:
    """How a place becomes one vector. The defaults are the careful procedure."""

    template: str = "The city of {name}"
    """``{name}`` once, and any column of the places: ``{admin}``, ``{country}``, ``{label}``."""
    tokens: str = "name"
    """What is pooled: the tokens of the name, or all tokens of the prompt."""
    pooling: str = "last"
    """last, mean or max over those tokens."""
    pool_in: str = "features"
    """Whether codes of tokens are pooled, or activations, which are then encoded, as published."""
    bos: bool = False
    """Whether a BOS is put in front where the tokenizer adds none of its own."""
    pool_bos: bool = False
    """Whether the BOS is pooled too, as published."""
    shuffle_seed: int | None = None
    """A control: permute the tokens of every name with this seed; None leaves them in order."""
    batch_tokens: int = 4096
    """Tokens a forward pass at most."""

    def __post_init__(self) -> None:
        for name, known in (
            ("tokens", TOKENS),
            ("pooling", PLACE_POOLINGS),
            ("pool_in", SPACES),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"Expected {name} to be one of {known}, got {getattr(self, name)!r}."
                )
        if self.batch_tokens < 1:
            raise UserError(f"Expected batch_tokens of at least 1, got {self.batch_tokens}.")
        names = [field for _, field in _parse(self.template) if field is not None]
        if names.count("name") != 1:
            raise UserError(
                f"Expected {{name}} once in the template, got {names.count('name')} times in "
                f"{self.template!r}."
            )
        if self.pool_bos and self.tokens != "all":
            raise UserError(f"Expected tokens 'all' with pool_bos, got {self.tokens!r}.")

    def describe(self) -> str:
        """One line that names every setting a vector depends on."""
        bos = "BOS pooled" if self.pool_bos else "BOS put in front" if self.bos else "no BOS added"
        shuffled = "" if self.shuffle_seed is None else f", tokens shuffled ({self.shuffle_seed})"
        where = f"{self.pooling} of {self.tokens} tokens in {self.pool_in}"
        return f"{self.template!r}, {where}, {bos}{shuffled}"


PRESETS = {
    "careful": ProbeConfig(),
    # what the model is about to say of the place, read where it begins to say it
    "question": ProbeConfig("The city of {name} is located in", tokens="all"),
    "published": ProbeConfig(
        "{name}, {label}", "all", "mean", pool_in="activations", bos=True, pool_bos=True
    ),
}


class PlacePrompts(NamedTuple):
    """Prompts of places, in the order of the places."""

    texts: list[str]
    """What is read, without the BOS."""
    rows: list[TokenisedRow]
    """Tokens, and which of them are pooled."""
    n_tokens: Int[np.ndarray, " n"]
    """Tokens of the name alone, [n] int32."""


def place_prompts(tokenizer: Any, places: "Places", config: ProbeConfig) -> PlacePrompts:
    """The prompts of places as tokens, with the tokens that are pooled marked.

    A token counts as one of the name where it shares a character with it, so each part of a
    character that byte-level BPE cuts up belongs to it, and so does a leading space's token.

    Args:
        tokenizer: a fast one of transformers, which tells the characters of each token.
        places: n places; the columns that the template names must hold no null.
        config: template and tokens.
    Raises:
        UserError: a tokenizer without offsets or, where one is asked for, without a BOS; a column
            that is not there or is null; a name whose only token would be the first of the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "Expected a fast tokenizer, which tells the characters of each token, "
            f"got {type(tokenizer).__name__}."
        )
    texts, spans = _render(places, config.template)
    encoded = tokenizer(
        texts, return_offsets_mapping=True, truncation=False, padding=False,
        return_attention_mask=False, return_token_type_ids=False, verbose=False,
    )  # fmt: skip
    bos = _bos(tokenizer, config)
    rows, n_tokens = [], np.zeros(len(texts), dtype=np.int32)
    for i, (ids, offsets) in enumerate(
        zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ):
        ids = np.asarray(ids, dtype=np.int64)
        offsets = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        if bos is not None and not (len(ids) and ids[0] == bos):
            ids, offsets = np.insert(ids, 0, bos), np.vstack([[[0, 0]], offsets])
        named = _touches(offsets, spans[i])
        keep = named if config.tokens == "name" else offsets[:, 1] > offsets[:, 0]
        keep = keep.copy()
        keep[0] = config.pool_bos
        if not keep.any() or (config.tokens == "name" and named[0]):
            raise UserError(
                f"Expected something before the name in the template, got {config.template!r}: "
                f"the first token of {texts[i]!r} (row_id {places.row_id[i]}) would be an "
                "attention sink."
            )
        if config.shuffle_seed is not None:
            ids = _shuffled(ids, named, config.shuffle_seed, int(places.row_id[i]))
        rows.append(TokenisedRow(ids, keep))
        n_tokens[i] = named.sum()
    return PlacePrompts(texts, rows, n_tokens)


def _render(places: "Places", template: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The text of each place, and [start, stop) of the name in it."""
    parts = _parse(template)
    columns = {field: _column(places, field) for _, field in parts if field is not None}
    texts, spans = [], []
    for i in range(places.n):
        text, span = "", (0, 0)
        for literal, field in parts:
            text += literal
            if field is not None:
                value = str(columns[field][i])
                span = (len(text), len(text) + len(value)) if field == "name" else span
                text += value
        texts.append(text)
        spans.append(span)
    return texts, spans


def _column(places: "Places", field: str) -> Sequence[Any]:
    known = places.table.column_names
    if field != "label" and field not in known:
        raise UserError(
            f"Expected a template with columns of the places, label or {', '.join(known)}, "
            f"got {{{field}}}."
        )
    values = list(places.label) if field == "label" else places.column(field)
    for i, value in enumerate(values):
        if value is None:
            raise UserError(
                f"Expected a value of {field} for every place, because the template names it, got "
                f"none for {places.name[i]!r} (row_id {places.row_id[i]})."
            )
    return values


def _bos(tokenizer: Any, config: ProbeConfig) -> int | None:
    """The id to put in front; None where none is asked for or the tokenizer does it itself."""
    if not config.bos:
        return None
    if tokenizer.bos_token_id is None:
        raise UserError(
            f"Expected a tokenizer with a BOS token, got {type(tokenizer).__name__} without one: "
            "use bos=False and a template with something before the name."
        )
    return int(tokenizer.bos_token_id)


def _touches(offsets: Int[np.ndarray, "t 2"], span: tuple[int, int]) -> Any:
    """Tokens that share a character with the span, [t] bool."""
    return np.maximum(offsets[:, 0], span[0]) < np.minimum(offsets[:, 1], span[1])


def _shuffled(
    ids: Int[np.ndarray, " t"], named: Any, seed: int, row_id: int
) -> Int[np.ndarray, " t"]:
    """The same tokens, those of the name permuted; a place's permutation is its own."""
    rng = np.random.default_rng([seed, row_id % 2**63])
    ids = ids.copy()
    ids[named] = rng.permutation(ids[named])
    return ids
