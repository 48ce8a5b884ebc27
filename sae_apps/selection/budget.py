"""How many rows are picked, and in which turn: budgets, strategies, strata of length.

A ranking is the rows from best to worst. ``topk`` and ``max`` go down one ranking (by the score
against the only prototype, or by the best score over the groups), and so does ``nearest`` (by the
mean of the three best scores); ``round_robin`` gives the groups turns, each taking the best row of
its own ranking that is still free (RDS+, arXiv 2503.01807).

Strata answer the length bias of the published score without touching it: a row of L tokens lies in
bin floor(log2 L), and a bin gets its share of the budget.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sae_core.errors import UserError

STRATEGIES = ("topk", "max", "nearest", "round_robin")
LENGTHS = ("none", "strata", "target_strata")
_AMOUNT = re.compile(r"\s*([0-9][0-9_,]*\.?[0-9]*|\.[0-9]+)\s*([kKmM]?)\s*(%|rows?|tokens?)?\s*")
_MANY = {"": 1, "k": 1000, "m": 1_000_000}


@dataclass(frozen=True)
class Budget:
    """An amount of rows or of tokens, or a share of the rows."""

    amount: float
    """Rows, tokens, or a share in (0, 1]."""
    unit: str
    """rows, tokens or share."""

    def of_pool(self, lengths: Int[np.ndarray, " n"], *, n_pool: int | None = None) -> int:
        """The budget in rows, or in tokens where ``unit`` is tokens.

        Args:
            lengths: [n] tokens of the rows that may be picked.
            n_pool: rows that a share refers to; None: those that may be picked.
        Raises:
            UserError: more than there is.
        """
        if self.unit == "tokens":
            have, wanted = int(lengths.sum()), int(self.amount)
        elif self.unit == "share":
            # at least one row; halves go up, whatever floating point makes of 0.05 * 3000
            share = self.amount * (n_pool if n_pool is not None else len(lengths))
            have, wanted = len(lengths), max(1, math.floor(share + 0.5 + 1e-9))
        else:
            have, wanted = len(lengths), int(self.amount)
        if wanted > have:
            unit = "tokens" if self.unit == "tokens" else "rows"
            raise UserError(
                f"Expected a budget of at most the {have} {unit} of the pool that may be picked, "
                f"got {wanted} {unit}."
            )
        return wanted


def parse_budget(budget: Budget | float | int | str) -> Budget:
    """Understand 0.05, "5%", 1000, "1000 rows", "10k", "200k tokens".

    A whole number counts rows, a fraction in (0, 1) is a share; so are 1.0 and "1.0".

    Raises:
        UserError: anything else.
    """
    if isinstance(budget, Budget):
        return budget
    wanted = f'Expected a budget like 0.05, "5%", 1000 or "200k tokens", got {budget!r}.'
    if isinstance(budget, bool) or not isinstance(budget, int | float | str | np.number):
        raise UserError(wanted)
    # str writes fractions below 0.0001 with an exponent
    is_real = isinstance(budget, float | np.floating)
    found = _AMOUNT.fullmatch(
        np.format_float_positional(budget, trim="0") if is_real else str(budget)
    )
    if not found:
        raise UserError(wanted)
    number, many, unit = found[1].replace("_", "").replace(",", ""), found[2].lower(), found[3]
    value = float(number) * _MANY[many]
    if unit == "%":
        value, unit = value / 100, "share"
    elif unit is None and "." in number and not many:
        unit = "share"
    else:
        unit = "tokens" if unit in ("token", "tokens") else "rows"
    whole = unit == "share" or value == int(value)
    if value <= 0 or not whole or unit == "share" and value > 1:
        raise UserError(wanted)
    return Budget(value, unit)


def length_bins(lengths: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """floor(log2 L) of each row's tokens; rows of 0 and 1 tokens are in bin 0."""
    return np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1


