"""Cards of single latents: how often they fire, and the texts on which they fire most."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sae_apps.report.formats import clean, finite, lookup, number, percent, required
from sae_apps.report.page import Section, render
from sae_core.errors import UserError

N_OPEN_TEXTS = 3
TOKENS_BEFORE, TOKENS_AFTER = 48, 32  # shown around the strongest token; more buries it


def latents_section(cards: Sequence[Any], *, label: str = "domain") -> Section:
    """One card per latent, with a filter and an order that need no server and no script to read.

    Args:
        cards: LatentExemplars or mappings with latent (its number), max_act, texts (row_id, meta,
            tokens, acts; start and n_tokens where the text is a part of its row) and freq
            [fraction of tokens] or freq_rows [fraction of rows]; optionally taf, the ceiling that
            was asked for [fraction of tokens], and ``shares``, a mapping from domain to the share
            of the latent's activation.
        label: the field of meta that is shown as a chip.
    Raises:
        UserError: a field is absent, or a text has not as many acts as tokens.
    """
    html = render("latents.html.j2", cards=[_card(card, label) for card in cards], n=len(cards))
    return Section("latents", "Latents", html)


def highlight(tokens: Sequence[str], acts: Sequence[float], top: float) -> Markup:
    """Tokens in reading order, each that fires marked with the opacity act / top.

    Args:
        tokens: decoded pieces, whitespace included; acts: one activation each, 0 where silent.
        top: the activation that is drawn at full strength.
    """
    parts = []
    for token, act in zip(tokens, acts, strict=True):
        value = finite(act) or 0.0
        if value <= 0:
            parts.append(Markup.escape(clean(token)))
            continue
        share = min(1.0, value / top) if top > 0 else 1.0
        parts.append(
            Markup('<mark style="--a:{:.2f}" title="{}">{}</mark>').format(
                share, number(value), clean(token)
            )
        )
    return Markup("").join(parts)


def _card(card: Any, label: str) -> dict[str, Any]:
    texts = [_read_text(text, label, required(card, "max_act")) for text in required(card, "texts")]
    per_token = finite(lookup(card, "freq"))
    per_row = finite(lookup(card, "freq_rows"))
    freq, unit = (per_token, "tokens") if per_token is not None else (per_row, "rows")
    return {
        "latent": int(required(card, "latent")),
        "freq": freq,
        "unit": unit,
        "taf": finite(lookup(card, "taf")),
        "max_act": finite(required(card, "max_act")),
        "shares": _shares(lookup(card, "shares")),
        "open": texts[:N_OPEN_TEXTS],
        "folded": texts[N_OPEN_TEXTS:],
    }


def _read_text(text: Any, label: str, max_act: Any) -> dict[str, Any]:
    tokens = [str(token) for token in required(text, "tokens")]
    acts = [finite(act) or 0.0 for act in required(text, "acts")]
    if len(tokens) != len(acts):
        raise UserError(
            f"Row {required(text, 'row_id')}: expected as many activations as tokens, "
            f"got {len(acts)} activations and {len(tokens)} tokens."
        )
    peak = max(range(len(acts)), key=acts.__getitem__, default=0)
    first, last = max(0, peak - TOKENS_BEFORE), min(len(tokens), peak + TOKENS_AFTER + 1)
    start = lookup(text, "start", 0)
    top = finite(max_act) or max(acts, default=0.0)
    chip = (lookup(text, "meta") or {}).get(label)
    return {
        "row_id": required(text, "row_id"),
        "chip": None if chip is None or chip == "" else chip,
        "peak": number(acts[peak]) if acts else None,
        "html": highlight(tokens[first:last], acts[first:last], top),
        "is_cut_before": start + first > 0,
        "is_cut_after": start + last < lookup(text, "n_tokens", start + len(tokens)),
    }


def _shares(shares: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """Largest first; an undefined share is left out of the bar but keeps its dash in the text."""
    known = sorted((shares or {}).items(), key=lambda item: -(finite(item[1]) or 0.0))
    return [
        {"name": name, "text": percent(value, 2), "width": min(1.0, max(0.0, finite(value) or 0.0))}
        for name, value in known
    ]
