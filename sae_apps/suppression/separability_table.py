"""The result of a measurement of separability: one row a unit, and how it was made."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from sae_core.described import read_described, write_described
from sae_core.errors import UserError

KEY = b"sae_apps.separability"


@dataclass(frozen=True, eq=False)
class SeparabilityTable:
    """Separability of many units, one row each; undefined numbers are null, never NaN."""

    table: pa.Table
    """Columns unit, concept, rate, jsd, null_jsd, raw, debiased, p, p_tail, q, status; see
    ``separability``."""
    how: dict[str, Any] = field(default_factory=dict)
    """Statistic, alternative, permutations, number of tests, correction, concepts, tokens."""

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        """A column as numpy; null numbers become NaN."""
        return self.table[name].to_numpy()

    def passing(self, alpha: float = 0.01, by: str = "q") -> Int[np.ndarray, "m"]:
        """Live units with p < alpha, the largest debiased distance first.

        Args:
            alpha: level.
            by: the column that is compared with it: p, p_tail or q.
        """
        if by not in ("p", "p_tail", "q"):
            raise UserError(f"Expected by to be p, p_tail or q, got {by!r}.")
        rows = np.flatnonzero((self.column("status") == "ok") & (self.column(by) < alpha))
        return rows[np.argsort(-self.column("debiased")[rows], kind="stable")]

    def top(self, k: int = 10) -> Int[np.ndarray, "k"]:
        """The k live units with the largest debiased distance."""
        if k < 0:
            raise UserError(f"Expected k of at least 0, got {k}.")
        rows = np.flatnonzero(self.column("status") == "ok")
        return rows[np.argsort(-self.column("debiased")[rows], kind="stable")][:k]

    def summary(self, alpha: float = 0.01) -> dict[str, Any]:
        """Scores of the layer: means over all units, over live ones, and over the 50 best."""
        live = self.column("status") == "ok"
        raw, debiased = self.column("raw"), self.column("debiased")
        best = self.top(50)

        def mean(values: np.ndarray) -> float:
            return float(values.mean()) if len(values) else 0.0

        return {
            "units": len(self),
            "live": int(live.sum()),
            "raw": mean(raw),
            "debiased": mean(debiased),
            "raw_live": mean(raw[live]),
            "debiased_live": mean(debiased[live]),
            "debiased_top50": mean(debiased[best]),
            "best": float(debiased.max(initial=0.0)),
            "passing": len(self.passing(alpha)),
            "alpha": alpha,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write Parquet with ``how`` in the metadata of the schema; ``load_separability`` reads."""
        return write_described(path, self.table, self.how, KEY)


def load_separability(path: str | os.PathLike[str]) -> SeparabilityTable:
    """Read what ``SeparabilityTable.save`` wrote.

    Raises:
        UserError: the file is missing, or is no such table.
    """
    return SeparabilityTable(*read_described(path, KEY, "separability"))
