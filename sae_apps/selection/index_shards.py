"""Shards of features or rows as the parts of an index, with their ids; all of one SAE."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int64
from scipy import sparse

from sae_apps.selection.rerank import Part
from sae_apps.selection.sketch import check_rows
from sae_core.errors import UserError
from sae_core.features import SparseFeatures, shape_of

Rows = sparse.csr_array | Iterable[SparseFeatures | sparse.csr_array]


class ShardReader:
    """Shards as parts, with their ids noted and their widths and SAEs compared."""

    def __init__(self, first_id: int, d_sae: int | None = None, sae_hash: str = "none") -> None:
        self.d_sae, self.sae_hash = d_sae, sae_hash
        self.next_id = first_id
        self.row_ids: list[np.ndarray] = []

    @property
    def width(self) -> int:
        assert self.d_sae is not None
        return self.d_sae

    def parts(self, rows: Rows) -> Iterator[Part]:
        shards = [rows] if isinstance(rows, sparse.csr_array | SparseFeatures) else rows
        for shard in shards:
            acts = shard.acts if isinstance(shard, SparseFeatures) else shard
            self.d_sae = self.d_sae or shape_of(acts)[1]
            check_rows(acts, self.d_sae)
            if isinstance(shard, SparseFeatures):
                self._check_sae(shard)
                self.row_ids.append(shard.row_ids)
            else:
                n = shape_of(acts)[0]
                self.row_ids.append(np.arange(self.next_id, self.next_id + n, dtype=np.int64))
                self.next_id += n
            yield Part.of(acts)

    def _check_sae(self, shard: SparseFeatures) -> None:
        given = shard.provenance.sae_hash
        if self.sae_hash == "none":
            self.sae_hash = given
        elif given not in ("none", self.sae_hash):
            raise UserError(
                f"Expected features of the SAE {self.sae_hash[:12]}, got some of {given[:12]}: "
                "codes of two SAEs cannot be compared."
            )


def distinct(row_ids: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """The ids, if each comes once.

    Raises:
        UserError: one comes twice.
    """
    values, counts = np.unique(row_ids, return_counts=True)
    if (counts > 1).any():
        double = values[counts.argmax()]
        raise UserError(f"Expected every row_id once, got {double} {counts.max()} times.")
    return row_ids
