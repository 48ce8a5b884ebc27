"""Cells of the fine-tuning suite: what each is trained and measured on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from benchmarks.finetune_table import UNTRAINED
from benchmarks.tuning import Example, Setting, encode
from sae_core.errors import UserError

MAX_SEEDS = 5  # examples of so many draws are kept out of the held-out rows, however many run
END = "####"  # stands before the final number of a GSM8K solution


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    pool: str
    """Size of the pool in benchmarks.selection_data."""
    shares: tuple[float, ...]
    """Budgets as parts of the pool's tokens."""
    n_held: int
    """Held-out rows a target."""
    n_ranked: int
    """Of these, rows whose solutions are ranked."""
    setting: Setting


SIZES = {
    "cpu": Size("reduced", (0.02,), 48, 16, Setting()),
    "reduced": Size("reduced", (0.01, 0.05), 200, 100, Setting(0, batch_tokens=2048, max_len=1024)),
    "full": Size("full", (0.01, 0.05), 200, 100, Setting(0, batch_tokens=8192, max_len=1024)),
}


class Cell(NamedTuple):
    """One training run, or none (`untrained`)."""

    method: str
    target: str
    share: float
    """Budget as a part of the pool's tokens."""
    seed: int
    picks: tuple[Example, ...]
    n_hits: int
    """Picks that the benchmark counts as relevant."""


class Held(NamedTuple):
    """Held-out rows of a target."""

    rows: list[Example]
    ranked: list[list[Example]]
    """Solutions of some of them: the true one, then the wrong ones."""


def wrong_solutions(response: str, rng: np.random.Generator, n: int = 3) -> list[str]:
    """The solution with its final number replaced, wherever it stands, by others of equal length.

    Args:
        response: a GSM8K solution, its last line `#### number`.
        rng: chooses among the numbers at most 20 away.
        n: wrong solutions wanted.

    Returns:
        n texts; none where the number is no plain integer or has fewer neighbours.
    """
    right = response.rpartition(END)[2].strip()
    if not (right.isascii() and right.isdigit()):
        return []
    near = [int(right) + d for d in range(-20, 21) if d]
    found = [str(v) for v in near if v >= 0 and len(str(v)) == len(right)]
    if len(found) < n:
        return []
    whole = re.compile(rf"(?<![\d.,]){right}(?!\d|[.,]\d)")
    return [whole.sub(found[i], response) for i in rng.permutation(len(found))[:n]]


def spend(order: Sequence[int], n_tokens: Int[np.ndarray, " n"], budget: int) -> list[int]:
    """Places from the top of the order until the budget is spent; what exceeds its rest is passed.

    Args:
        order: places, the best first.
        n_tokens: tokens of every place.
        budget: tokens.
    """
    taken = []
    smallest = int(np.min(n_tokens[np.asarray(order)])) if len(order) else 0
    for place in order:
        if n_tokens[place] <= budget:
            taken.append(int(place))
            budget -= int(n_tokens[place])
        if budget < smallest:
            break
    return taken


def is_member(label: str, target: str) -> bool:
    """Whether rows of a label belong to a target, a mixture (`mix:bbh`) included."""
    family = target.removeprefix("mix:")
    return label == target or (family != target and label.partition(":")[0] == family)


def held_out(tokenizer: Any, rows: Sequence[Any], target: str, size: Size, seen: set[str]) -> Held:
    """Held-out rows of a target, none among the texts `seen`; labels take turns."""
    rng = np.random.default_rng(0)
    by_label: dict[str, list[Any]] = {}
    for row in rows:
        if row.held_out and is_member(row.label, target) and row.text not in seen:
            by_label.setdefault(row.label, []).append(row)
    turns = [(i, label) for label, some in sorted(by_label.items()) for i in range(len(some))]
    shuffled = {label: rng.permutation(len(some)) for label, some in sorted(by_label.items())}
    chosen = [by_label[label][shuffled[label][i]] for i, label in sorted(turns)][: size.n_held]
    max_len = size.setting.max_len
    found, ranked = [encode(tokenizer, r.prompt, r.response, max_len) for r in chosen], []
    for row in chosen if target == "gsm8k" else ():
        texts = [row.response, *wrong_solutions(row.response, rng)]
        group = [encode(tokenizer, row.prompt, text, max_len) for text in texts]
        # a solution that is cut may have lost its number
        if len(group) > 1 and all(one.stop < len(one.ids) for one in group):
            ranked.append(group)
    return Held(found, ranked[: size.n_ranked])


def make_cells(
    bench: Any, examples: dict[int, Example], methods: Sequence[str], targets: Sequence[str],
    shares: Sequence[float], n_seeds: int,
) -> list[Cell]:  # fmt: skip
    """All cells, those of a target together; `examples` are the pool's trainable rows by place.

    Raises:
        UserError: no such method or target.
    """
    from benchmarks.selection import main_methods

    data = bench.data
    known = {method.name: method for method in main_methods(bench)}
    aims = {aim.name: aim for aim in bench.aims}
    for asked, there in ((methods, known), (targets, aims)):
        if missing := [name for name in asked if name not in there]:
            raise UserError(f"Expected names out of {', '.join(there)}, got {missing[0]!r}.")
    n_tokens = np.zeros(len(data.rows), dtype=np.int64)
    n_tokens[list(examples)] = [len(one.ids) for one in examples.values()]
    draws = [aims[target].draws[seed] for target in targets for seed in range(n_seeds)]
    order: dict[tuple[str, str, int], list[int]] = {}
    for name in methods:
        scored = iter(known[name].score(bench, draws))
        for target in targets:
            for seed in range(n_seeds):
                ranking = data.pool[np.argsort(-next(scored), kind="stable")]
                order[name, target, seed] = [p for p in ranking.tolist() if p in examples]
    cells = []
    for target in targets:
        cells.append(Cell(UNTRAINED, target, 0.0, 0, (), 0))
        hits = set(data.pool[aims[target].is_hit].tolist())
        for seed in range(n_seeds):
            for share in shares:
                for name in methods:
                    budget = int(share * n_tokens.sum())
                    picks = spend(order[name, target, seed], n_tokens, budget)
                    chosen = tuple(examples[place] for place in picks)
                    n_hits = sum(place in hits for place in picks)
                    cells.append(Cell(name, target, share, seed, chosen, n_hits))
    return cells
