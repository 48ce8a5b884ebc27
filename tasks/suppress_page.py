"""The page of ``sae-apps suppress``: curves, costs at equal removal, continuations."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_apps.suppression.app import load_app
from sae_apps.suppression.generations import cover

from .common import read_json

if TYPE_CHECKING:
    from sae_apps.report import SuppressionView
    from sae_apps.suppression.app import App

    from .suppress_run import Plan


def write_page(path: Path, plan: "Plan", summary: Mapping[str, Any]) -> None:
    """The report: the suppression section, and the overview of the run.

    Args:
        path: in the folder of the result, whose other files are read.
    """
    from sae_apps.report import build_page, overview_section, suppression_section, write_report

    view = suppression_view(path.parent, plan, summary)
    results = read_json(plan.run.folder.results_file)
    sections = [suppression_section(view), overview_section(results)]
    subtitle = (
        f"{summary['units']} {summary['kind']} at {summary['hook_point']} "
        f"of {plan.run.extra['model_id']}"
    )
    write_report(path, build_page(f"Suppressing {plan.concept}", subtitle, sections))


def suppression_view(folder: Path, plan: "Plan", summary: Mapping[str, Any]) -> "SuppressionView":
    """What the section shows, from the files of a result.

    Words of the concept are covered, unless the plan shows texts as they are.
    """
    from sae_apps.report import RemovalCurve, SuppressionView

    app = load_app(folder / "app")
    curves = [RemovalCurve(*one) for one in _curves(folder / "curves.parquet")]
    shown = _texts(folder / "generations.jsonl")
    if not plan.chosen.show_texts:
        moved = app.to(plan.lm.device)
        shown = [{key: cover(plan.lm, moved, text) for key, text in one.items()} for one in shown]
    return SuppressionView(
        plan.concept,
        curves,
        summary.get("matched", ()),
        shown,
        not plan.chosen.show_texts,
        _facts(plan, app, summary),
    )


def _curves(path: Path) -> list[tuple[str, list[float], list[float]]]:
    """Method, part removed and perplexity by strength; no curve without the file."""
    import pyarrow.parquet as pq

    if not path.is_file():
        return []
    rows = pq.read_table(path, columns=["method", "erased_fixed", "perplexity"]).to_pylist()
    return [
        (
            name,
            [row["erased_fixed"] for row in rows if row["method"] == name],
            [row["perplexity"] for row in rows if row["method"] == name],
        )
        for name in dict.fromkeys(row["method"] for row in rows)
    ]


def _texts(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _facts(plan: "Plan", app: "App", summary: Mapping[str, Any]) -> dict[str, str]:
    count = ", ".join(f"{n:,} {name}" for name, n in plan.train.counts.items())
    facts = {
        "Fitted on": f"{count} texts; mode {app.mode}, gate {app.gate}, seed {plan.chosen.seed}",
        "Removed": "balanced accuracy of a linear probe on held-out texts, fitted on the plain "
        "model, from its plain value (0%) to chance (100%)",
    }
    if how := summary.get("measured"):
        facts["Measured on"] = (
            f"{how['n_test']:,} texts and {how['n_neutral']:,} neutral ones, up to "
            f"{how['context_size']} tokens each; intervals over documents, {how['n_draws']:,} draws"
        )
    return facts
