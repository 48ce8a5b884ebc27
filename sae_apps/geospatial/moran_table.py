"""The result of a test of many features: one row a feature, and how it was made."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from sae_core.described import read_described, write_described
from sae_core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

KEY = b"sae_apps.moran"
STATUSES = ("ok", "rare", "constant", "dead")


@dataclass(frozen=True, eq=False)
class MoranTable:
    """Global Moran's I of many features, one row each; undefined numbers are null, never NaN."""

    table: pa.Table
    """Columns feature, (name,) n_active, I, EI, VI_rand, z_rand, EI_sim, seI_sim, z_sim, p_sim,
    p_tail, q, n_permutations, status; see ``moran``."""
    how: dict[str, Any] = field(default_factory=dict)
    """Statistic, alternative, permutations, seed, number of tests, correction, weights."""

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        """A column as numpy; null numbers become NaN."""
        return self.table[name].to_numpy()

    def to_pandas(self) -> "pd.DataFrame":
        """The table as a DataFrame, in which null numbers are NaN."""
        return self.table.to_pandas()

    def passing(
        self, min_i: float = 0.3, alpha: float = 0.01, by: str = "p_sim"
    ) -> Int[np.ndarray, "p"]:
        """Features with I >= min_i and p < alpha, the largest I first.

        Args:
            min_i: least I.
            alpha: level; p must be below it.
            by: the column that is compared with alpha, ``p_sim``, ``p_tail`` or ``q``.
        """
        if by not in ("p_sim", "p_tail", "q"):
            raise UserError(f"Expected by to be p_sim, p_tail or q, got {by!r}.")
        p, i = self.column(by).astype(np.float64), self.column("I")
        rows = np.flatnonzero((self.column("status") == "ok") & (i >= min_i) & (p < alpha))
        return self._ordered(rows)

    def top(self, k: int = 10) -> Int[np.ndarray, "k"]:
        """The k tested features with the largest I."""
        if k < 0:
            raise UserError(f"Expected k of at least 0, got {k}.")
        return self._ordered(np.flatnonzero(self.column("status") == "ok"))[:k]

    def _ordered(self, rows: Int[np.ndarray, "p"]) -> Int[np.ndarray, "p"]:
        order = np.argsort(-self.column("I")[rows], kind="stable")
        return self.column("feature")[rows[order]]

    def counts(self) -> dict[str, int]:
        """Number of features by status."""
        status = self.column("status")
        return {name: int((status == name).sum()) for name in STATUSES}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write Parquet with ``how`` in the metadata of the schema; ``load_moran`` reads it."""
        return write_described(path, self.table, self.how, KEY)


def load_moran(path: str | os.PathLike[str]) -> MoranTable:
    """Read what ``MoranTable.save`` wrote.

    Raises:
        UserError: the file is missing, or is no such table.
    """
    return MoranTable(*read_described(path, KEY, "moran"))
