"""Whether latents are found again by runs with other seeds, and which of them to rely on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from sae_apps.report.charts import Series, line_chart
from sae_apps.report.distribution import histogram
from sae_apps.report.formats import number, percent, required
from sae_apps.report.overview import Fact
from sae_apps.report.page import Section, render
from sae_apps.report.parts import fixed, latent_name
from sae_apps.report.verdicts import FLAGS, THRESHOLDS, LatentVerdicts, as_floats, group_rows

NOTES = {
    "reliable": "{share} of the {n} alive latents: a chance of at least 80% to be a feature.",
    "doubtful": "{share}: between 20% and 80%.",
    "unreliable": "{share}: below 20%, or too rare to tell.",
}
STEPS = [round(0.02 * i, 2) for i in range(51)]
N_LINES = 3  # beside the one of random directions
N_EXTREMES = 5


@dataclass(frozen=True)
class RunPair:
    """How far the latents of one run are found again in another; see ``Agreement``."""

    a: str
    """Name of the run whose latents are looked for."""
    b: str
    """Name of the run in which they are looked for."""
    pw_mcc: float
    """Mean cosine of the best one-to-one matching of the alive latents."""
    mcs: Sequence[float]
    """Largest cosine of each alive latent of a with the alive latents of b."""
    n_alive_b: int
    """Alive latents of b, which sets where chance is."""
    gap: float = 0.0
    """The exact PW-MCC lies in [pw_mcc, pw_mcc + gap]."""


@dataclass(frozen=True)
class IdentifiabilityView:
    """What the section shows."""

    runs: Sequence[str]
    """Names of the runs; the first is the one that is judged."""
    latents: LatentVerdicts
    d_in: int
    """Width of the activations, which sets where chance is."""
    n_tokens: int
    """On which the conditions were measured."""
    pairs: Sequence[RunPair] = ()
    """None for one run."""
    causes: Mapping[str, int] = field(default_factory=dict)
    """Cause -> number of latents, dead ones included, that are not reliable because of it."""
    conditions: Sequence[Mapping[str, Any]] = ()
    """Records of ``theory.Condition``: name, measured, low, high, holds, met_frac, note."""
    anchors: Mapping[int, str] = field(default_factory=dict)
    """Latent -> id of its card on this page."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Name and sentence."""


def identifiability_section(view: IdentifiabilityView) -> Section:
    """Agreement of runs as a curve, by frequency and by latent; verdicts; the theory's conditions.

    Raises:
        UserError: a condition lacks a field.
    """
    latents = view.latents
    alive = as_floats(latents.freq) > 0
    agree = latents.consistency
    lines = [] if agree is None else histogram({"latents": as_floats(agree)[alive].tolist()})
    html = render(
        "identifiability.html.j2",
        runs=view.runs,
        n_tokens=view.n_tokens,
        headline=_headline(view, alive),
        curve=_curve(view),
        pairs=[_pair_row(one, view.d_in) for one in view.pairs],
        groups=group_rows(latents),
        has_agreement=agree is not None,
        thresholds=[f"{t:g}" for t in THRESHOLDS],
        causes=sorted(((n, cause) for cause, n in view.causes.items() if n), reverse=True),
        spread=_spread(lines) if lines else None,
        extremes=_extremes(view, alive),
        conditions=[_condition(one) for one in view.conditions],
        facts=view.facts,
    )
    return Section("identifiability", "Identifiability", html)


def _headline(view: IdentifiabilityView, alive: np.ndarray) -> list[Fact]:
    n = int(alive.sum())
    flags = np.asarray(view.latents.flag)[alive]
    counts = {name: int((flags == name).sum()) for name in FLAGS}
    facts = [
        Fact(f"{name.capitalize()} latents", number(counts[name]), NOTES[name].format(
            share=percent(counts[name] / n if n else None, 2), n=number(n)))
        for name in FLAGS
    ]  # fmt: skip
    mean = float(np.mean([one.pw_mcc for one in view.pairs])) if view.pairs else None
    note = "Mean cosine of latents matched one to one, over all pairs of runs. 1: the same latents."
    note = note if view.pairs else "No runs were compared."
    return [Fact("Agreement of runs (PW-MCC)", fixed(mean), note), *facts]


