"""Verdicts on latents, and their table by firing frequency."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sae_apps.report.parts import fixed
from sae_core.errors import UserError

FLAGS = ("reliable", "doubtful", "unreliable")
THRESHOLDS = (0.7, 0.9)


@dataclass(frozen=True)
class LatentVerdicts:
    """One value a latent of the first run, in the order of the latents."""

    freq: Sequence[float]
    """Share of tokens on which it fires; 0: dead, and left out of everything below."""
    score: Sequence[float]
    """Predicted chance that it is a feature, in [0, 1]."""
    flag: Sequence[str]
    """reliable, doubtful or unreliable."""
    consistency: Sequence[float] | None = None
    """Mean over the other runs of its largest cosine there; None for one run."""
    group: Sequence[str] | None = None
    """Name of its group, as the table should show it; None: decades of frequency."""
    reasons: Mapping[int, str] = field(default_factory=dict)
    """Latent -> why it is not reliable, for some."""
    tokens: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """Latent -> tokens on which it fires most, for some."""

    def __post_init__(self) -> None:
        named = (("freq", self.freq), ("score", self.score), ("flag", self.flag),
                 ("consistency", self.consistency), ("group", self.group))  # fmt: skip
        sizes = {name: len(one) for name, one in named if one is not None}
        if len(set(sizes.values())) > 1:
            raise UserError(f"Expected one value a latent everywhere, got {sizes}.")
        if unknown := set(self.flag) - set(FLAGS):
            raise UserError(f"Expected flags of {FLAGS}, got {sorted(unknown)[0]!r}.")


def as_floats(values: Sequence[float]) -> np.ndarray:
    """One number a latent, as float64."""
    return np.asarray(values, dtype=np.float64)


def group_rows(latents: LatentVerdicts) -> list[dict[str, Any]]:
    """One row a group of alive latents, then one of all: size, agreement, verdicts.

    Groups go from frequent to rare, by their mean over alive latents.
    """
    freq, flags = as_floats(latents.freq), np.asarray(latents.flag)
    alive = freq > 0
    if latents.group is None:
        names, order = decades(freq)
    else:
        names = np.asarray(latents.group, dtype=object)
        present = dict.fromkeys(names[alive].tolist())
        order = sorted(present, key=lambda name: -freq[alive & (names == name)].mean())
    masks = {name: alive & (names == name) for name in order}
    rows = [(name, mask) for name, mask in masks.items() if mask.any()]
    if alive.any():
        rows.append(("All", alive))
    agree = None if latents.consistency is None else as_floats(latents.consistency)
    score = as_floats(latents.score)
    return [
        {
            "name": name,
            "n": int(mask.sum()),
            "score": fixed(score[mask].mean()),
            "mean": None if agree is None else fixed(agree[mask].mean()),
            "shares": [None if agree is None else float((agree[mask] > t).mean())
                       for t in THRESHOLDS],
            "flags": [int((flags[mask] == flag).sum()) for flag in FLAGS],
        }
        for name, mask in rows
    ]  # fmt: skip


def decades(freq: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The decade of each frequency as text, and all decades from frequent to rare.

    A frequency of 1% belongs to "1% to 10%".
    """
    alive = freq > 0
    place = np.floor(np.log10(np.where(alive, freq, 1.0))).astype(int)
    place = np.minimum(place, -1)
    names = np.array([f"{_decade(p)} to {_decade(p + 1)}" for p in place], dtype=object)
    found = sorted(set(place[alive].tolist()), reverse=True)
    return names, [f"{_decade(p)} to {_decade(p + 1)}" for p in found]


def _decade(place: int) -> str:
    return f"{100 * 10.0**place:g}%"
