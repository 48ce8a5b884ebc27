"""The page of ``sae-apps geo``: the run's own numbers, and the maps of its leading latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .common import read_json
from .geo_text import NULLS, SURVIVES, facts_text, statuses_text

if TYPE_CHECKING:
    from sae_apps.report import Geography, MapFeature
    from sae_core.features import SparseFeatures

    from .geo_plan import Plan
    from .geo_run import Result

AROUND = 0.9  # of the places' extent: outlines beyond the window, for dragging the map
GEONAMES_CREDIT = "Places: GeoNames, CC BY 4.0"
OUTLINES_CREDIT = "Outlines: Natural Earth and US Census Bureau, public domain"


def write_page(
    path: Path,
    plan: "Plan",
    features: "SparseFeatures",
    result: "Result",
    summary: Mapping[str, Any],
) -> None:
    """The report: the geography section, and the overview of the run."""
    from sae_apps.report import build_page, geography_section, overview_section, write_report

    results = read_json(plan.run.folder.results_file)
    sections = [
        geography_section(geography(plan, features, result, summary)),
        overview_section(results),
    ]
    origin = features.provenance
    subtitle = (
        f"{features.d_sae:,} latents on {origin.hook_point} of {origin.model_id}, "
        f"read at {plan.places.n:,} places"
    )
    write_report(path, build_page("Which latents know where places are", subtitle, sections))


def geography(
    plan: "Plan", features: "SparseFeatures", result: "Result", summary: Mapping[str, Any]
) -> "Geography":
    """What the section shows."""
    from sae_apps.geospatial.outlines import fit_bounds, land, outlines
    from sae_apps.report import Geography, MapPlaces, Passing

    places = plan.places
    bounds = fit_bounds(places.lon, places.lat, AROUND)
    is_world = bounds[2] - bounds[0] > 180
    bounds = None if is_world else bounds
    is_geonames = "GeoNames" in places.source
    label = plan.labels if any(plan.labels) else places.label
    return Geography(
        places=MapPlaces(
            places.name, places.lon, places.lat, [None if v is None else str(v) for v in label]
        ),
        features=[
            _feature(j, one, plan, features, result) for j, one in enumerate(summary["leading"])
        ],
        outlines=outlines(bounds),
        land=land(bounds),
        passing=[
            Passing(
                row["what"],
                row["n_tested"],
                {words: row[name] for name, words in NULLS.items() if row[name] is not None}
                | {SURVIVES: row["survives"]},
            )
            for row in summary["passing"]
        ],
        rule=summary["rule"],
        facts=_facts(plan, summary),
        credits=(*((GEONAMES_CREDIT,) if is_geonames else ()), OUTLINES_CREDIT),
    )


def _feature(
    j: int, one: Mapping[str, Any], plan: "Plan", features: "SparseFeatures", result: "Result"
) -> "MapFeature":
    from sae_apps.report import MapFeature
    from sae_apps.report.formats import percent

    assert result.local is not None
    local = result.local.feature(j)
    significant = local.p_adjusted < local.how["alpha"]
    sign = "p" if plan.asked.test.p_adjust == "none" else "q"
    notes = [one["verdict"]]
    freq = plan.run.extra.get("freq")
    if freq is not None:
        notes.append(f"fires on {percent(float(freq[one['feature']]), 2)} of ordinary tokens")
    return MapFeature(
        title=f"latent {one['feature']}",
        values=local.values,
        moran_i=one["I"],
        p={f"{sign}, {name}": value for name, value in one["nulls"].items()},
        lag=local.lag,
        lisa=np.where(significant, local.q, 0),
        note="; ".join(notes),
    )


def _facts(plan: "Plan", summary: Mapping[str, Any]) -> dict[str, str]:
    from .geo_run import local_permutations

    test, nulls = plan.asked.test, summary["how"]["nulls"]
    local = (
        f"Local Moran's I, {local_permutations(test):,} conditional permutations, "
        f"{test.local_alternative}, level {test.local_alpha:g}, correction "
        f"{'none' if test.p_adjust == 'none' else 'over the places of a latent'}"
    )
    return {
        "Places": summary["places"]["source"],
        "Prompt": summary["prompt"],
        "Neighbours": f"{summary['weights']['method']}; {facts_text(summary['weights'])}",
        "Latents": statuses_text(summary["statuses"]),
        "Nulls": (
            f"free: {test.permutations:,} permutations over all places; within labels: only among "
            f"places of one label ({summary['places']['n_labels']} labels); after covariates: "
            f"residuals of {', '.join(nulls['covariates'])}, permuted over all places; beyond "
            f"labels: residuals of the labels' means too, permuted within labels; one-sided, "
            f"correction {test.p_adjust} over the features of a kind, "
            f"seed {plan.asked.chosen.seed}"
        ),
        "Clusters": local,
    }
