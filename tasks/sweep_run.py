"""The work of ``sae-apps sweep``: one harvest, then ``train`` for each run, then the summary."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_core.disk import atomic_write_text, only_writer
from sae_core.errors import UserError
from sae_core.sealed import sealed

from .common import StopSignal, plain, read_json, to_json
from .inputs import Inputs, open_inputs, parts_of, provenance
from .progress import Progress
from .runs import RunFolder, claim
from .sinks import check_sink
from .sweep_plan import (
    SUMMARY_FILE,
    SWEEP_FILE,
    SweepPlan,
    check_sweep,
    claim_sweep,
    discard_if_empty,
    link_activations,
)
from .train import train_run

if TYPE_CHECKING:
    from sae_core.models import LanguageModel

    from .settings import TrainSettings

LOG = logging.getLogger(__name__)
COLUMNS: tuple[str, ...] = (
    "hook_point",
    "kind",
    "d_sae",
    "seed",
    "fvu",
    "l0",
    "alive",
    "loss recovered",
)


def sweep(
    plan: SweepPlan, stop: StopSignal, *, accept_terms: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Bring every run to its end and return the results side by side.

    Raises:
        UserError: bad input, or the folder holds something else.
        Interrupted: SIGINT or SIGTERM came; the same call continues.
    """
    check_sweep(plan)
    check_sink(plan.runs[0].run.log)
    todo = [one for one in plan.runs if not _folder(one).is_finished]
    inputs = None
    if todo:
        inputs = open_inputs(todo[0], accept_terms=accept_terms)
        check_hooks(plan, inputs.lm)
    else:
        LOG.info("%s is finished: nothing to do.", plan.out)
    with only_writer(plan.out):
        if inputs:
            _harvest_all(plan, todo, inputs, quiet=quiet)
            _finish_runs(plan, todo, inputs, stop, quiet=quiet)
        found = summary(plan)
        text = to_json(sealed(plain(found))) + "\n"
        file = plan.out / SUMMARY_FILE
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            atomic_write_text(file, text)
    return found | {"out": str(plan.out)}


def _folder(settings: "TrainSettings") -> RunFolder:
    return RunFolder(Path(str(settings.run.out)))


def check_hooks(plan: SweepPlan, lm: "LanguageModel") -> None:
    """Raises:
    UserError: a hook point that the model does not have, one under two names, or settings of a run
        that do not fit the model's width.
    """
    from sae_core.hooks import resolve_hook_point

    names: dict[tuple[str, str], str] = {}
    for hook in plan.hooks:
        point = resolve_hook_point(lm.model, hook)
        other = names.setdefault((point.path, point.side), hook)
        if other != hook:
            raise UserError(
                f"Expected each of --hooks once, got one under two names: {other!r} and {hook!r}."
            )
    for one in plan.runs:
        one.check(d_in=lm.d_model)


def _harvest_all(
    plan: SweepPlan, todo: Sequence["TrainSettings"], inputs: Inputs, *, quiet: bool
) -> None:
    """Store the activations that unfinished runs read, of all their hook points in one pass."""
    from sae_core.harvest import harvest_each

    settings, is_new = todo[0], not (plan.out / SWEEP_FILE).is_file()
    hooks = list(dict.fromkeys(str(one.run.hook) for one in todo))
    claim_sweep(plan)
    try:
        for name, rows, config in parts_of(settings, inputs):
            what, n = f"harvest {name}", config.max_tokens
            with Progress(what, n, "tokens", enabled=not quiet) as shown:
                harvest_each(
                    inputs.lm,
                    rows,
                    {hook: plan.activations(hook) / name for hook in hooks},
                    config,
                    dtype=settings.store_dtype(),
                    shard_tokens=settings.shard_tokens(),
                    progress=shown.update_to,
                )
    except UserError:
        if is_new:
            discard_if_empty(plan)
        raise


def _finish_runs(
    plan: SweepPlan,
    todo: Sequence["TrainSettings"],
    inputs: Inputs,
    stop: StopSignal,
    *,
    quiet: bool,
) -> None:
    for number, one in enumerate(todo, start=1):
        stop.check()
        run, hook = _folder(one), str(one.run.hook)
        LOG.info("sweep: %s (%d of %d)", run.path.name, number, len(todo))
        mine = replace(inputs, hook_point=hook)
        run.path.mkdir(exist_ok=True)
        claim(run, one.identity(), provenance(one, mine))
        link_activations(plan, run, hook)
        train_run(one, stop, inputs=mine, quiet=quiet)


def summary(plan: SweepPlan) -> dict[str, Any]:
    """One record a run, without times: the same whenever and wherever it was made."""
    rows, n_tokens = [], 0
    for one in plan.runs:
        run = _folder(one)
        found = read_json(run.results_file)
        n_tokens = found["n_eval_tokens"]
        rows.append({
            "run": run.path.name,
            "hook_point": found["provenance"]["hook_point"],
            "seed": one.run.seed,
            "loss_recovered": found["loss_recovered"]["recovered_zero"],
            **{name: found[name] for name in ("kind", "d_sae", "fvu", "l0", "alive_frac")},
        })  # fmt: skip
    return {"n_runs": len(rows), "n_eval_tokens": n_tokens, "runs": rows}


