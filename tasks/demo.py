"""``sae-apps demo``: train, evaluate, featurize and report on the built-in model and text.

A recipe over the functions of ``train``, ``featurize`` and ``inspect``: whatever is finished in the
folder is used again.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import PROG, StopSignal, run_command
from .evaluation import peak_memory
from .featurize import FeaturizeOptions, FinishedRun, featurize_run, open_run
from .inspect import InspectOptions, describe_latents
from .parsing import CommandParser, take
from .progress import duration
from .runs import RunFolder, read_metrics
from .stored import stored_rows
from .train import train_run

if TYPE_CHECKING:
    from sae_core.features import SparseFeatures

    from .settings import TrainSettings

LOG = logging.getLogger(__name__)
EXAMPLE = f"{PROG} demo --out runs/demo"
N_LATENTS, N_TEXTS = 20, 5
# bfloat16 is chosen where its matrix products are this much faster than float32's.
BF16_GAIN = 1.3
CEILING_SLACK = 1.1  # as in GroupFrequency.n_above


@dataclass(frozen=True)
class DemoOptions:
    """The demo."""

    out: str = "runs/demo"
    """Folder of the run; the same command continues or shows what is in it."""


def main(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "demo",
        "Train an SAE with target firing rates on 450,000 tokens of the built-in text through "
        "SmolLM2-135M, evaluate it, and write a report with twenty latents and their top texts. "
        "Takes about ten minutes on two processor cores.",
        EXAMPLE,
    )
    parser.add_options(DemoOptions)
    options = parser.parse(argv)
    out = take(DemoOptions, options).out

    def work(stop: StopSignal) -> tuple[Any, str]:
        settings = demo_settings(out)
        if options.dry_run:
            from .estimate import estimate_text, estimate_training

            report = estimate_training(settings)
            return report, estimate_text(report)
        results = demo_run(settings, stop, quiet=options.quiet)
        return results, as_text(results)

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)


def demo_settings(out: str) -> "TrainSettings":
    """The recipe, in the precision of the run that is in the folder, or the faster one."""
    import torch

    from .doctor import gemm_flops
    from .recipes import demo

    run = RunFolder(Path(out))
    if run.run_file.is_file():
        kept = run.read()["config"].get("model", {}).get("dtype")
        return demo(out, precision="bfloat16" if kept == "bfloat16" else "float32")
    is_faster = gemm_flops(torch.bfloat16) > BF16_GAIN * gemm_flops(torch.float32)
    return demo(out, precision="bfloat16" if is_faster else "float32")


def demo_run(settings: "TrainSettings", stop: StopSignal, *, quiet: bool = False) -> dict[str, Any]:
    """Bring the demo to its end; returns the results with the report's place.

    Raises:
        UserError: the folder holds another run, or the model or text cannot be had.
        Interrupted: SIGINT or SIGTERM came; the same call continues.
    """
    results = train_run(settings, stop, quiet=quiet)
    out = Path(results["out"])
    report = out / "report.html"
    if report.is_file():
        LOG.info("%s is there: nothing to do.", report)
    else:
        start = time.monotonic()
        run = open_run(str(out))
        options = FeaturizeOptions(run=str(out), stored=True)
        rows, folder = stored_rows(run), out / "features"
        features = featurize_run(run, rows, options, folder, quiet=quiet)
        cards = latent_cards(run, features, quiet=quiet)
        shown = results | {
            "n_rows": features.n_rows,
            "wall_seconds": results["wall_seconds"] + time.monotonic() - start,
            "peak_memory_bytes": max(results["peak_memory_bytes"], peak_memory()),
        }
        write_page(report, out, shown, cards)
    return results | {"report": str(report)}


def latent_cards(
    run: FinishedRun, features: "SparseFeatures", *, quiet: bool = False
) -> list[dict[str, Any]]:
    """Latents over the range of frequencies, with top texts and their share of each domain."""
    from sae_core.exemplars import choose_latents

    latents = list(choose_latents(features, N_LATENTS, seed=run.settings.run.seed))
    options = InspectOptions(texts=N_TEXTS)
    found = describe_latents(run, features, latents, options, quiet=quiet)["latents"]
    return [card | {"shares": domain_shares(features, card["latent"])} for card in found]


def domain_shares(features: "SparseFeatures", latent: int) -> dict[str, float]:
    """Share of each domain in a latent's activation, summed over the rows where it fires."""
    row_ids, acts = features.top_rows(latent, features.n_rows)
    domains = features.rows["domain"].take(features.row_index(row_ids)).to_pylist()
    sums: dict[str, float] = {}
    for domain, act in zip(domains, acts.tolist(), strict=True):
        sums[domain] = sums.get(domain, 0.0) + act
    total = sum(sums.values())
    return {domain: value / total for domain, value in sums.items()}


def write_page(path: Path, out: Path, results: dict[str, Any], cards: list[dict[str, Any]]) -> None:
    """The report: key facts, training curves, requested against achieved rates, latents."""
    from sae_apps.report import (
        build_page,
        frequencies_section,
        latents_section,
        overview_section,
        training_section,
        write_report,
    )

    sections = [
        overview_section(results),
        training_section(
            read_metrics(RunFolder(out).metrics_file),
            dead_window_tokens=results["dead_after_tokens"],
        ),
        frequencies_section(results["groups"], n_tokens=results["n_eval_tokens"]),
        latents_section(cards),
    ]
    subtitle = (
        f"{results['kind'].upper()} with {results['d_sae']:,} latents on "
        f"{results['provenance']['hook_point']} of {results['provenance']['model_id']}"
    )
    write_report(path, build_page("Sparse autoencoder: the demo run", subtitle, sections))


def headline(results: dict[str, Any]) -> list[str]:
    """The five numbers that say how the run went, as lines."""
    above = sum(group["n_above"] for group in results["groups"])
    within = 1 - above / results["d_sae"]
    lost = results["loss_recovered"]
    return [
        f"variance left unexplained (FVU)   {results['fvu']:.3f}",
        f"active latents a token (L0)       {results['l0']:.1f} of {results['d_sae']:,}",
        f"latents alive                     {100 * results['alive_frac']:.1f}%",
        f"loss recovered                    {100 * lost['recovered_zero']:.1f}%",
        f"latents within {CEILING_SLACK} x their ceiling {100 * within:.1f}%",
    ]


def as_text(results: dict[str, Any]) -> str:
    """The headline numbers and where the report is."""
    return "\n".join(
        [
            f"On {results['n_eval_tokens']:,} held-out tokens, after {results['n_tokens']:,} "
            f"training tokens ({duration(results['wall_seconds'])}):",
            *(f"  {line}" for line in headline(results)),
            f"report: {results['report']}",
        ]
    )
