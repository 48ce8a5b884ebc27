"""Which latents fire together and which point the same way: all pairs, in blocks of rows.

    rho_j    = max_i #(i, j) / #j              arXiv 2506.14002, Definition 5.2 (H3), i no copy of j
    excess_j = max_i #(i, j) / #j - freq_i     without what chance gives

with #(i, j) = (H'H)_ij the tokens on which both fire, #j those on which j does. Latents closer than
cosine 0.7 count as copies of one feature (Definition 5.1 joins split features) and are no pair.
"""

from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_core.kernels.codes import Codes

COPY = 0.7  # cosine from which two latents count as copies
PAIR_BLOCK = 1 << 22  # entries of a block of pairs of latents (16 MiB in float32)


def indicator(codes: Codes) -> Any:
    """A scipy CSR array [n, d_sae] of float32: 1 where a latent fires."""
    found = codes.to_scipy()
    return scipy.sparse.csr_array(
        (np.ones(found.nnz, np.float32), found.indices, found.indptr), shape=found.shape
    )


def pair_statistics(
    w: Float[Tensor, "m d"], alive: Bool[Tensor, "m"], fires: Any
) -> dict[str, Tensor]:
    """Every latent against all others.

    Args:
        w: unit rows, the latents' directions.
        alive: latents that count as partners in copies and coherence.
        fires: from `indicator`, the sample; the counts H'H are exact for it.
    Returns:
        rho, excess, partner (-1 without firings), sample_count, n_copies (cosine >= 0.7),
        coherence (largest |cosine| to no copy), max_cosine (largest |cosine|), each [m].
    """
    m = len(w)
    columns = fires.tocsc()
    sample_count = torch.from_numpy(np.diff(columns.indptr).astype(np.int64))
    freq = sample_count.double() / max(1, fires.shape[0])
    found: list[tuple[Tensor, ...]] = []
    for rows in torch.arange(m).split(max(1, PAIR_BLOCK // m)):
        own = torch.zeros(len(rows), m, dtype=torch.bool)
        own[torch.arange(len(rows)), rows] = True
        cos = (w[rows.to(w.device)] @ w.T).cpu()
        is_copy = (cos >= COPY) & ~own & alive.cpu() & alive.cpu()[rows, None]
        size = cos.abs().masked_fill_(own | ~alive.cpu(), 0.0)
        part = columns[:, int(rows[0]) : int(rows[-1]) + 1]
        together = torch.from_numpy((part.T @ fires).toarray())
        share = together / sample_count[rows, None].clamp_min(1)
        share.masked_fill_(own | (cos >= COPY), 0.0)
        excess, partner = (share - freq).max(1)
        found.append(
            (share.max(1).values, excess.clamp_min(0).float(), partner, is_copy.sum(1),
             size.masked_fill(is_copy, 0.0).max(1).values, size.max(1).values)
        )  # fmt: skip
    rho, excess, partner, n_copies, coherence, largest = (
        torch.cat(column) for column in zip(*found, strict=True)
    )
    fired = sample_count > 0
    return {
        "rho": rho.float(),
        "excess": excess * fired,
        "partner": torch.where(fired, partner, -1),
        "sample_count": sample_count,
        "n_copies": n_copies,
        "coherence": coherence.float(),
        "max_cosine": largest.float(),
    }
