"""``--dry-run``: what a command would cost, measured on this machine within a few seconds.

Forward passes and training steps are timed as they are, on a few batches of the text and on random
activations of the same shape. Nothing is written and nothing is downloaded: what is not in the
cache is left out of the estimate, and the answer says so.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_core.errors import UserError

from .cached import absent_model, open_cached
from .common import size, token_count
from .processes import n_processes, shares
from .progress import duration
from .runs import check_free

if TYPE_CHECKING:
    from sae_core.models import LanguageModel
    from sae_core.text import TextRow, TextSource
    from sae_core.tokens import HarvestConfig

    from .featurize import FeaturizeOptions, FinishedRun
    from .settings import TrainSettings

PROBE_SECONDS = 3.0
MIN_BATCHES, MAX_BATCHES = 2, 8
PROBE_ROWS = 512
TRAIN_STEPS = 4
BYTES_A_TOKEN = 12  # row id and position beside each activation vector
BASE_BYTES = 500 * 2**20  # the interpreter with torch and transformers loaded
ADAM_COPIES = 4  # parameter, gradient and two moments
SAVED_COPIES = 3  # parameter and two moments
CHECKPOINTS = 2  # kept on disk, each with the parameter and two moments
# Largest arrays of [batch, d_sae] alive at once in a training step, in units of float32; of a block
# of the batch where nothing is ranked.
DENSE_COPIES = 3


def forward_rate(
    lm: "LanguageModel", rows: "list[TextRow]", hook_points: Sequence[str], config: "HarvestConfig"
) -> tuple[float, dict[str, int]]:
    """Kept tokens a second of the forward pass up to the deepest hook point, and d_in at each."""
    from sae_core.activations import stream_activations

    stream = stream_activations(lm, rows, hook_points, config)
    first = next(stream, None)  # pays for the library's set-up, not timed
    if first is None:
        raise UserError(f"Expected text with tokens, got none in {len(rows)} rows.")
    n_tokens = n_batches = 0
    start = time.monotonic()
    while n_batches < MAX_BATCHES:
        batch = next(stream, None)
        if batch is None:
            break
        n_tokens, n_batches = n_tokens + len(batch[hook_points[0]]), n_batches + 1
        if n_batches >= MIN_BATCHES and time.monotonic() - start > PROBE_SECONDS:
            break
    if not n_tokens:  # the whole text is one batch: time it again
        start = time.monotonic()
        again = stream_activations(lm, rows, hook_points, config)
        n_tokens = sum(len(batch[hook_points[0]]) for batch in again)
    widths = {name: found.d_in for name, found in first.items()}
    return n_tokens / (time.monotonic() - start), widths


def step_seconds(settings: "TrainSettings", d_in: int) -> float:
    """Seconds of one process's share of a training step, on random activations of its shape."""
    import torch

    from sae_core.sae import SAE
    from sae_core.train import train

    token_parts, latent_parts = shares(settings)
    batch_size = settings.train.batch_size // token_parts
    generator = torch.Generator().manual_seed(0)
    config = replace(
        settings.train,
        steps=TRAIN_STEPS,
        init_tokens=min(settings.train.init_tokens, 2 * batch_size),
        log_every=1,
        gba=replace(settings.train.gba, calibrate_tokens=0),
    )

    def stream() -> Iterator[torch.Tensor]:
        while True:
            yield torch.randn(batch_size, d_in, generator=generator)

    shape = settings.sae_config(d_in)
    k = max(1, shape.k // latent_parts)
    shape = replace(shape, d_sae=shape.d_sae // latent_parts, k=k)
    sae = SAE(shape, generator=generator).to(settings.model.device)
    records = train(sae, stream(), config)
    next(records)
    start = time.monotonic()
    steps = sum(1 for _ in records)
    return (time.monotonic() - start) / steps


def estimate_training(settings: "TrainSettings", *, accept_terms: bool = False) -> dict[str, Any]:
    """Tokens, disk, memory and time of a training run; what cannot be known is None.

    Raises:
        UserError: input that the run itself would refuse.
    """
    from sae_core.hooks import resolve_hook_point
    from sae_core.text import split_rows

    from .inputs import with_split_of

    shares(settings)
    settings = with_split_of(settings)
    if settings.run.out:
        check_free(Path(settings.run.out), settings.identity())
    lm, source, notes = open_cached(settings.model, settings.text, accept_terms)
    report: dict[str, Any] = {"missing": notes, "stored_tokens": settings.max_tokens}
    if lm:
        report["hook_point"] = settings.hook_point(lm)
        resolve_hook_point(lm.model, report["hook_point"])
    if lm and source:
        rows = split_rows(source, settings.text.held_out_frac, settings.split_seed)[0]
        report["stored_tokens"] = available_tokens(settings, lm, rows, source.id)
        probe = list(islice(rows, PROBE_ROWS))
        rate, widths = forward_rate(lm, probe, [report["hook_point"]], settings.harvest)
        report |= {"forward_tokens_per_second": rate, "d_in": widths[report["hook_point"]]}
        report["step_seconds"] = step_seconds(settings, report["d_in"])
        add_costs(report, settings, lm)
    if lm:
        report["memory_bytes"] = memory_bytes(settings, lm, report.get("d_in") or lm.d_model)
        report["processes"] = n_processes()
    return report


def available_tokens(
    settings: "TrainSettings", lm: "LanguageModel", rows: "TextSource", text: str
) -> int:
    """Tokens that will be stored of the training rows.

    Raises:
        UserError: there are fewer than were asked for.
    """
    from sae_core.tokens import count_tokens

    asked = settings.max_tokens
    available = count_tokens(lm.tokenizer, rows, settings.harvest, asked)
    if asked and available < asked:
        raise UserError(
            f"--tokens asked for {asked} tokens, the training rows of {text} hold only {available}."
        )
    return available


def add_costs(report: dict[str, Any], settings: "TrainSettings", lm: "LanguageModel") -> None:
    """Steps, disk and time, from the tokens, the width and the rates in the report."""
    from .train import training_config

    config = training_config(settings, report["stored_tokens"])
    report |= {"steps": config.steps, "presented_tokens": config.steps * config.batch_size}
    report["disk_bytes"] = disk_bytes(settings, report)
    report["seconds"] = seconds(settings, report, lm)


def estimate_features(
    run: "FinishedRun",
    source: "TextSource",
    options: "FeaturizeOptions",
    *,
    accept_terms: bool = False,
) -> dict[str, Any]:
    """Tokens and time of featurizing a text; the disk depends on how many latents fire.

    Raises:
        UserError: input that the command itself would refuse.
    """
    from sae_core.tokens import count_tokens

    from .settings import open_model

    model = replace(run.settings.model, name=options.model or run.settings.model.name)
    report: dict[str, Any] = {"missing": [], "stored_tokens": None}
    if missing := absent_model(model.name):
        return report | {"missing": missing}
    lm = open_model(model, accept_terms=accept_terms)
    tokens = count_tokens(lm.tokenizer, source, run.settings.harvest)
    probe = list(islice(source, PROBE_ROWS))
    rate, widths = forward_rate(lm, probe, [run.hook_point], run.settings.harvest)
    if (d_in := widths[run.hook_point]) != run.sae.d_in:
        raise UserError(
            f"The SAE reads activations of width {run.sae.d_in}, "
            f"but {run.hook_point} of {model.name} has {d_in}."
        )
    return report | {
        "stored_tokens": tokens,
        "forward_tokens_per_second": rate,
        "seconds": {"featurize": tokens / rate, "total": tokens / rate},
    }


def disk_bytes(settings: "TrainSettings", report: dict[str, Any]) -> dict[str, int]:
    """Activations, checkpoints and the SAE in the run folder."""
    itemsize = 4 if settings.store_dtype() == "float32" else 2
    tokens = report["stored_tokens"] + token_count(settings.run.eval_tokens)
    weights = sae_bytes(settings, report["d_in"])
    parts = {
        "activations": 0
        if settings.run.activations
        else tokens * (report["d_in"] * itemsize + BYTES_A_TOKEN),
        "checkpoints": CHECKPOINTS * SAVED_COPIES * weights,
        "sae": weights,
    }
    return parts | {"total": sum(parts.values())}


def sae_bytes(settings: "TrainSettings", d_in: int) -> int:
    config = settings.sae_config(d_in)
    matrices = 1 if config.tied else 2
    return 4 * (matrices * d_in * config.d_sae + 3 * config.d_sae + d_in)


def memory_bytes(settings: "TrainSettings", lm: "LanguageModel", d_in: int) -> dict[str, int]:
    """Of the first process: model, its share of the SAE with its optimiser, one batch's dense
    arrays, and the rest of the process; where latents are split, the whole SAE as it is saved."""
    import torch

    from sae_core.kernels.active import block_rows
    from sae_core.step import RANKED

    token_parts, latent_parts = shares(settings, d_in)
    config, train = settings.sae_config(d_in), settings.train
    d_sae = config.d_sae // latent_parts
    start = min(train.init_tokens * d_in * 8 + train.init_tokens * 512 * 8, 2**40)
    n = train.batch_size // token_parts
    if config.kind not in RANKED:
        n = min(n, block_rows(d_sae, torch.float32))
    batch = DENSE_COPIES * 4 * n * d_sae
    weights = sae_bytes(settings, d_in)
    parts = {
        "model": sum(p.numel() * p.element_size() for p in lm.model.parameters()),
        "sae_and_optimiser": ADAM_COPIES * weights // latent_parts,
        "batch": max(batch, start),
        "rest": BASE_BYTES,
    }
    if latent_parts > 1:  # where a checkpoint is put together
        parts["whole_sae"] = SAVED_COPIES * weights
    return parts | {"total": sum(parts.values())}


def seconds(
    settings: "TrainSettings", report: dict[str, Any], lm: "LanguageModel | None"
) -> dict[str, float]:
    """Harvest, training and evaluation at the measured rates."""
    rate = report["forward_tokens_per_second"]
    n_eval = token_count(settings.run.eval_tokens)
    # The loss needs whole forward passes, with and without the SAE: all layers, four times.
    match = re.search(r"\blayers\.(\d+)\.(.+)", report["hook_point"])
    passed = int(match[1]) + (match[2] != "in") if match else 0
    depth = lm.n_layers / max(1, passed) if lm and match else 1.0
    harvested = 0 if settings.run.activations else report["stored_tokens"] + n_eval
    parts: dict[str, float] = {
        "harvest": harvested / rate / n_processes(),
        "train": report["steps"] * report["step_seconds"],
        "evaluate": token_count(settings.run.loss_tokens) * (4 * depth + 1) / rate
        + n_eval / settings.train.batch_size * report["step_seconds"],
    }
    return parts | {"total": sum(parts.values())}


def estimate_text(report: dict[str, Any]) -> str:
    """The estimate as lines for people."""
    lines = []
    if report["stored_tokens"]:
        lines.append(f"tokens  {report['stored_tokens']:,} of text")
        if "steps" in report:
            lines[-1] += (
                f", {report['presented_tokens']:,} shown to the SAE in {report['steps']:,} steps"
            )
    for name, label in (("disk_bytes", "disk"), ("memory_bytes", "memory")):
        if name in report:
            lines.append(f"{label:<7} {_parts(report[name], size)}")
    if (n := report.get("processes", 1)) > 1:
        parts = report["memory_bytes"]
        other = parts["total"] - parts.get("whole_sae", 0)
        lines[-1] += f" in the first of {n} processes, {size(other)} in each other"
    if "seconds" in report:
        lines.append(f"time    {_parts(report['seconds'], duration)}")
        lines.append(
            f"measured here: {report['forward_tokens_per_second']:,.0f} tokens/s through the model "
            "on a few batches of the text"
        )
        if "step_seconds" in report:
            lines[-1] += (
                f", {report['step_seconds']:.3f} s a training step on random activations"
                + (" (a process's share, without what they exchange)" if n > 1 else "")
                + "; memory and disk are computed from the shapes"
            )
    lines += [f"not estimated: {note}" for note in report["missing"]]
    return "\n".join([*lines, "nothing was written"])


def _parts(parts: dict[str, Any], show: Callable[[float], str]) -> str:
    named = [f"{name.replace('_', ' ')} {show(n)}" for name, n in parts.items() if name != "total"]
    return f"{show(parts['total'])} ({', '.join(named)})"
