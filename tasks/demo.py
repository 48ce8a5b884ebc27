"""``sae-apps demo``: train on the built-in model and text, run every application, report.

A recipe over the functions of the other commands: whatever is finished in the folder is used again.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import PROG, StopSignal, read_json, run_command
from .demo_data import demo_files
from .demo_page import write_page
from .demo_stages import Found, run_stages
from .evaluation import peak_memory
from .featurize import FeaturizeOptions, FinishedRun, open_run
from .featurize_run import featurize_run
from .inspect import InspectOptions, describe_latents
from .parsing import CommandParser, take
from .progress import duration
from .runs import RunFolder
from .stored import stored_rows
from .train import train_run

if TYPE_CHECKING:
    from sae_core.features import SparseFeatures

    from .settings import TrainSettings

LOG = logging.getLogger(__name__)
EXAMPLE = f"{PROG} demo --out runs/demo"
N_LATENTS, N_NAMED, N_TEXTS = 14, 3, 5
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
        "Train an SAE with target firing rates on the built-in text through SmolLM2-135M, and a "
        "second one to compare it with; select instruction data, map cities, measure how separable "
        "praise and blame of films are and suppress blame; write one report on all of it. "
        "Takes about a quarter of an hour on two processor cores.",
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
    demo_files()  # first, since the text is made from the same download
    results = train_run(settings, stop, quiet=quiet)
    out = Path(results["out"])
    report = out / "report.html"
    if report.is_file():
        LOG.info("%s is there: nothing to do.", report)
    else:
        start = time.monotonic()
        found = run_stages(settings, stop, quiet=quiet)
        run = open_run(str(out))
        options = FeaturizeOptions(run=str(out), stored=True)
        rows, folder = stored_rows(run), out / "features"
        features = featurize_run(run, rows, options, folder, quiet=quiet)
        cards = latent_cards(run, features, named_latents(found), quiet=quiet)
        shown = results | {
            "n_rows": features.n_rows,
            "wall_seconds": results["wall_seconds"] + time.monotonic() - start,
            "peak_memory_bytes": max(results["peak_memory_bytes"], peak_memory()),
        }
        write_page(report, shown, cards, found)
    return results | {"report": str(report)}


def named_latents(found: Found) -> list[int]:
    """The latents that the applications name first."""
    named = []
    if found.geography is not None:
        named += [one["feature"] for one in found.geography[1]["leading"][:N_NAMED]]
    if found.separability is not None:
        leading = found.separability["units"]["latents"]["leading"]
        named += [one["unit"] for one in leading[:N_NAMED]]
    if found.picks is not None:
        reasons = read_json(found.picks.meta)["summary"]["reasons"]
        named += [one["latent"] for one in reasons[:N_NAMED]]
    return named


def latent_cards(
    run: FinishedRun, features: "SparseFeatures", named: Sequence[int] = (), *, quiet: bool = False
) -> list[dict[str, Any]]:
    """Latents over the range of frequencies, and those named, with top texts and their domains."""
    from sae_core.exemplars import choose_latents

    spread = choose_latents(features, N_LATENTS, seed=run.settings.run.seed)
    latents = [one for one in dict.fromkeys([*spread, *named]) if features.freq[one] > 0]
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
