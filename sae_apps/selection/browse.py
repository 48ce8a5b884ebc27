"""Look into a pool on disk: the rows that excite a latent, the latents that a row has.

The answers are those of ``SparseFeatures.top_rows`` and ``top_latents`` over all shards at once.
Memory holds one shard and the answers, however many rows there are.
"""

from collections.abc import Sequence

import numpy as np

from sae_apps.selection.pool import ROWS, PoolFeatures
from sae_core.errors import UserError
from sae_core.features import SparseFeatures, Top
from sae_core.untrusted import read_table


def top_rows(pool: PoolFeatures, latents: Sequence[int], n: int) -> tuple[Top, ...]:
    """The rows in which latents are most active, in one pass over the pool.

    Args:
        latents: columns, in [0, d_sae); the answer has their order.
        n: at most so many rows a latent; fewer come back where it is active in fewer.
    Returns:
        For each latent row ids and activations, the largest first; equal ones in the order of the
        pool.
    Raises:
        UserError: a latent is out of range, or n is negative.
    """
    found: list[Top] = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in latents]
    for shard in pool:
        for place, latent in enumerate(latents):
            found[place] = _better(found[place], _in_shard(shard, latent, n), n)
    return tuple(found)


def _in_shard(shard: SparseFeatures, latent: int, n: int) -> Top:
    """As ``SparseFeatures.top_rows``, without a second copy of the shard by columns."""
    column = np.flatnonzero(shard.acts.indices == latent)
    if not 0 <= latent < shard.d_sae or n < 0:
        shard.top_rows(latent, n)  # raises
    values: np.ndarray = shard.acts.data[column]
    kept = column[np.argsort(-values, kind="stable")[:n]]
    rows = np.searchsorted(shard.acts.indptr, kept, side="right") - 1
    return shard.row_ids[rows], shard.acts.data[kept]


def _better(first: Top, second: Top, n: int) -> Top:
    """The n best of both; of equals those of the first."""
    row_ids, values = (np.concatenate(pair) for pair in zip(first, second, strict=True))
    best = np.argsort(-values, kind="stable")[:n]
    return row_ids[best], values[best]


def top_latents(pool: PoolFeatures, row_id: int, n: int) -> Top:
    """The latents most active in a row; of the shards only the one that holds it is read whole.

    Args:
        row_id: as in the row tables.
        n: at most so many latents; fewer come back where fewer are active.
    Returns:
        latents and activations, the largest first; equal ones in ascending order of latent.
    Raises:
        UserError: no shard holds the row id, or n is negative.
    """
    for number, shard in enumerate(pool.shards):
        table = shard.rows if isinstance(shard, SparseFeatures) else read_table(shard / ROWS)
        if (table["row_id"].to_numpy() == row_id).any():
            return pool.load(number).top_latents(row_id, n)
    raise UserError(f"Expected a row id of the pool {pool.source}, got {row_id}.")
