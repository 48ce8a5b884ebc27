"""What ``sae-apps geo`` says: the numbers of a test of places, and an estimate before it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .common import plain, size
from .inspect import printable
from .progress import duration

if TYPE_CHECKING:
    from sae_core.features import SparseFeatures

    from .geo_plan import Asked, Plan
    from .geo_run import Result

KINDS = {"features": "SAE latents"}
NULLS = {
    "free": "free",
    "within": "within labels",
    "after": "after covariates",
    "beyond": "beyond labels",
}
SURVIVES = "first three"
SHOWN_PLACES = 4
PROBE_PLACES = 64
BASE_BYTES = 500 * 2**20  # the interpreter with torch and transformers loaded


def summarise(plan: "Plan", features: "SparseFeatures", result: "Result") -> dict[str, Any]:
    """The numbers of a result, as JSON types."""
    report, test = result.report, plan.asked.test
    index = {row["feature"]: row for row in result.table.table.to_pylist()}
    # of the report the latents are the first set, a row each in their order
    table = report.table.to_pylist()
    facts = {
        "method": plan.asked.method,
        "places": {
            "n": plan.places.n,
            "source": plan.places.source,
            "n_labels": len(set(plan.labels) - {None}),
        },
        "prompt": plan.asked.probe.describe(),
        "weights": {"method": plan.weights.method, **plan.weights.facts.asdict()},
        "statuses": result.table.counts(),
        "rule": rule(test.min_i, test.alpha, test.p_adjust),
        "passing": [_passing(row, table, test.p_adjust) for row in report.summary.to_pylist()],
        "leading": [
            _leading(index[latent] | table[latent], j, plan, result)
            for j, latent in enumerate(result.leading)
        ],
        "how": {"moran": result.table.how, "nulls": report.how},
        "features": str(plan.cache),
        "out": str(plan.out),
        "report": str(plan.out / "report.html"),
        "provenance": features.provenance.to_dict(),
    }
    return plain(facts)


def rule(min_i: float, alpha: float, p_adjust: str) -> str:
    """What passing means, in symbols."""
    sign = "p" if p_adjust == "none" else "q"
    return f"I ≥ {min_i:g} and {sign} < {alpha:g}"


def _passing(
    row: Mapping[str, Any], table: Sequence[Mapping[str, Any]], p_adjust: str
) -> dict[str, Any]:
    by = "p" if p_adjust == "none" else "q"
    tested = [one for one in table if one["set"] == row["set"] and one["status"] == "ok"]
    return {
        "what": KINDS.get(row["set"], row["set"]),
        "n_features": row["n_features"],
        "n_tested": row["n_tested"],
        **{name: row[f"n_{name}_{by}"] for name in (*NULLS, "survives")},
        "max_I": max((one["I"] for one in tested), default=None),
        "max_I_after": max(
            (one["I_after"] for one in tested if one["I_after"] is not None), default=None
        ),
    }


def _leading(row: Mapping[str, Any], j: int, plan: "Plan", result: "Result") -> dict[str, Any]:
    assert result.local is not None
    one = result.local.feature(j)
    top = np.argsort(-one.values, kind="stable")[: 2 * SHOWN_PLACES]
    names = ("feature", "I", "n_active", "p_sim", "p_tail", "I_after", "verdict")
    return {
        **{name: row[name] for name in names},
        "nulls": {words: row[f"q_{name}"] for name, words in NULLS.items() if f"q_{name}" in row},
        "top_places": [plan.places.name[i] for i in top if one.values[i] > 0],
        "clusters": one.counts()[0],
    }


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary as lines for people."""
    places, weights = summary["places"], summary["weights"]
    lines = [
        f"{places['n']:,} places, {places['n_labels']} labels: {places['source']}",
        f"neighbours   {weights['method']}; {facts_text(weights)}",
        f"prompt       {summary['prompt']}, method {summary['method']}",
        f"latents      {statuses_text(summary['statuses'])}",
        "",
        f"{'pass: ' + summary['rule']:<30}{'tested':>8}"
        + "".join(f"{name:>18}" for name in NULLS.values())
        + f"{SURVIVES:>14}{'largest I':>11}",
    ]
    for row in summary["passing"]:
        cells = "".join(f"{_count(row[name]):>18}" for name in NULLS)
        largest = "-" if row["max_I"] is None else f"{row['max_I']:.2f}"
        lines.append(
            f"{row['what']:<30}{row['n_tested']:>8,}{cells}{_count(row['survives']):>14}"
            f"{largest:>11}"
        )
    lines.append("")
    for one in summary["leading"]:
        names = ", ".join(printable(name) for name in one["top_places"][:SHOWN_PLACES])
        lines.append(
            f"latent {one['feature']:>6}  I {one['I']:.3f}  at {one['n_active']:,} places, "
            f"{one['verdict']}: {names}"
        )
    if not summary["leading"]:
        lines.append("no latent is active at enough places to be tested")
    lines += [f"report       {summary['report']}", f"features kept in {summary['features']}"]
    return "\n".join(lines)


