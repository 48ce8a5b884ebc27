"""The work behind ``sae-apps suppress``: fit, measure, continue prompts, write one folder.

app/                the fitted suppression, for ``load_app``
curves.parquet      with --evaluate: a row for each method and strength, with intervals
matched.parquet     with --evaluate: every method where 60% and 80% of the concept are removed
generations.jsonl   with --prompts: each prompt continued without and with the suppression, as it is
report.html         with --evaluate or --prompts: curves, costs, continuations with covered words
summary.json        settings, texts by label, the numbers
manifest.json       sha256 of every file, written last
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_apps.suppression.app import save_app
from sae_apps.suppression.concepts import LabelledTexts, require_concept
from sae_apps.suppression.curves import Curve, matched
from sae_apps.suppression.evaluate import EvaluationConfig, Reader, evaluate
from sae_apps.suppression.fit import Fit, FitConfig, fit_report
from sae_apps.suppression.gated import fit_gated
from sae_apps.suppression.generations import continue_prompts
from sae_apps.suppression.lineup import (
    TokenSample,
    background_tokens,
    fit_rivals,
    instruction,
    token_sample,
)
from sae_apps.suppression.plain_texts import ReadConfig
from sae_apps.suppression.trial import make_trial, strengths_of
from sae_apps.suppression.units import open_units
from sae_core.activations import HarvestConfig
from sae_core.errors import UserError
from sae_core.store import atomic_folder
from sae_core.text import read_text_file
from sae_core.weights import refuse_misspelt

from .common import plain, to_json
from .featurize import FinishedRun, open_run
from .finished import SUMMARY, finished_folder
from .separability_run import read_labelled

if TYPE_CHECKING:
    from sae_apps.suppression.trial import Labelled
    from sae_core.models import LanguageModel

    from .separability import ConceptOptions
    from .suppress import JudgeOptions, SuppressOptions

LOG = logging.getLogger(__name__)
FORMAT, VERSION = "sae-apps-suppress", 1
LEVELS = (0.6, 0.8)
MEASURED = ("n_test", "n_neutral", "context_size", "n_draws")  # of a curve's circumstances


@dataclass(frozen=True)
class Plan:
    """What is to be done; the model is opened only where it is needed."""

    chosen: "SuppressOptions"
    judged: "JudgeOptions"
    run: FinishedRun
    train: LabelledTexts
    test: LabelledTexts
    neutral: list[str]
    prompts: list[str]
    config: EvaluationConfig
    out: Path
    identity: dict[str, Any]
    """All that the result depends on."""
    accept_terms: bool = False

    @property
    def concept(self) -> str:
        """What is suppressed."""
        return str(self.chosen.concept)

    @cached_property
    def lm(self) -> "LanguageModel":
        """The model of the run, checked to be the one that the SAE was trained on."""
        from sae_apps.selection.encoder import load_encoder

        return load_encoder(
            self.run.folder.path, model=self.chosen.model, accept_terms=self.accept_terms
        ).lm


def _lines(path: str | None) -> list[str]:
    return [] if path is None else [row.text for row in read_text_file(path) if row.text.strip()]


def make_plan(
    chosen: "SuppressOptions",
    columns: "ConceptOptions",
    judged: "JudgeOptions",
    *,
    accept_terms: bool = False,
) -> Plan:
    """Open the run and read the texts.

    Raises:
        UserError: anything that is missing or does not fit, before the model is read.
    """
    finished_run = open_run(chosen.run)
    if chosen.model:
        refuse_misspelt(chosen.model)
    data = read_labelled(columns)
    if not chosen.concept:
        known = ", ".join(data.classes)
        raise UserError(f"Expected a concept out of {known}, got none: add --concept NAME.")
    require_concept(chosen.concept, data.classes)
    train, test = data.split(judged.test_frac, chosen.seed)
    config = EvaluationConfig(
        strengths_of(judged.strengths),
        finished_run.hook_point,
        judged.n_draws,
        chosen.seed,
        read=ReadConfig(judged.context_size),
    )
    if not chosen.out and Path(chosen.concept).name != chosen.concept:
        raise UserError(
            f"Expected --out beside a concept that is no name of a folder, got {chosen.concept!r}."
        )
    out = Path(chosen.out or finished_run.folder.path / f"suppress-{chosen.concept}")
    neutral, prompts = _lines(chosen.neutral), _lines(chosen.prompts)
    skipped = ("run", "out", "overwrite", "neutral", "prompts")  # the last two by their texts
    identity = {name: v for name, v in asdict(chosen).items() if name not in skipped}
    identity |= asdict(judged) | {
        "data": data.digest(), "neutral": neutral, "prompts": prompts,
        "sae_hash": finished_run.sae.hash(), "hook_point": finished_run.hook_point,
    }  # fmt: skip
    return Plan(
        chosen, judged, finished_run, train, test, neutral, prompts, config, out,
        plain(identity), accept_terms,
    )  # fmt: skip


def finished(plan: Plan) -> dict[str, Any] | None:
    """What the same command wrote before, whole; None where nothing is there.

    Raises:
        UserError: the folder holds something else; CorruptFileError: a file has changed since.
    """
    return finished_folder(plan.out, plan.identity, FORMAT, VERSION)


def _fit(plan: Plan) -> Fit:
    chosen, size = plan.chosen, plan.judged.context_size
    half = len(plan.neutral) // 2  # the other half is read by the evaluation
    return fit_report(
        plan.lm,
        plan.run.sae if chosen.units == "latents" else None,
        plan.train.texts,
        plan.train.labels,
        plan.concept,
        plan.neutral[:half] or None,
        groups=plan.train.group,
        hook_point=plan.run.hook_point,
        kind=chosen.units,
        config=FitConfig(
            n_units=chosen.n_units, mode=chosen.mode, gate=chosen.gate, seed=chosen.seed,
            harvest=HarvestConfig(context_size=size, batch_tokens=max(2048, size)),
        ),
    )  # fmt: skip


def _curves(plan: Plan, app: Any) -> list[Curve]:
    """APP, the direction gated by a posterior, the rivals on the same units, an instruction."""
    sae = plan.run.sae if plan.chosen.units == "latents" else None
    units = open_units(plan.lm, sae, plan.run.hook_point, plan.chosen.units)
    half = len(plan.neutral) // 2
    trial = make_trial(plan.train, plan.test, plan.concept, plan.neutral[half:])
    edits = {"app": app, **_rivals(plan, units, trial.train, max(1, app.units.n_units))}
    reader = Reader(plan.lm, plan.run.hook_point, plan.config.read)
    curves = []
    for name, edit in edits.items():
        LOG.info("measuring %s", name)
        curves.append(evaluate(plan.lm, edit, trial, plan.config, method=name, reader=reader))
    told, edit = replace(plan.config, strengths=(0.0, 1.0)), instruction(plan.concept)
    curves.append(evaluate(plan.lm, edit, trial, told, method="instruction", reader=reader))
    return curves


def _rivals(plan: Plan, units: Any, train: "Labelled", n_units: int) -> dict[str, Any]:
    """All fitted on the same tokens; half of the neutral text is background of the gate."""
    place, size = plan.run.hook_point, plan.judged.context_size

    def sample(point: str) -> TokenSample:
        return token_sample(plan.lm, point, train.texts, train.is_concept, context_size=size)

    mine = sample(units.hook_point)
    found = fit_rivals(units, mine, n_units=n_units, seed=plan.chosen.seed)
    if units.hook_point != place:
        mine = sample(place)
    background = plan.neutral[: len(plan.neutral) // 2]
    rest = background_tokens(plan.lm, place, background, context_size=size)
    whole = open_units(plan.lm, None, place, "residual")
    plane = fit_rivals(whole, mine, n_units=1, names=["direction"])["direction"]
    gated = fit_gated(plane, mine.x, mine.is_concept, rest)
    return {"app_direction": gated, **found, "residual_direction": plane}


def run(plan: Plan) -> dict[str, Any]:
    """Fit, measure and write the folder; returns the summary."""
    fit = _fit(plan)
    summary: dict[str, Any] = {
        "concept": plan.concept, "units": fit.app.units.n_units, "kind": plan.chosen.units,
        "dropped": fit.dropped, "train": plan.train.counts, "test": plan.test.counts,
        "hook_point": fit.app.hook_point, "out": str(plan.out),
    }  # fmt: skip
    with atomic_folder(plan.out, overwrite=plan.chosen.overwrite) as folder:
        save_app(folder / "app", fit.app)
        if plan.judged.evaluate:
            summary |= _write_curves(folder, _curves(plan, fit.app))
        if plan.prompts:
            summary["generations"] = _write_generations(folder, plan, fit.app)
        if (plan.judged.evaluate or plan.prompts) and find_spec("jinja2") is not None:
            from .suppress_page import write_page

            write_page(folder / "report.html", plan, plain(summary))
        content = {"format": FORMAT, "version": VERSION, "identity": plan.identity}
        text = to_json(content | {"summary": summary}) + "\n"
        (folder / SUMMARY).write_text(text, encoding="utf-8")
    return plain(summary)


def _write_curves(folder: Path, curves: list[Curve]) -> dict[str, Any]:
    """Both tables; what the summary says of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [curve.table() for curve in curves]
    pq.write_table(pa.concat_tables(tables, promote_options="default"), folder / "curves.parquet")
    levels = [matched(curve, at).record() for curve in curves for at in LEVELS]
    names = list(dict.fromkeys(name for row in levels for name in row))
    columns = {name: [row.get(name) for row in levels] for name in names}
    pq.write_table(pa.table(columns), folder / "matched.parquet")
    how = {name: curves[0].how[name] for name in MEASURED}
    return {"matched": levels, "measured": how}


