"""How far apart the values of units are under different concepts, by kind of unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_apps.report.formats import DASH, finite, lookup, number, required, short
from sae_apps.report.page import Section, render
from sae_apps.report.parts import fixed, latent_name

LATENTS = "latents"
TITLES = {LATENTS: "SAE latents", "residual": "Residual dimensions", "neurons": "MLP neurons"}
N_LEADING = 10
TINY = 1e-6  # the tails were checked down to 1e-4 only, see sae_apps.suppression.separability


@dataclass(frozen=True)
class ConceptSet:
    """Labelled texts, and what was measured on them."""

    name: str
    texts: Mapping[str, int]
    """Concept -> texts of it."""
    kinds: Mapping[str, Mapping[str, Any]]
    """latents, residual, neurons -> record of ``SeparabilityTable.summary`` (units, live,
    raw_live, debiased_live, debiased_top50, best, passing, alpha) with ``polysemanticity`` (q,
    overlap, chance, shared) and ``leading`` (rows of the table, best first), as in summary.json."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Concept -> tokens of it."""


@dataclass(frozen=True)
class SeparabilityView:
    """What the section shows."""

    sets: Sequence[ConceptSet]
    permutations: int
    """Label permutations behind the debiased score and the p-values."""
    correction: str = "Benjamini-Hochberg"
    """Of the p-values, over the live units of a kind."""
    words: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """Latent -> tokens on which it fires most, for some."""
    anchors: Mapping[int, str] = field(default_factory=dict)
    """Latent -> id of its card on this page."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Name and sentence."""


def separability_section(view: SeparabilityView) -> Section:
    """A table of kinds by concept set with bars, and the most separable units of each set.

    Raises:
        UserError: a record of a kind or of a unit lacks a field.
    """
    sets = [_set(one, view) for one in view.sets]
    html = render(
        "separability.html.j2",
        sets=sets,
        permutations=view.permutations,
        correction=view.correction,
        alpha=_alpha(view),
        facts=view.facts,
    )
    return Section("separability", "Separability", html)


def _alpha(view: SeparabilityView) -> str:
    """The levels of all kinds as text; as a rule it is one."""
    found = [required(kind, "alpha") for one in view.sets for kind in one.kinds.values()]
    return " or ".join(f"{alpha:g}" for alpha in dict.fromkeys(found)) or DASH


def _set(one: ConceptSet, view: SeparabilityView) -> dict[str, Any]:
    leading = LATENTS if LATENTS in one.kinds else next(iter(one.kinds), None)
    rows = [] if leading is None else list(lookup(one.kinds[leading], "leading") or ())[:N_LEADING]
    units = [_unit(row, leading == LATENTS, view) for row in rows]
    return {
        "name": one.name,
        "classes": [
            {"name": name, "texts": n, "tokens": one.tokens.get(name)}
            for name, n in one.texts.items()
        ],
        "kinds": [_kind(name, record) for name, record in one.kinds.items()],
        "leading": None if leading is None else TITLES.get(leading, leading),
        "units": units,
        "has_words": any(unit["words"] for unit in units),
    }


def _kind(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    units, live, passing = (int(required(record, key)) for key in ("units", "live", "passing"))
    shared = lookup(record, "polysemanticity") or {}
    best = finite(required(record, "debiased_top50"))
    return {
        "name": TITLES.get(name, name),
        "units": units,
        "live": live,
        "mean": fixed(required(record, "debiased_live")) if live else None,
        "top": fixed(best),
        "width": min(1.0, max(0.0, best or 0.0)),
        "best": fixed(required(record, "best")),
        "passing": passing / live if live else None,
        "overlap": lookup(shared, "overlap"),
        "chance": lookup(shared, "chance"),
    }


def _unit(row: Mapping[str, Any], is_latent: bool, view: SeparabilityView) -> dict[str, Any]:
    unit = int(required(row, "unit"))
    name = latent_name(unit, view.anchors, view.words.get(unit, ())) if is_latent else None
    return {
        "latent": name,
        "unit": unit,
        "words": name.tokens if name else (),
        "debiased": fixed(required(row, "debiased")),
        "raw": fixed(required(row, "raw")),
        "width": min(1.0, max(0.0, finite(required(row, "debiased")) or 0.0)),
        **{name: required(row, name) for name in ("concept", "rate")},
        **{name: small(required(row, name)) for name in ("p", "q")},
    }


def small(p: Any) -> str:
    """A p-value; below ``TINY`` only that, since a fitted tail says no more there."""
    value = finite(p)
    return f"< {short(TINY)}" if value is not None and value < TINY else number(value, 2)
