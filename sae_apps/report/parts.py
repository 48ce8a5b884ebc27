"""What parts.html.j2 shows in several sections: latents by name, numbers that line up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_apps.report.formats import DASH, finite, required

N_TOKENS = 6


@dataclass(frozen=True)
class LatentName:
    """A latent, for the macro of parts.html.j2."""

    number: int
    anchor: str | None
    """Id of its card, None where the page has none."""
    tokens: Sequence[str]


def latent_anchors(cards: Sequence[Any]) -> dict[int, str]:
    """latent -> id of its card in ``latents_section(cards)``; the first card where it has two.

    Raises:
        UserError: a card without its latent.
    """
    found: dict[int, str] = {}
    for i, card in enumerate(cards, 1):
        found.setdefault(int(required(card, "latent")), f"latents-{i}")
    return found


def latent_name(latent: int, anchors: Mapping[int, str], tokens: Sequence[str] = ()) -> LatentName:
    """The first ``N_TOKENS`` tokens, and the anchor where there is one."""
    return LatentName(int(latent), anchors.get(int(latent)), tuple(tokens)[:N_TOKENS])


def fixed(value: Any, places: int = 3) -> str:
    """A number between -1 and 1 with ``places`` decimals, so that a column of them lines up."""
    found = finite(value)
    return DASH if found is None else f"{found:.{places}f}".replace("-", "\N{MINUS SIGN}")
