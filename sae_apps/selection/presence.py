"""Similarity by which latents a row has: presence, against the pool's background.

    b_i = 1[z_i > 0] / sqrt(number of latents active in i)            unit length
    m, C = mean and covariance of b over the pool
    W = (C_r / l + 1)^(-1/2)          C_r the leading r components of C, l = LAMBDA tr(C) / d_sae
    score(i, p) = cos(W (b_i - m), W (p - m))             p a target's b, or a mean of several

Three steps away from the cosine of mean codes, each measured on its own in benchmarks/selection.py
(benchmarks/LOG.md): presence in place of size, because a few large activations rule a mean-pooled
code; the pool's mean taken out, because all texts share much; and the directions in which the pool
varies most (length, language, format) damped, as linear discriminant analysis would do with a
shrunken covariance, because they say little about a single task. The steps are classical; their use
on SAE features is this project's.

Where rows like the targets are a large part of the pool, its leading directions are what tells them
apart, and damping costs (R-precision .93 against .97 on a pool of which half were hits of one of
eight targets, benchmarks/LOG.md): take no components there (metric ``presence_plain``).

Only nonzeros are touched: with u_k, s_k the components and g_k = s_k / (s_k + l),

    W^2 x = x - sum_k g_k u_k (u_k . x)
    |W (b - m)|^2 = 1 - 2 b.m + |m|^2 - sum_k g_k (u_k . b - u_k . m)^2

so a row costs its products with m, r components and the targets. A row without a latent scores 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64
from scipy import sparse

from sae_apps.selection import kernels
from sae_apps.selection.similarity import Share
from sae_core.errors import UserError
from sae_core.features import shape_of
from sae_core.text import splitmix64

LAMBDA = 10.0
"""Shrinkage, in mean variances of a latent's presence."""
COMPONENTS = 64
"""Leading components of the pool that are damped."""
SAMPLE = 10_000
"""Rows of the pool on which components are fitted; the mean is that of all rows."""


@dataclass(frozen=True, eq=False)
class Background:
    """What the rows of a pool have in common."""

    mean: Float32[np.ndarray, " d_sae"]
    """m, over all rows; those without a latent count as 0."""
    axes: Float32[np.ndarray, "r d_sae"]
    """u, orthonormal."""
    damping: Float64[np.ndarray, " r"]
    """g, in [0, 1)."""

    def shrink(self, x: Float[np.ndarray, "p d_sae"]) -> Float64[np.ndarray, "p d_sae"]:
        """W^2 x, a row each."""
        x, axes = x.astype(np.float64), self.axes.astype(np.float64)
        return x - (x @ axes.T * self.damping) @ axes


def presence(acts: sparse.csr_array) -> sparse.csr_array:
    """Rows b; rows without a latent stay empty.

    Args:
        acts: [n, d_sae] in canonical CSR, every stored value above 0.
    """
    counts = np.diff(acts.indptr)
    data = np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts).astype(np.float32)
    return sparse.csr_array((data, acts.indices, acts.indptr), shape=acts.shape)


def background_of(
    shards: Iterable[sparse.csr_array], *, components: int | None = None
) -> Background:
    """The background of a pool, in one pass; memory for d_sae numbers and SAMPLE rows.

    The sample is the rows with the smallest hash of their number, the same for every sharding.

    Args:
        shards: pooled codes of the pool, one matrix after the other.
        components: leading components to damp; None for COMPONENTS, 0 for none.
    Raises:
        UserError: no rows.
    """
    total: np.ndarray | None = None
    sample: sparse.csr_array | None = None
    keys = np.empty(0, dtype=np.uint64)
    n = 0
    for acts in shards:
        b = presence(acts)
        rows, d_sae = shape_of(b)
        part = np.bincount(b.indices, b.data, minlength=d_sae)
        total = part if total is None else total + part
        key = splitmix64(np.arange(n, n + rows, dtype=np.uint64))
        n += rows
        keys = np.concatenate([keys, key])
        sample = b if sample is None else sparse.csr_array(sparse.vstack([sample, b], format="csr"))
        if len(keys) > SAMPLE:
            kept = np.sort(np.argpartition(keys, SAMPLE)[:SAMPLE])
            keys, sample = keys[kept], sample[kept]
    if total is None or sample is None or n == 0:
        raise UserError("Expected at least one row to take the background of, got none.")
    axes, damping = _components(sample, COMPONENTS if components is None else components)
    return Background((total / n).astype(np.float32), axes, damping)