def facts_text(facts: Mapping[str, Any]) -> str:
    """The weights' facts in a line."""
    parts = [f"{facts['n_links']:,} links", f"{100 * facts['reciprocal_frac']:.0f}% mutual"]
    if facts["median_km"] is not None:
        parts.append(f"median {facts['median_km']:.1f} km, longest {facts['max_km']:,.0f} km")
    parts.append(f"{facts['n_components']:,} component" + "s" * (facts["n_components"] != 1))
    parts.append(f"{facts['n_islands']:,} island" + "s" * (facts["n_islands"] != 1))
    if facts["n_coincident"]:
        parts.append(f"{facts['n_coincident']:,} places share their coordinates")
    return ", ".join(parts)


def statuses_text(statuses: Mapping[str, int]) -> str:
    """``2,210 tested, 300 rare, ...``."""
    named = {"ok": "tested", "rare": "rare", "constant": "constant", "dead": "silent everywhere"}
    return ", ".join(f"{statuses[key]:,} {word}" for key, word in named.items() if key in statuses)


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def estimate(asked: "Asked", plan: "Plan") -> dict[str, Any]:
    """Time, tokens and disk, from some of the places; what is kept already counts as done."""
    from sae_apps.geospatial.probe import probe
    from sae_apps.geospatial.prompts import place_prompts

    places, encoder = plan.places, plan.encoder
    prompts = place_prompts(encoder.lm.tokenizer, places, asked.probe)
    tokens = sum(len(row.ids) for row in prompts.rows)
    step = max(1, places.n // PROBE_PLACES)
    some = places.take(np.arange(0, places.n, step)[:PROBE_PLACES])
    probe(encoder.lm, encoder.sae, encoder.hook_point, some, asked.probe)  # set-up, not timed
    start = time.monotonic()
    found = probe(encoder.lm, encoder.sae, encoder.hook_point, some, asked.probe)
    seconds = (time.monotonic() - start) * places.n / some.n
    folders = [plan.cache]
    if asked.chosen.baseline == "raw":
        folders.append(Path(f"{plan.cache}-raw"))
    passes = sum(not folder.is_dir() for folder in folders)
    stored = places.n * (8 * found.acts.nnz / some.n + 4 * encoder.sae.d_in * (len(folders) - 1))
    return {
        "n_places": places.n,
        "weights": {"method": plan.weights.method, **plan.weights.facts.asdict()},
        "tokens": tokens,
        "passes": passes,
        "seconds": passes * seconds,
        "disk_bytes": int(stored),
        "memory_bytes": int(BASE_BYTES + 2 * stored + sum(
            p.numel() * p.element_size() for p in encoder.parameters()
        )),
        "probe_places": some.n,
        "missing": [],
    }  # fmt: skip


def estimate_text(report: Mapping[str, Any]) -> str:
    """The estimate as lines for people."""
    lines = []
    if "n_places" in report:
        weights = report["weights"]
        lines = [
            f"places      {report['n_places']:,}",
            f"neighbours  {weights['method']}; {facts_text(weights)}",
            f"tokens      {report['tokens']:,} a pass, {report['passes']} passes to do",
            f"time        about {duration(report['seconds'])} to read the names; tests and maps "
            "are not counted",
            f"disk        about {size(report['disk_bytes'])} of features",
            f"memory      about {size(report['memory_bytes'])}",
            f"measured here on {report['probe_places']} places; memory is computed",
        ]
    lines += [f"not estimated: {note}" for note in report["missing"]]
    return "\n".join([*lines, "nothing was written"])