def _write_generations(folder: Path, plan: Plan, app: Any) -> dict[str, int]:
    """Every prompt continued twice; how many continuations differ."""
    made = continue_prompts(
        plan.lm, app, plan.prompts,
        strength=plan.chosen.strength, new_tokens=plan.judged.new_tokens,
    )  # fmt: skip
    lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in made)
    (folder / "generations.jsonl").write_text(lines, encoding="utf-8")
    changed = sum(one.plain != one.suppressed for one in made)
    return {"prompts": len(made), "changed": changed}


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary as lines for people."""
    lines = [
        f"{summary['concept']}: {summary['units']} {summary['kind']} at {summary['hook_point']}, "
        f"{summary['dropped']} dropped for predicting no better than the prior"
    ]
    for row in summary.get("matched", ()):
        if row["strength"] is None:
            told = row["reason"]
        else:
            told = f"strength {row['strength']:.2f}, perplexity +{row['perplexity_increase']:.2f}"
        lines.append(f"  {row['method']:<12} {row['at']:.0%} removed: {told}")
    if found := summary.get("generations"):
        lines.append(f"generations  {found['changed']} of {found['prompts']} changed")
    return "\n".join([*lines, f"written to  {summary['out']}"])


def estimate(plan: Plan) -> dict[str, Any]:
    """How many texts and passes."""
    n = len(plan.train) + len(plan.test) + max(1, len(plan.neutral))
    passes = (len(plan.config.strengths) * 10 if plan.judged.evaluate else 0) + 1
    return {"train": plan.train.counts, "test": plan.test.counts, "texts": n,
            "passes": passes, "out": str(plan.out)}  # fmt: skip


def estimate_text(report: Mapping[str, Any]) -> str:
    """The estimate as lines for people."""
    return (
        f"texts       {report['texts']:,}, each read about {report['passes']} times\n"
        "nothing was written"
    )
