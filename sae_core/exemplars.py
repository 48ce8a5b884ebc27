"""What a latent responds to: the texts in which it is most active, token by token."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_core.activations import HarvestConfig
from sae_core.errors import UserError
from sae_core.features import SparseFeatures
from sae_core.featurize import featurize
from sae_core.sae import SAE
from sae_core.text import TextRow

if TYPE_CHECKING:
    from sae_core.models import LanguageModel

_OWN_COLUMNS = ("row_id", "text", "n_tokens")


@dataclass(frozen=True)
class ExemplarText:
    """A stretch of a text around the token on which a latent is most active."""

    row_id: int
    meta: dict[str, str | int | float | bool]
    """Labels of the row; those it does not have are left out."""
    tokens: tuple[str, ...]
    """Readable; joined they are the text. A token that ends within a character is empty, and the
    character stands on the token that completes it."""
    acts: tuple[float, ...]
    """Activation on each token; 0 too on tokens that are not kept, such as the first."""
    start: int
    """Position of the first of these tokens in the row."""
    n_tokens: int
    """Tokens of the whole row."""


@dataclass(frozen=True)
class LatentExemplars:
    """A latent with the texts in which it is most active, the best first."""

    latent: int
    freq_rows: float
    """Fraction of rows in which it is active."""
    max_act: float
    """Largest activation on a token of these texts; 0 without texts."""
    texts: tuple[ExemplarText, ...]


def exemplars(
    lm: "LanguageModel",
    sae: SAE,
    hook_point: str,
    features: SparseFeatures,
    latents: Sequence[int],
    n_texts: int,
    config: HarvestConfig | None = None,
    *,
    window: int = 40,
) -> tuple[LatentExemplars, ...]:
    """Top texts of latents with their activations by token; only those rows run through the model.

    Args:
        features: pooled features of the rows, made by this SAE at this hook point.
        latents: columns; the answer has their order.
        n_texts: at most so many texts a latent.
        config: as it was when the features were made.
        window: tokens shown of each text, around the largest activation.
    Raises:
        UserError: the features come from another SAE or hook point or are token-level; a latent is
            out of range; window or n_texts below 1.
    """
    _check_origin(sae, hook_point, features)
    if window < 1 or n_texts < 1:
        raise UserError(f"Expected window and n_texts of at least 1, got {window} and {n_texts}.")
    top = {latent: features.top_rows(latent, n_texts)[0].tolist() for latent in latents}
    row_ids = sorted({row_id for ids in top.values() for row_id in ids})
    if not row_ids:
        return tuple(LatentExemplars(latent, 0.0, 0.0, ()) for latent in latents)
    places = features.row_index(np.array(row_ids))
    records = {r["row_id"]: r for r in features.rows.take(places).to_pylist()}
    rows = [TextRow(row_id, records[row_id]["text"], {}) for row_id in row_ids]
    strings = {row.row_id: token_strings(lm.tokenizer, row.text) for row in rows}
    by_token = featurize(
        lm, sae, rows, hook_point, pooling="none", config=config, data_id="exemplars"
    )
    source = by_token.rows["source_row_id"].to_numpy()
    position = by_token.rows["position"].to_numpy()

    def one(latent: int) -> LatentExemplars:
        tokens, values = by_token.top_rows(latent, by_token.n_rows)
        texts = []
        for row_id in top[latent]:
            mine = source[tokens] == row_id  # the row ids of token-level features count from 0
            acts = np.zeros(len(strings[row_id]))
            acts[position[tokens[mine]]] = values[mine]
            texts.append(_cropped(records[row_id], strings[row_id], acts, window))
        peak = max((max(text.acts) for text in texts), default=0.0)
        return LatentExemplars(latent, float(features.freq[latent]), peak, tuple(texts))

    return tuple(one(latent) for latent in latents)


def choose_latents(features: SparseFeatures, n: int, seed: int) -> tuple[int, ...]:
    """Latents spread over the range of frequencies, from the most to the least frequent.

    The range of log frequency of the latents that fire at all is cut into n equal parts; each
    part that holds latents gives one at random, and what is missing to n comes at random from the
    rest. Rare latents are many, so that a plain random choice would show almost nothing else.

    Args:
        n: at most so many; fewer come back where fewer fire.
        seed: the same seed gives the same choice.
    Raises:
        UserError: n is below 1.
    """
    if n < 1:
        raise UserError(f"Expected at least 1 latent to choose, got {n}.")
    rng = np.random.default_rng(seed)
    alive = np.flatnonzero(features.freq)
    if alive.size <= n:
        chosen = alive
    else:
        log_freq = np.log(features.freq[alive])
        low, high = log_freq.min(), log_freq.max()
        width = (high - low) / n or 1.0
        part = np.minimum((log_freq - low) // width, n - 1).astype(int)
        chosen = np.array([rng.choice(alive[part == p]) for p in np.unique(part)])
        rest = np.setdiff1d(alive, chosen)
        more = rng.choice(rest, size=n - chosen.size, replace=False)
        chosen = np.concatenate([chosen, more])
    order = np.lexsort((chosen, -features.freq[chosen]))
    return tuple(int(latent) for latent in chosen[order])


def token_strings(tokenizer: Any, text: str) -> tuple[str, ...]:
    """The tokens of a text as readable strings, whatever the tokenizer calls them.

    Byte-level BPE writes bytes as printable stand-ins (a space is ``Ġ``), SentencePiece writes a
    space as ``▁`` and odd bytes as ``<0x0A>``. A character that is cut into several tokens appears
    on the last of them; bytes that are no character appear as U+FFFD.
    """
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    probe = tokenizer.convert_ids_to_tokens(tokenizer("a a")["input_ids"])
    is_byte_level = any("Ġ" in token for token in probe)
    added = tokenizer.added_tokens_decoder
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    strings = []
    for number, (token_id, name) in enumerate(
        zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    ):
        if token_id in added and not _is_byte_name(name):
            raw = str(added[token_id].content).encode()
        else:
            raw = _token_bytes(name, is_byte_level)
        strings.append(decoder.decode(raw, final=number == len(ids) - 1))
    return tuple(strings)


def _is_byte_name(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


def _token_bytes(name: str, is_byte_level: bool) -> bytes:
    if is_byte_level and all(char in _byte_of() for char in name):
        return bytes(_byte_of()[char] for char in name)
    if _is_byte_name(name):
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()


@cache
def _byte_of() -> dict[str, int]:
    """The byte behind each stand-in of byte-level BPE (GPT-2's ``bytes_to_unicode``, inverted)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def _cropped(
    record: dict[str, Any], tokens: tuple[str, ...], acts: np.ndarray, window: int
) -> ExemplarText:
    """At most ``window`` tokens, the largest activation as near their middle as can be."""
    start = max(0, min(int(acts.argmax()) - window // 2, len(tokens) - window))
    stop = start + window
    return ExemplarText(
        row_id=record["row_id"],
        meta={k: v for k, v in record.items() if k not in _OWN_COLUMNS and v is not None},
        tokens=tokens[start:stop],
        acts=tuple(acts[start:stop].tolist()),
        start=start,
        n_tokens=len(tokens),
    )


def _check_origin(sae: SAE, hook_point: str, features: SparseFeatures) -> None:
    if "text" not in features.rows.column_names:
        raise UserError(
            "Expected features pooled to rows, with a column text, got the columns "
            f"{features.rows.column_names}."
        )
    for what, made, given in (
        ("the SAE", features.provenance.sae_hash, sae.hash()),
        ("the hook point", features.provenance.hook_point, hook_point),
    ):
        if made != given:
            raise UserError(f"Expected {what} that made the features, {made}, got {given}.")
