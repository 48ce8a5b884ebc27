"""Prototypes of targets: the mean code of all targets, one mean a group, or each target itself.

    z*_g = (1 / |D_g|) sum_{i in D_g} z_i

MONA (arXiv 2503.15573, equation 8) has one group. One prototype for each keeps apart what a single
mean blurs: the sub-tasks of a benchmark, or several benchmarks at once. Each target as a prototype
of its own keeps everything, at a cost that grows with their number.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sae_core.errors import UserError
from sae_core.features import SparseFeatures

GROUPINGS = ("one", "group", "each")
ALL = "all"
"""Name of the only prototype, and of the group of targets that have none."""


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Mean codes of groups of targets."""

    names: tuple[str, ...]
    """In the order in which the groups appear among the targets, [p]."""
    vectors: Float[np.ndarray, "p d_sae"]
    """float32, non-negative."""
    n_rows: Int[np.ndarray, " p"]
    """Targets in each group; those with an empty code count, as in any mean."""


def make_prototypes(shards: Iterable[SparseFeatures], grouping: str = "one") -> Prototypes:
    """Mean codes of targets, in one pass over their shards.

    Args:
        shards: features of targets; with "group" a column ``group`` names the groups, and targets
            without one are together in a group "all".
        grouping: "one" for a single prototype, "group" for one a group, "each" for one a target,
            which is named after its group and row_id; targets with an empty code are left out.
    Raises:
        UserError: no targets, another grouping, or a group in which no latent is active at all.
    """
    if grouping not in GROUPINGS:
        raise UserError(f"Expected prototypes of {GROUPINGS}, got {grouping!r}.")
    sums: dict[str, Float[np.ndarray, " d_sae"]] = {}
    counts: dict[str, int] = {}
    for shard in shards:
        names = _names(shard, grouping)
        for name in dict.fromkeys(names):
            part = shard.acts[np.flatnonzero([one == name for one in names])]
            counts[name] = counts.get(name, 0) + len(part.indptr) - 1
            total = sums.setdefault(name, np.zeros(shard.d_sae))
            np.add.at(total, part.indices, part.data.astype(np.float64))
    if not sums:
        raise UserError("Expected at least one target, got none.")
    if grouping == "each":
        sums = {name: total for name, total in sums.items() if total.any()}
        if not sums:
            raise UserError(
                f"Expected a target with an active latent, got {len(counts)} targets without any."
            )
    for name, total in sums.items():
        if not total.any():
            raise UserError(
                f"Expected a target with an active latent in the group {name!r}, got "
                f"{counts[name]} targets without any."
            )
    vectors = [(total / counts[name]).astype(np.float32) for name, total in sums.items()]
    return Prototypes(tuple(sums), np.stack(vectors), np.array([counts[name] for name in sums]))


def _names(shard: SparseFeatures, grouping: str) -> list[str]:
    names = [ALL] * shard.n_rows
    if grouping != "one" and "group" in shard.rows.column_names:
        names = [ALL if name is None else str(name) for name in shard.rows["group"].to_pylist()]
    if grouping != "each":
        return names
    return [f"{name}:{row_id}" for name, row_id in zip(names, shard.row_ids, strict=True)]