def _components(
    b: sparse.csr_array, most: int
) -> tuple[Float32[np.ndarray, "r d_sae"], Float64[np.ndarray, " r"]]:
    """Leading principal components of the rows, and g."""
    from sklearn.decomposition import PCA

    n, d_sae = shape_of(b)
    r = min(most, n - 2, d_sae - 1)
    dense_mean = np.asarray(b.mean(axis=0)).ravel()
    variance = float(b.multiply(b).sum() / n - dense_mean @ dense_mean)
    if r < 1 or variance <= 0:
        return np.empty((0, d_sae), dtype=np.float32), np.empty(0)
    wide = sparse.csr_matrix((b.data.astype(np.float64), b.indices, b.indptr), shape=b.shape)
    found = PCA(r, svd_solver="arpack", random_state=0).fit(wide)
    axes = np.asarray(found.components_, dtype=np.float32)
    spread = np.asarray(found.explained_variance_, dtype=np.float64)
    return axes, spread / (spread + LAMBDA * variance / d_sae)


def directions(
    prototypes: Float[np.ndarray, "p d_sae"], background: Background
) -> Float64[np.ndarray, "p d_sae"]:
    """W^2 (p - m) / |W (p - m)|: a score is (b - m) . direction / |W (b - m)|."""
    away = prototypes.astype(np.float64) - background.mean
    shrunk = background.shrink(away)
    norms = np.sqrt(np.maximum((away * shrunk).sum(axis=1, keepdims=True), 0))
    return np.divide(shrunk, norms, out=np.zeros_like(shrunk), where=norms > 0)


def score(
    acts: sparse.csr_array, prototypes: Float[np.ndarray, "p d_sae"], background: Background
) -> Float32[np.ndarray, "n p"]:
    """Similarity of every row with every prototype, in [-1, 1].

    Args:
        acts: pooled codes, [n, d_sae] float32 in canonical CSR.
        prototypes: rows b, or means of them.
        background: of the pool, from ``background_of``.
    Raises:
        UserError: the widths differ, or the matrix is not what it should be.
    """
    d_sae = shape_of(acts)[1]
    if prototypes.shape[1] != d_sae or len(background.mean) != d_sae:
        raise UserError(
            f"Expected prototypes and background of width {d_sae} as the activations, got "
            f"{prototypes.shape[1]} and {len(background.mean)}."
        )
    kernels.check_pointers(acts)
    b, m = presence(acts), background.mean.astype(np.float64)
    aims = directions(prototypes, background)
    r = len(background.axes)
    vectors = np.concatenate([background.mean[None], background.axes, aims]).astype(np.float32)
    products = np.empty((shape_of(b)[0], len(vectors)))
    for block in kernels.row_sums(b, vectors, "product"):
        products[block.rows, block.columns] = block.sums
    with_mean, with_axes, with_aims = np.split(products, [1, 1 + r], axis=1)
    along = with_axes - background.axes.astype(np.float64) @ m
    square = 1 - 2 * with_mean[:, 0] + m @ m - along**2 @ background.damping
    norms = np.sqrt(np.maximum(square, 0))[:, None]
    above = with_aims - aims @ m
    found = np.divide(above, norms, out=np.zeros_like(above), where=norms > 0)
    found[np.diff(b.indptr) == 0] = 0.0
    return found.astype(np.float32)


def explain(
    acts: sparse.csr_array,
    aims: Float[np.ndarray, "n d_sae"],
    background: Background,
    *,
    top: int = 5,
) -> list[Share]:
    """The active latents that make each row similar: the parts (b_k - m_k) a_k of (b - m).a.

    With a the direction of a prototype, or the mean of several, the parts sum to the score (or the
    mean of the scores) times |W (b - m)|. A latent that the row lacks has a part as well: it may be
    usual in the pool and rare among the targets. Shares are of the sum of all positive parts, so
    those of the active latents need not sum to 1.

    Args:
        acts: the rows to explain.
        aims: for each row what it was compared with, of ``directions``.
        background: of the pool.
        top: at most so many latents a row.
    """
    b = presence(acts)
    found = []
    for i, aim in enumerate(aims.astype(np.float64)):
        span = slice(b.indptr[i], b.indptr[i + 1])
        latents = b.indices[span].astype(np.int64)
        parts = -background.mean.astype(np.float64) * aim
        parts[latents] += b.data[span] * aim[latents]
        whole = np.maximum(parts, 0).sum()
        order = np.argsort(-parts[latents], kind="stable")[:top]
        chosen = latents[order[parts[latents[order]] > 0]]
        found.append(Share(chosen, parts[chosen] / max(whole, np.finfo(float).tiny)))
    return found
