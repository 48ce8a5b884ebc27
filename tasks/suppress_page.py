"""The page of ``sae-apps suppress``: curves, costs at equal removal, continuations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_apps.suppression.generations import cover

from .common import read_json

if TYPE_CHECKING:
    from sae_apps.suppression.app import App
    from sae_apps.suppression.curves import Curve

    from .suppress_run import Plan


def write_page(
    path: Path,
    plan: "Plan",
    app: "App",
    curves: "Sequence[Curve]",
    summary: Mapping[str, Any],
    texts: Sequence[Mapping[str, str]],
) -> None:
    """The report: the suppression section, and the overview of the run."""
    from sae_apps.report import (
        RemovalCurve,
        SuppressionView,
        build_page,
        overview_section,
        suppression_section,
        write_report,
    )

    shown = texts if plan.chosen.show_texts else [
        {name: cover(plan.lm, app, text) for name, text in one.items()} for one in texts
    ]  # fmt: skip
    view = SuppressionView(
        plan.concept,
        [
            RemovalCurve(
                one.method, one.columns["erased_fixed"].tolist(), one.columns["perplexity"].tolist()
            )
            for one in curves
        ],
        summary.get("matched", ()),
        shown,
        not plan.chosen.show_texts,
        _facts(plan, app, curves),
    )
    results = read_json(plan.run.folder.results_file)
    sections = [suppression_section(view), overview_section(results)]
    subtitle = f"{app.units.n_units} {plan.chosen.units} at {app.hook_point} of {app.model_id}"
    write_report(path, build_page(f"Suppressing {plan.concept}", subtitle, sections))


def _facts(plan: "Plan", app: "App", curves: "Sequence[Curve]") -> dict[str, str]:
    count = ", ".join(f"{n:,} {name}" for name, n in plan.train.counts.items())
    facts = {
        "Fitted on": f"{count} texts; mode {app.mode}, gate {app.gate}, seed {plan.chosen.seed}",
        "Removed": "balanced accuracy of a linear probe on held-out texts, fitted on the plain "
        "model, from its plain value (0%) to chance (100%)",
    }
    if curves:
        how = curves[0].how
        facts["Measured on"] = (
            f"{how['n_test']:,} texts and {how['n_neutral']:,} neutral ones, up to "
            f"{how['context_size']} tokens each; intervals over documents, {how['n_draws']:,} draws"
        )
    return facts
