"""Removal against damage: curves over strengths, matched at equal removal.

Equal strength is no fair comparison between methods, equal removal is: where the curve of a method
first reaches the level e between two strengths, every column is read off on the straight line
between them,

    f = (e - E_i) / (E_{i+1} - E_i),    Y(e) = Y_i + f (Y_{i+1} - Y_i)

Intervals are percentiles over resampled documents; strengths share the resamples, so that a curve
moves as a whole. Matched erasure after GeoAE (github MuhammadUmairHaider/GeoAE, interp/neuronlens).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from sae_core.errors import UserError

LEVEL = 0.95  # of all intervals
ENOUGH = 0.975  # share of resamples that must reach the level before an interval is given


@dataclass(frozen=True, eq=False)
class Curve:
    """One method on one concept over strengths."""

    method: str
    """What edits."""
    concept: str
    """What is to go."""
    strength: Float[np.ndarray, " s"]
    """Ascending, [s]; 0 is the plain model."""
    columns: Mapping[str, Float[np.ndarray, " s"]]
    """Measurements by name, [s] each; see ``evaluate``."""
    draws: Mapping[str, Float[np.ndarray, "b s"]]
    """The same on b resamples of the documents, [b, s]."""
    how: Mapping[str, Any] = field(default_factory=dict)
    """Sizes, seeds and settings."""

    def __post_init__(self) -> None:
        check_strengths(self.strength)
        for name, values in self.columns.items():
            if values.shape != self.strength.shape or not np.isfinite(values).all():
                raise UserError(
                    f"Expected {len(self.strength)} finite values of {name!r}, got "
                    f"{int(np.isfinite(values).sum())} of {values.size}."
                )

    def table(self) -> pa.Table:
        """A row for each strength: every column with its interval (``_low``, ``_high``)."""
        found: dict[str, Any] = {
            "method": [self.method] * len(self.strength),
            "concept": [self.concept] * len(self.strength),
            "strength": self.strength,
        }
        for name, values in self.columns.items():
            found[name] = values
            if name in self.draws:
                found[f"{name}_low"], found[f"{name}_high"] = interval(self.draws[name])
        return pa.table(found)


@dataclass(frozen=True)
class Matched:
    """What a method costs where it has removed a given part of a concept."""

    method: str
    concept: str
    by: str
    """Which column measures the removal."""
    at: float
    """Level of removal: 1 is everything."""
    strength: float | None
    """Where the level is first reached; None where it never is."""
    values: Mapping[str, tuple[float, float | None, float | None]]
    """Column -> value, low and high end of its interval; low and high are None where too few
    resamples reach the level."""
    reached: float
    """Share of the resamples that reach the level."""
    reason: str
    """Why there are no values; empty where there are."""

    def record(self) -> dict[str, Any]:
        """One flat record."""
        names = ("method", "concept", "by", "at", "strength", "reached", "reason")
        flat: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name, (value, low, high) in self.values.items():
            flat |= {name: value, f"{name}_low": low, f"{name}_high": high}
        return flat


def check_strengths(strength: Float[np.ndarray, " s"]) -> None:
    """Raises:
    UserError: not at least two, ascending from 0.
    """
    if len(strength) < 2 or strength[0] != 0 or not (np.diff(strength) > 0).all():
        raise UserError(
            "Expected at least two strengths that ascend from 0, got "
            f"{', '.join(f'{s:g}' for s in strength) or 'none'}."
        )


def crossing(erased: Float[np.ndarray, " s"], at: float) -> tuple[int, float] | None:
    """Where a curve first reaches a level: (i, f), a part f in [0, 1] of the way from i to i + 1.

    None where no point reaches it. A curve that starts at or above the level crosses at (0, 0).
    """
    above = np.flatnonzero(erased >= at)
    if not len(above):
        return None
    after = int(above[0])
    if after == 0:
        return 0, 0.0
    low, high = erased[after - 1], erased[after]
    return after - 1, float((at - low) / (high - low))


def read_off(values: Float[np.ndarray, " s"], place: tuple[int, float]) -> float:
    """The value on the straight line between two points of a curve."""
    i, part = place
    return float(values[i] + part * (values[min(i + 1, len(values) - 1)] - values[i]))


def matched(curve: Curve, at: float, by: str = "erased_fixed") -> Matched:
    """Read a curve off where it has removed the part ``at``.

    Args:
        by: the column that measures removal: ``erased_fixed`` or ``erased_refitted``.
    Raises:
        UserError: no such column.
    """
    if by not in curve.columns:
        raise UserError(f"Expected one of {', '.join(curve.columns)}, got {by!r}.")
    draws = curve.draws.get(by, np.empty((0, len(curve.strength))))
    places = [crossing(one, at) for one in draws]
    reached = sum(place is not None for place in places) / max(1, len(places))
    place = crossing(curve.columns[by], at)
    if place is None:
        most = int(np.argmax(curve.columns[by]))
        reason = (
            f"removes at most {curve.columns[by][most]:.1%}, at strength "
            f"{curve.strength[most]:g} of up to {curve.strength[-1]:g}"
        )
        return Matched(curve.method, curve.concept, by, at, None, {}, reached, reason)
    values: dict[str, tuple[float, float | None, float | None]] = {}
    for name, column in curve.columns.items():
        low = high = None
        if name in curve.draws and reached >= ENOUGH:
            several = zip(curve.draws[name], places, strict=True)
            found = [read_off(one, p) for one, p in several if p is not None]
            low, high = (float(v) for v in interval(np.array(found)[:, None]).ravel())
        values[name] = (read_off(column, place), low, high)
    strength = read_off(curve.strength, place)
    return Matched(curve.method, curve.concept, by, at, strength, values, reached, "")


def interval(draws: Float[np.ndarray, "b s"]) -> Float[np.ndarray, "2 s"]:
    """Percentile interval of each column, [2, s]."""
    tail = (1 - LEVEL) / 2
    return np.quantile(draws, [tail, 1 - tail], axis=0)


def resample(
    group: Int[np.ndarray, " n"], n_draws: int, rng: np.random.Generator
) -> Int[np.ndarray, "b n"]:
    """How often each row is drawn when whole groups (documents) are drawn with replacement.

    Args:
        group: [n] the document of each row.
        n_draws: resamples b, each of as many documents as there are.
    Returns:
        [b, n] multiplicities.
    """
    if len(group) == 0:
        raise UserError("Expected at least one document to resample, got none.")
    documents, place = np.unique(group, return_inverse=True)
    n = len(documents)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=n_draws)
    return counts[:, place]
