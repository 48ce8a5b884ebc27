"""What deleting the experts of each domain does to the perplexity of every domain.

    perplexity = exp(sum nll / sum tokens)     rise = perplexity with the mask - without
    selectivity of a mask = rise in its own domain / mean rise in the others

Beside each mask stand random experts of equal routing weight (``matched``), the mean over draws.
Intervals are of the documents: 95% of bootstrap resamples within each domain.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.nn import functional as F

from sae_core.errors import UserError
from sae_core.models import LanguageModel
from sae_core.monet.masks import ExpertMask, masked_experts

_BATCH_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Damage:
    """D domains under M masks."""

    domains: tuple[str, ...]
    """Columns."""
    masks: tuple[str, ...]
    """Rows: names of the masks, those of domains first."""
    plain: Float[np.ndarray, " D"]
    """Perplexity without a mask."""
    masked: Float[np.ndarray, "M D"]
    """Perplexity with each."""
    low: Float[np.ndarray, "M D"]
    """95% interval of the rise, its lower end."""
    high: Float[np.ndarray, "M D"]
    """Its upper end."""

    @property
    def rise(self) -> Float[np.ndarray, "M D"]:
        """Perplexity gained by the mask."""
        return self.masked - self.plain

    def selectivity(self, mask: str, domain: str) -> float | None:
        """Rise in the domain over the mean rise in the others; None where that is not positive.

        Raises:
            UserError: unknown names.
        """
        if mask not in self.masks or domain not in self.domains:
            raise UserError(
                f"Expected a mask of {', '.join(self.masks)} and a domain of "
                f"{', '.join(self.domains)}, got {mask!r} and {domain!r}."
            )
        row, own = self.rise[self.masks.index(mask)], self.domains.index(domain)
        others = float(np.delete(row, own).mean())
        return float(row[own]) / others if others > 0 else None


def measure_damage(
    lm: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[str],
    masks: Mapping[str, ExpertMask],
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> Damage:
    """Perplexity of every domain, plain and under every mask.

    Args:
        lm: a Monet model.
        texts: documents that no mask was chosen on.
        labels: the domain of each.
        masks: by name.
        n_boot: resamples of the documents.
        seed: of the resamples.
    Raises:
        UserError: lengths that differ, no masks, a mask that does not fit the model, or a domain
            in which nothing is predicted.
    """
    if len(texts) != len(labels) or not texts or not masks:
        raise UserError(
            f"Expected texts with a label each, and masks, got {len(texts)} texts, "
            f"{len(labels)} labels and {len(masks)} masks."
        )
    domains, codes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    nll, n_tokens = zip(
        *(text_losses(lm, texts, mask) for mask in (None, *masks.values())), strict=True
    )
    losses, tokens = np.array(nll), n_tokens[0]
    if not (total := np.bincount(codes, tokens, len(domains))).all():
        raise UserError(f"Expected tokens in every domain, got none in {domains[total.argmin()]}.")
    perplexity = _perplexity(losses, tokens, codes, len(domains))
    random, rises = np.random.default_rng(seed), []
    where = [np.flatnonzero(codes == d) for d in range(len(domains))]
    for _ in range(n_boot):
        drawn = np.concatenate([random.choice(one, len(one)) for one in where])
        one = _perplexity(losses[:, drawn], tokens[drawn], codes[drawn], len(domains))
        rises.append(one[1:] - one[0])
    low, high = np.percentile(rises, (2.5, 97.5), axis=0)
    names = tuple(domains.tolist())
    return Damage(names, tuple(masks), perplexity[0], perplexity[1:], low, high)


def _perplexity(
    nll: Float[np.ndarray, "M n"], tokens: np.ndarray, codes: np.ndarray, n_domains: int
) -> Float[np.ndarray, "M D"]:
    sums = np.array([np.bincount(codes, row, n_domains) for row in nll])
    return np.exp(sums / np.bincount(codes, tokens, n_domains))


@torch.no_grad()
def text_losses(
    lm: LanguageModel, texts: Sequence[str], mask: ExpertMask | None = None
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """-log p of every text in nats, summed over its tokens but the first, and their number.

    Texts longer than the model's positions are cut. Padding makes no difference.

    Args:
        lm: a language model; a Monet where there is a mask.
        texts: one line each.
        mask: experts that are deleted meanwhile.
    """
    ids = [one[: lm.max_positions] for one in lm.tokenizer(list(texts))["input_ids"]]
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    nll, n_tokens = np.zeros(len(ids)), np.array([max(0, len(one) - 1) for one in ids])
    with nullcontext() if mask is None else masked_experts(lm.model, mask):
        for places in _batches(order, ids):
            nll[places] = _losses(lm, [ids[place] for place in places])
    return nll, n_tokens


def _batches(order: list[int], ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of texts of like length, _BATCH_TOKENS a batch; texts of one token are left out."""
    batches: list[list[int]] = []
    for place in order:
        if len(ids[place]) < 2:
            continue
        if not batches or (len(batches[-1]) + 1) * len(ids[place]) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(place)
    return batches


def _losses(lm: Any, ids: list[list[int]]) -> Float[np.ndarray, " b"]:
    longest = max(map(len, ids))
    padded = torch.zeros(len(ids), longest, dtype=torch.int64)
    real = torch.zeros(len(ids), longest, dtype=torch.int64)
    for line, one in enumerate(ids):
        padded[line, : len(one)], real[line, : len(one)] = torch.tensor(one), 1
    logits = lm.model(
        input_ids=padded.to(lm.device), attention_mask=real.to(lm.device), use_cache=False
    ).logits
    target = padded[:, 1:].masked_fill(real[:, 1:] == 0, -100).to(lm.device)
    loss = F.cross_entropy(logits[:, :-1].float().mT, target, ignore_index=-100, reduction="none")
    return loss.double().sum(1).cpu().numpy()
