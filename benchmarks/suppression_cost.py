"""What suppression costs in time: tokens generated a second, and how fast a fit reads.

    python -m benchmarks.suppression_cost

SmolLM2-135M, APP with 64 GBA latents of layer 15 (the SAE of benchmarks.selection_data), fitted on
paradetox. Generation: greedy, batches of 1 and 8 prompts, plain and inside ``suppress`` in turns.
Fitting: tokens a second of ``fit_app`` with its tests and calibration, and of streaming the same
texts through the model alone, in turns. Seconds are those of the processor on one thread, since
others work on the machine; caches and cores that are shared still move a turn by a fifth, and only
upwards, so the share is the least plain seconds over the least of the others, and the median of the
rounds stands beside it. ``hook``: microseconds of the hook alone, on the tokens of one step.
Memory: how much the peak of the process grows when residual dimensions of layer 0, 2.3 kB a token,
are fitted on eight times the texts.
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
from sae_apps.suppression.suppress import edited, suppress
from sae_apps.tasks.evaluation import peak_memory
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.models import DEFAULT_MODEL, LanguageModel, load_model
from sae_core.text import rows_from_texts

HOOK = "layers.15.out"
N_TEXTS, NEW_TOKENS, ROUNDS, FIT_ROUNDS = 400, 16, 12, 3
MEMORY_HOOK, TIMES = "layers.0.out", 8
HARVEST = HarvestConfig(context_size=64)
PROMPTS = [
    "The best way to learn a language is", "In the middle of the night", "A computer program",
    "The history of Paris begins", "My neighbour told me", "When the rain stopped",
    "The main result of the study", "She opened the door and",
]  # fmt: skip


def seconds(call: Callable[[], Any]) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def in_turns(
    plain: Callable[[], Any], other: Callable[[], Any], rounds: int, n_tokens: int
) -> dict[str, Any]:
    """Rates of two calls, which of them comes first changing from round to round."""
    took: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for is_plain in (True, False) if number % 2 else (False, True):
            took[is_plain].append(seconds(plain if is_plain else other))
    shares = [a / b for a, b in zip(took[True], took[False], strict=True)]
    return {
        "rounds": rounds, "plain_tokens_s": n_tokens / min(took[True]),
        "tokens_s": n_tokens / min(took[False]), "share": min(took[True]) / min(took[False]),
        "share_median": median(shares), "share_low": min(shares), "share_high": max(shares),
    }  # fmt: skip


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

    def suppressed() -> None:
        with suppress(lm, app):
            generate()

    suppressed()
    found = in_turns(generate, suppressed, rounds, batch * NEW_TOKENS)
    value = torch.randn(batch, 1, app.units.d_in, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": torch.full((batch, 1), ids["input_ids"][0, -1].item())}
    hook = [
        seconds(lambda: [edited(lm, app, value, inputs) for _ in range(100)]) for _ in range(10)
    ]
    return {
        "name": f"generate, batch {batch}", "what": "generate", "batch": batch,
        "hook_us": min(hook) * 1e4, **found,
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

    return {
        "name": "fit", "what": "fit", "batch": None, "hook_us": None,
        **in_turns(harvest, fit, rounds, harvest()),
    }  # fmt: skip


def memory_row(lm: LanguageModel) -> dict[str, Any]:
    """Growth of the peak; the first fit has filled everything that is of bounded size."""
    data = load("paradetox").balanced(N_TEXTS // 2, 0)
    rows = rows_from_texts(list(data.texts))
    stream = stream_activations(lm, rows, [MEMORY_HOOK], HARVEST)
    n = sum(len(found[MEMORY_HOOK]) for found in stream)
    peaks = []
    for times in (1, TIMES):
        fit_app(
            lm, None, list(data.texts) * times, list(data.labels) * times, "toxic",
            hook_point=MEMORY_HOOK, kind="residual", config=FitConfig(harvest=HARVEST),
        )  # fmt: skip
        peaks.append(peak_memory() / 2**20)
    return {
        "name": "fit, memory", "what": "memory", "tokens": n, "times": TIMES,
        "peak_mib": peaks[0], "grown_mib": peaks[1] - peaks[0],
        "values_mib": (TIMES - 1) * n * lm.d_model * 12 / 2**20,
    }  # fmt: skip


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Generation at 95% of the plain rate, fitting at 80% of harvesting, memory that stays."""
    wanted = {"generate": 0.95, "fit": 0.8}
    found = []
    for row in rows:
        if row["what"] == "memory":
            share = row["grown_mib"] / row["values_mib"]
            found.append(
                Goal(f"{row['name']}: growth over the bytes of the values", share, "<= 0.1",
                     share <= 0.1,
                     f"{row['grown_mib']:.0f} MiB on {row['peak_mib']:.0f} from {row['tokens']} to "
                     f"{row['tokens'] * row['times']} tokens, their values {row['values_mib']:.0f}")
            )  # fmt: skip
            continue
        hook = f"; hook at most {row['hook_us']:.0f} us a step" if row["hook_us"] else ""
        least = wanted[row["what"]]
        found.append(
            Goal(f"{row['name']}: share of the plain rate", row["share"], f">= {least}",
                 row["share"] >= least,
                 f"{row['tokens_s']:.0f} of {row['plain_tokens_s']:.0f} tokens a processor second; "
                 f"rounds {row['share_low']:.2f} to {row['share_high']:.2f}, median "
                 f"{row['share_median']:.2f}{hook}")
        )  # fmt: skip
    return found


def main() -> None:
    """Measure and write results/suppression_cost.json."""
    parser = argparse.ArgumentParser(description="What suppression costs in time.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of generation")
    parser.add_argument("--fit-rounds", type=int, default=FIT_ROUNDS, help="of fitting")
    args, started = parser.parse_args(), time.time()
    sae = saes()["gba"]
    lm = load_model(DEFAULT_MODEL, dtype=torch.bfloat16)
    rows = [memory_row(lm)]
    data = load("paradetox").balanced(N_TEXTS // 2, 1)
    app = fit_app(lm, sae, data.texts, data.labels, "toxic", hook_point=HOOK,
                  config=FitConfig(harvest=HARVEST))  # fmt: skip
    rows += [generation_row(lm, app, batch, args.rounds) for batch in (1, 8)]
    rows.append(fit_row(lm, sae, args.fit_rounds))
    write_result("suppression_cost", rows, goals, started)


if __name__ == "__main__":
    main()
