"""The page of ``sae-apps geo``: the run's own numbers, and the maps of its leading latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .common import read_json
from .geo_text import NULLS, SURVIVES, facts_text, statuses_text

if TYPE_CHECKING:
    import pyarrow as pa

    from sae_apps.report import Geography, MapFeature

    from .geo_plan import Plan

AROUND = 0.9  # of the places' extent: outlines beyond the window, for dragging the map
GEONAMES_CREDIT = "Places: GeoNames, CC BY 4.0"
OUTLINES_CREDIT = "Outlines: Natural Earth and US Census Bureau, public domain"


def write_page(path: Path, plan: "Plan", summary: Mapping[str, Any]) -> None:
    """The report: the geography section, and the overview of the run.

    Args:
        path: in the folder of the result, whose other files are read.
    """
    from sae_apps.report import build_page, geography_section, overview_section, write_report

    results = read_json(plan.run.folder.results_file)
    sections = [
        geography_section(geography(path.parent, plan, summary)),
        overview_section(results),
    ]
    origin = summary["provenance"]
    subtitle = (
        f"{plan.run.sae.d_sae:,} latents on {origin['hook_point']} of {origin['model_id']}, "
        f"read at {plan.places.n:,} places"
    )
    write_report(path, build_page("Which latents know where places are", subtitle, sections))


def geography(folder: Path, plan: "Plan", summary: Mapping[str, Any]) -> "Geography":
    """What the section shows, from the files of a result."""
    import pyarrow.parquet as pq

    from sae_apps.geospatial.outlines import fit_bounds, land, outlines
    from sae_apps.report import Geography, MapPlaces, Passing

    lisa = pq.read_table(folder / "lisa.parquet") if summary["leading"] else None
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
        features=[] if lisa is None else [_feature(one, lisa, plan) for one in summary["leading"]],
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


def _feature(one: Mapping[str, Any], lisa: "pa.Table", plan: "Plan") -> "MapFeature":
    from sae_apps.report import MapFeature
    from sae_apps.report.formats import percent

    mine = lisa.filter(np.asarray(lisa["feature"]) == one["feature"])
    local = {name: mine[name].to_numpy() for name in ("value", "lag", "q", "p_adjusted")}
    significant = local["p_adjusted"] < plan.asked.test.local_alpha
    sign = "p" if plan.asked.test.p_adjust == "none" else "q"
    notes = [one["verdict"]]
    freq = plan.run.extra.get("freq")
    if freq is not None:
        notes.append(f"fires on {percent(float(freq[one['feature']]), 2)} of ordinary tokens")
    return MapFeature(
        title=f"latent {one['feature']}",
        values=local["value"],
        moran_i=one["I"],
        p={f"{sign}, {name}": value for name, value in one["nulls"].items()},
        lag=local["lag"],
        lisa=np.where(significant, local["q"], 0),
        note="; ".join(notes),
    )


def _facts(plan: "Plan", summary: Mapping[str, Any]) -> dict[str, str]:
    from .geo_plan import local_permutations

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
