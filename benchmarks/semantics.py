"""Semantic consistency: do the tokens on which a latent fires carry the same label?

    share_j = max_c #{i in A_j : label_i = c} / #A_j

A_j are the items on which latent j is active, or the `top` strongest of them; the share is averaged
over the latents active on at least n_min items. The measure of "Non-negative Contrastive Learning"
(ICLR 2024; code PKU-ML/non_neg, solo/methods/simclr.py), there with images and classes. Beside it
always stands what the same latents reach when the labels are permuted over the items (`control`):
one frequent label alone gives a share above 1 / n_labels. `excess` is share - control.

Two labelled texts, harvested once into the cache folder:

    pos      English Web Treebank of Universal Dependencies: items are tokens, the label is the
             part of speech (UPOS) of the token's word; a token that touches words of two labels is
             left out, and so is the first token of a sentence (HarvestConfig.include_first)
    emotion  GoEmotions: items are comments with exactly one emotion (those marked neutral are left
             out), a latent's activation is its maximum over the comment's tokens
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.semantics_data import BATCH, N_MIN, Labelled
from sae_core.errors import UserError
from sae_core.metrics import evaluating
from sae_core.pooling import RowPooler
from sae_core.sae import SAE


@dataclass(frozen=True, eq=False)
class SemanticConsistency:
    """Shares of the most frequent label, over the m latents active on at least n_min items."""

    latent: Int[np.ndarray, " m"]
    """The latents counted."""
    label: Int[np.ndarray, " m"]
    """Most frequent label among each latent's items."""
    share: Float[np.ndarray, " m"]
    """Its share."""
    control: Float[np.ndarray, " m"]
    """Mean share of the most frequent label under permuted labels."""
    mean_share: float
    """Mean of `share`."""
    mean_control: float
    """Mean of `control`."""
    mean_excess: float
    """mean_share - mean_control."""
    interval: tuple[float, float]
    """95% of 1,000 bootstrap means of the excess over latents (as if these were independent)."""
    base_rate: float
    """Share of the most frequent label among all items."""
    n_items: int
    """Labelled items."""
    n_min: int
    """Items that a latent must be active on."""
    top: int | None
    """Strongest items counted a latent; None: all on which it is active."""


def semantic_consistency(
    sae: SAE,
    labelled: Labelled,
    *,
    n_min: int = N_MIN,
    top: int | None = None,
    seed: int = 0,
) -> SemanticConsistency:
    """Encode a labelled text and measure its latents; see `label_consistency`.

    Raises:
        UserError: the SAE's d_in is not that of the text, or no latent is active often enough.
    """
    acts = item_activations(sae, labelled)
    return label_consistency(acts, labelled.label, n_min=n_min, top=top, seed=seed)


def item_activations(sae: SAE, labelled: Labelled) -> sparse.csr_array:
    """Activations [n_items, d_sae] of the tokens, or their maximum over each row."""
    weights, parts = sae.W_enc, []
    pooler = None if labelled.row_id is None else RowPooler(sae.d_sae, "max")
    with evaluating(sae):
        for batch in labelled.activations.iter_sequential(BATCH):
            codes = sae.encode_sparse(batch.x.to(weights.device, weights.dtype))
            if pooler is None:
                parts.append(codes.to_scipy())
            else:
                pooler.update(codes, batch.row_id, batch.position)
    if pooler is None or labelled.row_id is None:
        return sparse.csr_array(sparse.vstack(parts, format="csr"))
    return pooler.compute(labelled.row_id)[0]


def label_consistency(
    acts: sparse.csr_array,
    label: Int[np.ndarray, " n_items"],
    *,
    n_min: int = N_MIN,
    top: int | None = None,
    n_permutations: int = 10,
    seed: int = 0,
) -> SemanticConsistency:
    """Share of the most frequent label among the items of each latent, and its control.

    Args:
        acts: [n_items, d_sae], stored entries are the active ones.
        label: label of each item, -1 for none.
        n_min: labelled items that a latent must be active on to count.
        top: count only so many items a latent, the most active ones.
        n_permutations: of the labels over the labelled items, for the control.
        seed: of the permutations and the bootstrap.

    Raises:
        UserError: lengths differ, sizes below 1, or no latent is active on n_min items.
    """
    n_items, d_sae = acts.shape  # pyright: ignore[reportGeneralTypeIssues]
    if len(label) != n_items or n_min < 1 or n_permutations < 1 or (top is not None and top < 1):
        raise UserError(
            f"Expected one label for each of {n_items} items and n_min, top and n_permutations of "
            f"at least 1, got {len(label)} labels and {n_min}, {top} and {n_permutations}."
        )
    item, latent = _counted(sparse.csr_array(acts[label >= 0]), n_min, top)
    if not len(latent):
        raise UserError(f"Expected a latent active on at least {n_min} items, got none.")
    label = label[label >= 0]
    alive = np.unique(latent)
    column = np.searchsorted(alive, latent)
    counts = _label_counts(item, column, label, len(alive))
    rng = np.random.default_rng(seed)
    control = np.zeros(len(alive))
    for _ in range(n_permutations):
        shuffled = _label_counts(item, column, rng.permutation(label), len(alive))
        control += shuffled.max(1) / shuffled.sum(1) / n_permutations
    share = counts.max(1) / counts.sum(1)
    return SemanticConsistency(
        latent=alive, label=counts.argmax(1), share=share, control=control,
        mean_share=float(share.mean()), mean_control=float(control.mean()),
        mean_excess=float((share - control).mean()),
        interval=bootstrap_interval(share - control, rng),
        base_rate=float(np.bincount(label).max() / len(label)),
        n_items=len(label), n_min=n_min, top=top,
    )  # fmt: skip


def bootstrap_interval(
    values: Float[np.ndarray, " m"], rng: np.random.Generator, n_resamples: int = 1000
) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the mean over values drawn with replacement."""
    drawn = rng.integers(len(values), size=(n_resamples, len(values)), dtype=np.int32)
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _counted(
    acts: sparse.csr_array, n_min: int, top: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(item, latent) of the entries that count, by latent."""
    by_latent = acts.tocsc()
    by_latent.sort_indices()
    n_active = np.diff(by_latent.indptr)
    latent = np.repeat(np.arange(len(n_active)), n_active)
    keep = (n_active >= n_min)[latent]
    if top is not None:
        order = np.lexsort((np.negative(by_latent.data), latent))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - by_latent.indptr[latent[order]]
        keep &= rank < top
    return by_latent.indices[keep].astype(np.int64), latent[keep]


def _label_counts(
    item: NDArray[np.int64], column: NDArray[np.int64], label: NDArray[np.int64], n_columns: int
) -> NDArray[np.int64]:
    """Entries by column and label, [n_columns, n_labels]."""
    n_labels = int(label.max()) + 1
    flat = np.bincount(column * n_labels + label[item], minlength=n_columns * n_labels)
    return flat.reshape(n_columns, n_labels)
