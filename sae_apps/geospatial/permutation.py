"""Permutations of the places: all of them, or only those within strata, one stream per number.

Permutation b of a seed comes from a generator of its own, seeded by (seed, stream, b), so that it
does not depend on how many others are drawn, in which order, or by which thread. ``perm[i]`` is the
place to which the value of place i moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Integer

from sae_core.errors import UserError

MAIN, PILOT = 0, 1  # streams: the test itself, and the scales of the max control
SMALLEST = 3  # places of a stratum that is permuted; two places have one other order
_UNLABELLED = (None, "")


@dataclass(frozen=True, eq=False)
class Strata:
    """Groups of places within which values are permuted."""

    codes: Integer[np.ndarray, "n"]
    """Group of each place, 0 .. n_groups - 1. All places that stay fixed form one group, the last,
    which matters for group means only."""
    movable: Int[np.ndarray, "m"]
    """Places that are permuted, ascending by group, then by place."""
    n_groups: int
    """Groups, that of the fixed places included."""
    n_permuted: int
    """Strata that are permuted."""
    n_small: int
    """Places that stay fixed because their stratum has fewer than SMALLEST places."""
    n_unlabelled: int
    """Places that stay fixed because their label is null."""

    @property
    def is_free(self) -> bool:
        """Whether every order of all places is possible."""
        return self.n_groups == 1 and len(self.movable) == len(self.codes)


def free(n: int) -> Strata:
    """One stratum of all n places."""
    zeros = np.zeros(n, dtype=np.uint16)
    return Strata(zeros, np.arange(n, dtype=np.int64), 1, 1, 0, 0)


def strata_of(labels: Sequence[Any] | np.ndarray | None, n: int) -> Strata:
    """Strata from one label a place; None for a single stratum of all.

    A place without a label (None, NaN or the empty string) and the places of strata with fewer than
    three places stay where they are.

    Raises:
        UserError: the number of labels is not n, or no stratum has three places.
    """
    if labels is None:
        return free(n)
    values = [_plain(label) for label in _listed(labels)]
    if len(values) != n:
        raise UserError(f"Expected one stratum for each of {n} places, got {len(values)}.")
    known = {label: i for i, label in enumerate(sorted({v for v in values if v is not None}))}
    raw = np.array([known.get(v, -1) if v is not None else -1 for v in values], dtype=np.int64)
    sizes = np.bincount(raw[raw >= 0], minlength=len(known))
    kept = sizes >= SMALLEST
    if not kept.any():
        largest = int(sizes.max()) if len(sizes) else 0
        raise UserError(
            f"Expected a stratum of at least {SMALLEST} places, got {len(known)} strata "
            f"of at most {largest}."
        )
    renumbered = np.where(kept, np.cumsum(kept) - 1, kept.sum())
    codes = np.where(raw >= 0, renumbered[raw], kept.sum())
    n_kept = int(kept.sum())
    order = np.argsort(codes, kind="stable")
    n_unlabelled = int((raw < 0).sum())
    n_fixed = int((codes == n_kept).sum())
    return Strata(
        codes.astype(np.uint16 if n_kept < 1 << 16 else np.int32),
        order[: n - n_fixed],
        n_kept + (n_fixed > 0),
        n_kept,
        n_fixed - n_unlabelled,
        n_unlabelled,
    )


def _listed(labels: Any) -> list[Any]:
    """Labels of an array, a pandas or arrow column, or a sequence, as a list."""
    for name in ("to_pylist", "tolist"):
        if hasattr(labels, name):
            return getattr(labels, name)()
    return list(labels)


def _plain(label: Any) -> str | None:
    """The text of a label, numbers and text apart; None where there is none."""
    if label is None or label == "" or label != label:
        return None
    return label if isinstance(label, str) else f"{type(label).__name__} {label}"


def draw(strata: Strata, seed: int, index: int, stream: int = MAIN) -> Int32[np.ndarray, "n"]:
    """Permutation ``index`` of a seed, uniform among those the strata allow.

    A uniform order of all movable places, sorted by stratum without changing the order within one,
    is a uniform order within each stratum.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, index))
    generator = np.random.Generator(np.random.PCG64(sequence))
    perm = np.arange(len(strata.codes), dtype=np.int32)
    if strata.is_free:
        generator.shuffle(perm)
        return perm
    shuffled = strata.movable.astype(np.int32)
    generator.shuffle(shuffled)
    by_stratum = np.argsort(strata.codes[shuffled], kind="stable")
    perm[strata.movable] = shuffled[by_stratum]
    return perm


def inverse(perm: Int32[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
    """The place from which the value at each place comes."""
    back = np.empty_like(perm)
    back[perm] = np.arange(len(perm), dtype=perm.dtype)
    return back
