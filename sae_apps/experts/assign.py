"""Experts of a domain: those whose routing weight there is at least twice that of any other.

    score_d(e) = sum of f_e over the tokens of domain d / number of those tokens
    e belongs to d  where  score_d(e) >= ratio * score_d'(e) for all d' != d

(Monet, arXiv 2412.04139, appendix D.1: "at least twice that of the second most activated domain";
all others are generalists.) Deviations: an expert must have been active in ``min_tokens`` tokens,
since one that fired twice is in some domain by chance; and the number of experts of each domain is
compared with the numbers after permuting the labels of the documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from sae_apps.experts.use import ExpertUse
from sae_core.errors import UserError
from sae_core.features import shape_of

GENERALIST = -1


@dataclass(frozen=True, eq=False)
class Assignment:
    """Domains of the experts of one router."""

    domains: tuple[str, ...]
    """D names, sorted."""
    domain: Int[np.ndarray, " E"]
    """Place in ``domains``, or -1 for a generalist or an expert too rare to tell."""
    score: Float[np.ndarray, "D E"]
    """Mean routing weight a token."""
    n_experts: Int[np.ndarray, " D"]
    """Experts of each domain."""
    null_mean: Float[np.ndarray, " D"]
    """The same under permuted labels, on average."""
    p: Float[np.ndarray, " D"]
    """(1 + permutations with at least as many) / (1 + permutations)."""

    def of(self, domain: str) -> Int[np.ndarray, " e"]:
        """Numbers of the experts of a domain, ascending.

        Raises:
            UserError: no such domain.
        """
        if domain not in self.domains:
            raise UserError(f"Expected one of {', '.join(self.domains)}, got {domain!r}.")
        return np.flatnonzero(self.domain == self.domains.index(domain))

    @property
    def mass(self) -> Float[np.ndarray, " E"]:
        """Routing weight a token, each domain counting alike."""
        return self.score.mean(0)


def assign_experts(
    use: ExpertUse,
    labels: Sequence[str],
    *,
    ratio: float = 2.0,
    min_tokens: int = 20,
    permutations: int = 99,
    seed: int = 0,
) -> Assignment:
    """Which experts belong to which domain.

    Args:
        use: of n documents.
        labels: the domain of each.
        ratio: how many times the second largest score, above 1.
        min_tokens: fewest tokens an expert was active in.
        permutations: of the labels of the documents.
        seed: of the permutations.
    Raises:
        UserError: labels that do not fit, one domain only, a domain without tokens, ratio <= 1.
    """
    n = shape_of(use.weight)[0]
    if len(labels) != n:
        raise UserError(f"Expected one label for each of {n} documents, got {len(labels)}.")
    if ratio <= 1:
        raise UserError(f"Expected a ratio above 1, got {ratio}.")
    domains, codes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    if len(domains) < 2:
        raise UserError(f"Expected at least two domains, got {', '.join(domains)}.")
    tokens = np.bincount(codes, use.n_tokens, len(domains))
    if not tokens.all():
        raise UserError(f"Expected tokens in every domain, got none in {domains[tokens.argmin()]}.")
    often = np.asarray(use.count.sum(0)).ravel() >= min_tokens
    score = domain_scores(use, codes, len(domains))
    domain = _domain_of(score, often, ratio)
    n_experts = _counts(domain, len(domains))
    random = np.random.default_rng(seed)
    null = np.zeros((permutations, len(domains)), dtype=np.int64)
    for row in null:
        permuted = domain_scores(use, random.permutation(codes), len(domains))
        row[:] = _counts(_domain_of(permuted, often, ratio), len(domains))
    p = (1 + (null >= n_experts).sum(0)) / (1 + permutations)
    return Assignment(
        tuple(domains.tolist()), domain, score, n_experts, null.sum(0) / max(1, permutations), p
    )


def domain_scores(
    use: ExpertUse, codes: Int[np.ndarray, " n"], n_domains: int
) -> Float[np.ndarray, "D E"]:
    """Routing weight a token of each domain: a ratio of sums over its documents."""
    n = len(codes)
    member = sparse.csr_array((np.ones(n), (codes, np.arange(n))), shape=(n_domains, n))
    tokens = np.maximum(member @ use.n_tokens, 1)
    return sparse.csr_array(member @ use.weight).toarray() / tokens[:, None]


def _domain_of(
    score: Float[np.ndarray, "D E"], often: np.ndarray, ratio: float
) -> Int[np.ndarray, " E"]:
    second, first = np.partition(score, -2, axis=0)[-2:]
    return np.where(often & (first > 0) & (first >= ratio * second), score.argmax(0), GENERALIST)


def _counts(domain: Int[np.ndarray, " E"], n_domains: int) -> Int[np.ndarray, " D"]:
    return np.bincount(domain[domain >= 0], minlength=n_domains)
