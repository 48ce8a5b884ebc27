"""What the demo does with its run: every application once, through the functions of its command.

Each stage keeps its result in the run's folder, where the command itself would put it: what is
finished is not done again.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_core.errors import MissingExtraError

from .common import StopSignal, read_json, token_count
from .demo_data import TARGETS, demo_files
from .train import train_run

if TYPE_CHECKING:
    from .geo_plan import Plan as GeoPlan
    from .select_files import Output
    from .settings import TrainSettings
    from .suppress_run import Plan as SuppressPlan

LOG = logging.getLogger(__name__)
SECOND = "seed1"
SECOND_LOSS_TOKENS = 500  # the second dictionary is there to be compared, not to be used
IDENTIFY_TOKENS = "32k"
BUDGET = "5%"
PLACES, N_PLACES = "world", 1000
CONCEPT = "negative"
STRENGTHS = "0,1,3"
CONTEXT_SIZE = 64  # tokens: sentences on films, beginnings of passages


@dataclass(frozen=True)
class Found:
    """What the stages found; None where an application's extra is not installed."""

    data: Path
    """The files that the applications read."""
    second: Path
    """Folder of the run with another seed."""
    identify: dict[str, Any]
    picks: "Output | None"
    geography: "tuple[GeoPlan, dict[str, Any]] | None"
    separability: dict[str, Any] | None
    suppression: "tuple[SuppressPlan, dict[str, Any]] | None"


def run_stages(settings: "TrainSettings", stop: StopSignal, *, quiet: bool = False) -> Found:
    """Every stage in turn, behind a finished training.

    Raises:
        UserError: a stage's input cannot be had. Interrupted: SIGINT or SIGTERM came; the same call
            goes on with the stage that it stopped.
    """
    assert settings.run.out
    out, data = Path(settings.run.out), demo_files()
    second = second_run(settings, stop, quiet=quiet)
    report = identified(out, second, quiet=quiet)

    def stage(name: str, work: Callable[[], Any]) -> Any:
        stop.check()
        LOG.info("demo: %s", name)
        try:
            return work()
        except MissingExtraError as error:
            LOG.warning("left out: %s", error)
            return None

    return Found(
        data,
        second,
        report,
        stage("selection", lambda: selected(out, data, quiet=quiet)),
        stage("geography", lambda: mapped(out, quiet=quiet)),
        stage("separability", lambda: separated(out, data, quiet=quiet)),
        stage("suppression", lambda: suppressed(out, data)),
    )


def second_run(settings: "TrainSettings", stop: StopSignal, *, quiet: bool) -> Path:
    """The same training with another seed, on the activations that the run has stored."""
    assert settings.run.out
    out = Path(settings.run.out)
    run = replace(
        settings.run,
        out=str(out / SECOND),
        seed=settings.run.seed + 1,
        activations=str(out),
        loss_tokens=min(SECOND_LOSS_TOKENS, token_count(settings.run.loss_tokens)),
    )
    train_run(replace(settings, run=run), stop, quiet=quiet)
    return out / SECOND


def identified(out: Path, second: Path, *, quiet: bool) -> dict[str, Any]:
    """Conditions of the theory and the verdict on every latent, from both runs."""
    from .identify import IdentifyOptions, identify, open_runs, open_stored
    from .identify_files import save

    runs = open_runs([str(out), str(second)])
    path, hashes = out / "identify.json", [run.sae.hash() for run in runs]
    if path.is_file() and (found := read_json(path)).get("sae_hashes") == hashes:
        return found
    options = IdentifyOptions(tokens=IDENTIFY_TOKENS, sample_tokens=IDENTIFY_TOKENS)
    stored = open_stored(runs[0], options.part)
    n_tokens = min(token_count(options.tokens), stored.n_tokens)
    measured, judged, report = identify(runs, stored, n_tokens, options, quiet=quiet)
    save(runs[0], measured, judged, report)
    return report


def selected(out: Path, data: Path, *, quiet: bool) -> "Output":
    """Rows of the pool for the targets; where the picks and the scores of all rows are."""
    from .select import EncodeOptions, SelectOptions, preset
    from .select_data import PoolOptions, TargetOptions
    from .select_files import Output, check_free
    from .select_run import Asked, make_plan, run

    folder = out / "selection"
    output = Output(folder / "picks.jsonl", folder / "scores.parquet")
    columns = {"prompt": "prompt", "response": "response"}
    config, embed = preset("recommended")
    asked = Asked(
        SelectOptions(str(out), BUDGET, str(output.picks), str(output.scores)),
        EncodeOptions(),
        PoolOptions([str(data / "pool.jsonl")], **columns),
        TargetOptions([str(data / f"{name}.jsonl") for name in TARGETS], **columns),
        "recommended",
        replace(config, exact_duplicates=True),
        embed,
    )
    plan = make_plan(asked)
    if not check_free(output, plan.identity, overwrite=False):
        run(asked, plan, output, quiet=quiet)
    return output


def mapped(out: Path, *, quiet: bool) -> tuple["GeoPlan", dict[str, Any]]:
    """Moran's I of every latent at the world's largest cities."""
    from .geo import GeoOptions, PlaceOptions, preset
    from .geo_files import finished
    from .geo_plan import Asked, make_plan
    from .geo_run import run

    chosen = GeoOptions(str(out), PLACES, maps="none")
    places = PlaceOptions(limit=N_PLACES)
    asked = Asked(chosen, places, *preset("careful"), "careful")
    plan = make_plan(asked)
    found = finished(plan.out, plan.identity)
    return plan, found or run(asked, plan, quiet=quiet)


def separated(out: Path, data: Path, *, quiet: bool) -> dict[str, Any]:
    """How far apart the units are under praise and blame of films."""
    from .separability import ConceptOptions, SeparabilityOptions
    from .separability_run import finished, make_plan, run

    chosen = SeparabilityOptions(
        str(out), units="latents,residual,neurons", context_size=CONTEXT_SIZE
    )
    plan = make_plan(chosen, ConceptOptions(str(data / "reviews.jsonl")))
    return finished(plan) or run(plan, quiet=quiet)


def suppressed(out: Path, data: Path) -> tuple["SuppressPlan", dict[str, Any]]:
    """Blame of films taken out, beside every rival, and sentences continued without it."""
    from .separability import ConceptOptions
    from .suppress import JudgeOptions, SuppressOptions
    from .suppress_run import finished, make_plan, run

    chosen = SuppressOptions(
        str(out), CONCEPT, gate="joint", strength=3.0,
        neutral=str(data / "neutral.jsonl"), prompts=str(data / "prompts.txt"), show_texts=True,
    )  # fmt: skip
    judged = JudgeOptions(
        evaluate=True, strengths=STRENGTHS, n_draws=500, new_tokens=24, context_size=CONTEXT_SIZE
    )
    plan = make_plan(chosen, ConceptOptions(str(data / "reviews.jsonl")), judged)
    return plan, finished(plan) or run(plan)
