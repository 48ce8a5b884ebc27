"""What suppression costs in time: tokens generated a second, and how fast a fit reads.

    python -m benchmarks.suppression_cost

SmolLM2-135M, APP with 64 GBA latents of layer 15 (the SAE of benchmarks.selection_data), fitted on
paradetox. Generation: greedy, batches of 1 and 8 prompts, plain and inside ``suppress`` in turns;
the share is the median over rounds of plain seconds over suppressed seconds, so that a load on the
machine that lasts longer than a round cancels. Fitting: tokens a second of ``fit_app`` with its
tests and calibration, over those of streaming the same texts through the model alone, in turns.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.common import Goal, write_result
from benchmarks.concept_data import load
from benchmarks.selection_data import saes
from sae_apps.suppression.fit import FitConfig, fit_app
from sae_apps.suppression.suppress import suppress
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.models import DEFAULT_MODEL, LanguageModel, load_model
from sae_core.text import rows_from_texts

HOOK = "layers.15.out"
N_TEXTS, NEW_TOKENS, ROUNDS, FIT_ROUNDS = 400, 48, 7, 3
HARVEST = HarvestConfig(context_size=64)
PROMPTS = [
    "The best way to learn a language is", "In the middle of the night", "A computer program",
    "The history of Paris begins", "My neighbour told me", "When the rain stopped",
    "The main result of the study", "She opened the door and",
]  # fmt: skip


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def generation_row(lm: LanguageModel, app: Any, batch: int, rounds: int) -> dict[str, Any]:
    """Plain and suppressed generation in turns."""
    tokenizer = lm.tokenizer
    tokenizer.padding_side = "left"
    ids = tokenizer(PROMPTS[:batch], return_tensors="pt", padding=True)

    def generate() -> None:
        lm.model.generate(
            **ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )  # fmt: skip

    generate()
    plain, edited = [], []
    for _ in range(rounds):
        plain.append(seconds(generate))
        with suppress(lm, app):
            edited.append(seconds(generate))
    shares = [a / b for a, b in zip(plain, edited, strict=True)]
    n = batch * NEW_TOKENS
    return {
        "name": f"generate, batch {batch}", "what": "generate", "batch": batch, "rounds": rounds,
        "plain_tokens_s": n / median(plain), "tokens_s": n / median(edited),
        "share": median(shares), "share_low": min(shares), "share_high": max(shares),
    }  # fmt: skip


def fit_row(lm: LanguageModel, sae: Any, rounds: int) -> dict[str, Any]:
    """Fitting and bare harvesting of the same texts in turns."""
    data = load("paradetox").balanced(N_TEXTS, 0)
    rows = rows_from_texts(list(data.texts))

    def harvest() -> int:
        return sum(len(found[HOOK]) for found in stream_activations(lm, rows, [HOOK], HARVEST))

    def fit() -> Any:
        return fit_app(
            lm, sae, data.texts, data.labels, "toxic",
            groups=data.group, hook_point=HOOK, config=FitConfig(harvest=HARVEST),
        )  # fmt: skip

    n = harvest()
    bare, whole = [], []
    for _ in range(rounds):
        bare.append(seconds(harvest))
        whole.append(seconds(fit))
    shares = [a / b for a, b in zip(bare, whole, strict=True)]
    return {
        "name": "fit", "what": "fit", "batch": None, "rounds": rounds,
        "plain_tokens_s": n / median(bare), "tokens_s": n / median(whole),
        "share": median(shares), "share_low": min(shares), "share_high": max(shares),
    }  # fmt: skip


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Generation at 95% of the plain rate, fitting at 80% of harvesting."""
    wanted = {"generate": 0.95, "fit": 0.8}
    return [
        Goal(f"{row['name']}: share of the plain rate", row["share"], f">= {wanted[row['what']]}",
             row["share"] >= wanted[row["what"]],
             f"{row['tokens_s']:.0f} of {row['plain_tokens_s']:.0f} tokens/s; rounds "
             f"{row['share_low']:.2f} to {row['share_high']:.2f}")
        for row in rows
    ]  # fmt: skip


def main() -> None:
    """Measure and write results/suppression_cost.json."""
    parser = argparse.ArgumentParser(description="What suppression costs in time.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds, started = parser.parse_args().rounds, time.time()
    sae = saes()["gba"]
    lm = load_model(DEFAULT_MODEL, dtype=torch.bfloat16)
    data = load("paradetox").balanced(N_TEXTS // 2, 1)
    app = fit_app(lm, sae, data.texts, data.labels, "toxic", hook_point=HOOK,
                  config=FitConfig(harvest=HARVEST))  # fmt: skip
    rows = [generation_row(lm, app, batch, rounds) for batch in (1, 8)]
    rows.append(fit_row(lm, sae, FIT_ROUNDS))
    write_result("suppression_cost", rows, goals, started)


if __name__ == "__main__":
    main()