def random_shares(d: int, m: int, thresholds: Sequence[float]) -> list[float]:
    """Chance that the largest cosine with m random directions in R^d exceeds each threshold.

    One cosine exceeds t >= 0 with probability I_{1 - t^2}((d - 1) / 2, 1 / 2) / 2, the largest of m
    with 1 - (1 - that)^m.
    """
    from scipy.special import betainc

    t = np.asarray(thresholds, dtype=np.float64)
    one = 0.5 * (betainc((d - 1) / 2, 0.5, 1 - t**2) if d > 1 else (t < 1))
    return (-np.expm1(m * np.log1p(-one))).tolist()


def _curve(view: IdentifiabilityView) -> dict[str, Any] | None:
    """Share of latents found again by threshold, of at most three pairs, and of random directions.

    Of more pairs those with the lowest, the median and the highest PW-MCC are drawn.
    """
    if not view.pairs:
        return None
    ranked = sorted(view.pairs, key=lambda one: one.pw_mcc)
    drawn = list(view.pairs)
    if len(ranked) > N_LINES:
        drawn = [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
    lines = []
    for one in drawn:
        mcs = as_floats(one.mcs)
        y = [float((mcs > t).mean()) if len(mcs) else math.nan for t in STEPS]
        lines.append(Series(f"{one.a} in {one.b}", STEPS, y))
    chance = random_shares(view.d_in, drawn[0].n_alive_b, STEPS)
    lines.append(Series("random directions", STEPS, chance))
    note = "Drawn are the pairs of lowest, median and highest PW-MCC; the table has all."
    desc = "Share of the alive latents of a run whose best match in another has a larger cosine."
    svg = line_chart(
        lines,
        title="Latents found again, by the cosine that is asked for",
        desc=desc,
        x_label="cosine with the best match",
        y_label="share of latents above it",
        y_floor=0.0,
        show_y=percent,
    )
    note = note if len(ranked) > N_LINES else ""
    return {"svg": svg, "names": [one.name for one in lines], "note": note}


def _pair_row(pair: RunPair, d_in: int) -> dict[str, Any]:
    from sae_core.identifiability import chance_mcs

    mcs = as_floats(pair.mcs)
    low, high = fixed(pair.pw_mcc), fixed(pair.pw_mcc + pair.gap)
    return {
        "name": f"{pair.a} in {pair.b}",
        "n": len(mcs),
        "pw_mcc": low if low == high else f"{low} to {high}",
        "mean": fixed(mcs.mean()) if len(mcs) else None,
        "chance": fixed(chance_mcs(d_in, pair.n_alive_b)) if pair.n_alive_b else None,
        "shares": [float((mcs > t).mean()) if len(mcs) else None for t in THRESHOLDS],
    }


def _spread(lines: list[Series]) -> Markup:
    return line_chart(
        lines,
        title="Consistency of the alive latents",
        desc="Share of the alive latents in each of 30 equal steps of consistency.",
        x_label="consistency",
        y_label="share of latents",
        y_floor=0.0,
        show_y=percent,
    )


def _extremes(view: IdentifiabilityView, alive: np.ndarray) -> list[dict[str, Any]]:
    """The alive latents of the largest and of the smallest consistency, or score of one run."""
    latents = view.latents
    is_agreement = latents.consistency is not None
    values = as_floats(latents.score if latents.consistency is None else latents.consistency)
    places = np.flatnonzero(alive & np.isfinite(values))
    order = places[np.argsort(-values[places], kind="stable")]
    if not len(order):
        return []
    n = min(N_EXTREMES, max(1, len(order) // 2))  # no latent in both lists
    word = "consistent" if is_agreement else "trusted"
    lists = {f"Most {word}": order[:n], f"Least {word}": order[::-1][:n]}
    return [
        {"title": title, "word": "consistency" if is_agreement else "score",
         "latents": [_latent(int(j), float(values[j]), view) for j in chosen]}
        for title, chosen in lists.items()
    ]  # fmt: skip


def _latent(j: int, value: float, view: IdentifiabilityView) -> dict[str, Any]:
    latents = view.latents
    return {
        "latent": latent_name(j, view.anchors, latents.tokens.get(j, ())),
        "value": fixed(value),
        "freq": latents.freq[j],
        "flag": latents.flag[j],
        "reason": latents.reasons.get(j, "") if latents.flag[j] != FLAGS[0] else "",
    }


def _condition(record: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: required(record, name) for name in ("name", "measured", "low", "high", "note")}
    holds = {True: "yes", False: "no", None: "cannot say"}[required(record, "holds")]
    return flat | {"holds": holds, "met": required(record, "met_frac")}
