"""What a finished training gives: quality on held-out text, requested against achieved rates."""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import plain, to_json, token_count
from .progress import Progress, duration, progress
from .runs import RunFolder

if TYPE_CHECKING:
    from sae_core.sae import SAE
    from sae_core.shards import ShardedActivations
    from sae_core.state import TrainState

    from .inputs import Inputs
    from .settings import TrainSettings

EVAL_BATCH = 2048  # tokens
LOSSES = 4  # as it is, with the SAE, with zeros, with the mean


@contextmanager
def counted_passes(model: Any, shown: Progress) -> Iterator[None]:
    """Show every forward pass that begins inside the block."""
    handle = model.register_forward_pre_hook(lambda *_: shown.update())
    try:
        yield
    finally:
        handle.remove()


def evaluate_run(
    settings: "TrainSettings",
    inputs: "Inputs",
    sae: "SAE",
    state: "TrainState",
    held_out: "ShardedActivations",
    *,
    quiet: bool,
) -> dict[str, Any]:
    """FVU, L0, dead fraction, firing frequencies and loss recovered on held-out tokens."""
    from sae_core.gba import group_frequencies
    from sae_core.metrics import evaluate, loss_batches, loss_recovered
    from sae_core.tokens import count_tokens, token_windows

    batches = progress(
        held_out.iter_sequential(EVAL_BATCH),
        "evaluate",
        -(-held_out.n_tokens // EVAL_BATCH),
        "batches",
        enabled=not quiet,
    )
    quality = evaluate(sae, batches)
    is_gba = sae.config.kind == "gba"
    freq = state.taf.new_tensor(quality.freq)
    groups = group_frequencies(freq, state.group, state.taf) if is_gba else ()
    rows, lm = inputs.held_out_rows, inputs.lm
    wanted = token_count(settings.run.loss_tokens)
    config = replace(
        settings.harvest, max_tokens=count_tokens(lm.tokenizer, rows, settings.harvest, wanted)
    )
    for_the_mean = sum(len(w.batches) for w in token_windows(lm.tokenizer, rows, config))
    passes = for_the_mean + LOSSES * sum(1 for _ in loss_batches(lm, rows, config))
    shown = Progress("loss recovered", passes, "passes", enabled=not quiet)
    with shown, counted_passes(lm.model, shown):
        loss = loss_recovered(lm, sae, rows, inputs.hook_point, config)
    return {
        "kind": sae.config.kind,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "fvu": quality.fvu,
        "fvu_raw": quality.fvu_raw,
        "l0": quality.l0,
        "dead_fraction": quality.dead_fraction,
        "alive_frac": 1 - quality.dead_fraction,
        "n_eval_tokens": quality.n_tokens,
        "loss_recovered": asdict(loss),
        "groups": [asdict(group) for group in groups],
        "freq": quality.freq,
        "peak": quality.peak,
    }


def finish(
    run: RunFolder, sae: "SAE", state: "TrainState", results: dict[str, Any]
) -> dict[str, Any]:
    """Write the SAE with what belongs to it, then results.json; return the results."""
    from sae_core.disk import atomic_write_text
    from sae_core.sae import save_sae
    from sae_core.sealed import sealed

    per_latent = {name: results.pop(name).tolist() for name in ("freq", "peak")}
    extra = {name: results["provenance"][name] for name in ("model_id", "model_revision")}
    extra |= {"hook_point": results["provenance"]["hook_point"]} | per_latent
    extra |= {"group": state.group.tolist(), "taf": state.taf.tolist()}
    save_sae(run.sae, sae, extra, overwrite=True)
    atomic_write_text(run.results_file, to_json(sealed(plain(results))) + "\n")
    return results


def peak_memory() -> int:
    """Largest resident size of this process, bytes.

    Linux counts into ``ru_maxrss`` what the parent held when it forked; VmHWM begins at zero.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text().splitlines())
        return next(1024 * int(words[1]) for words in lines if words[0] == "VmHWM:")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def machine() -> str:
    """The processor as far as the system tells, and the threads in use."""
    import torch

    name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"


def as_text(results: dict[str, Any]) -> str:
    """Results as lines for people."""
    loss = results["loss_recovered"]
    lines = [
        f"SAE of kind {results['kind']} with {results['d_sae']:,} latents on "
        f"{results['provenance']['hook_point']} of {results['provenance']['model_id']}, "
        f"{results['n_tokens']:,} training tokens in {duration(results['wall_seconds'])}",
        f"held out ({results['n_eval_tokens']:,} tokens):",
        f"  FVU             {results['fvu']:.4f}",
        f"  L0              {results['l0']:.1f} active latents a token",
        f"  alive           {100 * results['alive_frac']:.1f}% of the latents",
        f"  loss recovered  {100 * loss['recovered_zero']:.1f}% against zeros, "
        f"{100 * loss['recovered_mean']:.1f}% against the mean "
        f"({loss['ce_clean']:.3f} -> {loss['ce_sae']:.3f} nats a token)",
    ]
    if results["groups"]:
        lines.append("  group  asked for   median     mean      max  above 1.1x   dead  latents")
        lines += [
            f"  {g['group']:>5}  {g['taf']:>9.5f}  {g['median_freq']:.5f}  {g['mean_freq']:.5f}  "
            f"{g['max_freq']:.5f}  {g['n_above']:>10}  {g['n_dead']:>5}  {g['n_latents']:>7}"
            for g in results["groups"]
        ]
    lines.append(f"written to {results['out']}")
    return "\n".join(lines)