def as_text(found: dict[str, Any]) -> str:
    """The summary as a table for people."""
    lines = [COLUMNS]
    for row in found["runs"]:
        shown = (f"{row['fvu']:.4f}", f"{row['l0']:.1f}", f"{row['alive_frac']:.1%}")
        lost = "–" if row["loss_recovered"] is None else f"{row['loss_recovered']:.1%}"
        named = (row["hook_point"], row["kind"], f"{row['d_sae']:,}", str(row["seed"]))
        lines.append((*named, *shown, lost))
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    table = [
        "  ".join([*(line[i].ljust(widths[i]) for i in (0, 1)),
                   *(line[i].rjust(widths[i]) for i in range(2, len(COLUMNS)))])
        for line in lines
    ]  # fmt: skip
    head = f"{found['n_runs']} SAEs, on {found['n_eval_tokens']:,} held-out tokens each:"
    return "\n".join([head, *(f"  {line}" for line in table), f"runs below {found['out']}"])


# ---- what it would cost ----


def estimate(plan: SweepPlan, *, accept_terms: bool = False) -> dict[str, Any]:
    """Tokens, disk, memory and time of a sweep; what cannot be known is left out.

    Raises:
        UserError: input that the sweep itself would refuse.
    """
    from sae_core.text import split_rows

    from .cached import open_cached
    from .estimate import PROBE_ROWS, available_tokens, forward_rate

    check_sweep(plan)
    first = plan.runs[0]
    lm, source, notes = open_cached(first.model, first.text, accept_terms)
    names = [_folder(one).path.name for one in plan.runs]
    report: dict[str, Any] = {"missing": notes, "stored_tokens": first.max_tokens, "runs": names}
    report["hook_points"] = plan.hooks
    if lm:
        check_hooks(plan, lm)
    if lm and source:
        rows = split_rows(source, first.text.held_out_frac, first.split_seed)[0]
        report["stored_tokens"] = available_tokens(first, lm, rows, source.id)
        probe = list(islice(rows, PROBE_ROWS))
        rate, widths = forward_rate(lm, probe, plan.hooks, first.harvest)
        report["forward_tokens_per_second"] = rate
        _add_costs(report, plan, lm, widths)
    return report


def _add_costs(
    report: dict[str, Any], plan: SweepPlan, lm: "LanguageModel", widths: dict[str, int]
) -> None:
    """Sums over the runs, each timed for a few steps once a shape; the harvest counts once."""
    from .estimate import add_costs, memory_bytes, step_seconds

    step: dict[tuple[Any, ...], float] = {}
    costs, most, harvested = [], {"total": 0}, {}
    for one in plan.runs:
        d_in = widths[str(one.run.hook)]
        shape = (one.sae["kind"], one.sae["d_sae"], d_in)
        if shape not in step:
            step[shape] = step_seconds(one, d_in)
        found = report | {"d_in": d_in, "step_seconds": step[shape], "hook_point": _deepest(plan)}
        add_costs(found, one, lm)
        costs.append(found)
        harvested[one.run.hook] = found["disk_bytes"]["activations"]
        most = max(most, memory_bytes(one, lm, d_in), key=lambda parts: parts["total"])
    disk = {name: sum(c["disk_bytes"][name] for c in costs) for name in ("checkpoints", "sae")}
    disk = {"activations": sum(harvested.values())} | disk
    times = {name: sum(c["seconds"][name] for c in costs) for name in ("train", "evaluate")}
    times = {"harvest": costs[0]["seconds"]["harvest"]} | times
    report |= {
        "steps": costs[0]["steps"],
        "disk_bytes": disk | {"total": sum(disk.values())},
        "memory_bytes": most,
        "seconds": times | {"total": sum(times.values())},
    }


def _deepest(plan: SweepPlan) -> str:
    """The hook point behind which the pass ends, as far as the names tell."""

    def layer(hook: str) -> int:
        found = re.search(r"layers\.(\d+)\.", hook)
        return int(found[1]) if found else -1

    return max(plan.hooks, key=layer)


def estimate_text(report: dict[str, Any]) -> str:
    """The estimate as lines for people."""
    from .estimate import estimate_text as lines_of

    hooks, n = report["hook_points"], len(report["runs"])
    steps = f", {report['steps']:,} steps each" if "steps" in report else ""
    head = f"{n} SAEs{steps}, on one harvest of {', '.join(hooks)}"
    shown = {key: value for key, value in report.items() if key != "steps"}
    return "\n".join([head, *(f"  {name}" for name in report["runs"]), lines_of(shown)])