def quotas(
    amount: int, bins: Int[np.ndarray, " m"], cost: Int[np.ndarray, " m"], n_bins: int
) -> Int[np.ndarray, " n_bins"]:
    """Shares of the budget by length, as a histogram of costs has them; they sum to ``amount``.

    Args:
        amount: rows or tokens.
        bins: bin of each row of the pool, or of each target.
        cost: what each of them counts: 1, or its tokens.
        n_bins: bins of the pool; targets that are longer count in the last one.
    """
    weight = np.bincount(np.minimum(bins, n_bins - 1), cost, minlength=n_bins)
    exact = amount * weight / weight.sum()
    floor = np.floor(exact).astype(np.int64)
    largest = np.argsort(floor - exact, kind="stable")[: amount - floor.sum()]
    floor[largest] += 1  # largest remainder, ties to the shorter
    return floor


class Room:
    """What is left of the budget, bin by bin; a bin closes at the first row too large for it."""

    def __init__(
        self,
        cost: Int[np.ndarray, " n"],
        bins: Int[np.ndarray, " n"],
        quota: Int[np.ndarray, " n_bins"],
    ) -> None:
        self.cost = cost
        self.bins = bins
        self.left = quota.astype(np.int64).tolist()
        self.is_open = [left > 0 for left in self.left]
        self.is_free = np.ones(len(cost), dtype=bool)

    def take(self, row: int) -> bool:
        """Take a row if it is free and its bin has room."""
        number = int(self.bins[row])
        if not self.is_free[row] or not self.is_open[number]:
            return False
        left = self.left[number] - int(self.cost[row])
        if left < 0:
            self.is_open[number] = False
            return False
        self.left[number] = left
        self.is_open[number] = left > 0
        self.is_free[row] = False
        return True


def in_turns(
    rankings: Sequence[Int[np.ndarray, " l"]], room: Room, *, is_whole: bool = True
) -> list[tuple[int, int, int]] | None:
    """Each ranking in turn takes its best row that is free, until there is no room.

    With one ranking that is its top rows.

    Args:
        rankings: places of rows, best first.
        room: what may be taken; it is used up.
        is_whole: whether the rankings hold every row, or only the tops.
    Returns:
        (row, number of the ranking, place in it) in the order of picking; None where a ranking
        that is not whole came to its end while there was room.
    """
    picks: list[tuple[int, int, int]] = []
    cursors = [enumerate(ranking.tolist()) for ranking in rankings]
    active = list(range(len(rankings)))
    while active and any(room.is_open):
        for number in list(active):
            found = next(((row, i) for i, row in cursors[number] if room.take(row)), None)
            if found is not None:
                picks.append((found[0], number, found[1]))
            elif any(room.is_open):
                if not is_whole:
                    return None
                active.remove(number)
    return picks


class TopLists:
    """The best rows of each group in a stream of scores: ``size`` of them, not all.

    Equal scores keep the order of the rows.
    """

    def __init__(self, n_groups: int, size: int) -> None:
        self.size = size
        self._scores = [np.empty(0, dtype=np.float32) for _ in range(n_groups)]
        self._rows = [np.empty(0, dtype=np.int64) for _ in range(n_groups)]

    def update(self, scores: Float[np.ndarray, "n n_groups"], rows: Int[np.ndarray, " n"]) -> None:
        """Add n rows whose places are larger than all before."""
        for group, (held, places) in enumerate(zip(self._scores, self._rows, strict=True)):
            column = scores[:, group]
            if len(held) >= self.size:
                # once the list is full, an equal score comes too late
                better = np.flatnonzero(column > held[self.size - 1])
            else:
                better = np.arange(len(column))
            both = np.concatenate([held, column[better]])
            order = np.argsort(-both, kind="stable")[: self.size]
            self._scores[group] = both[order]
            self._rows[group] = np.concatenate([places, rows[better]])[order]

    def rankings(self) -> list[Int[np.ndarray, " l"]]:
        """Places of each group's rows, best first."""
        return self._rows

    def scores(self) -> list[Float[np.ndarray, " l"]]:
        """Their scores."""
        return self._scores
