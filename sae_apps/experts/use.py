"""How much each document uses each expert: routing weights added up over its tokens, sparse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from scipy import sparse
from torch import Tensor

from sae_core.activations import HarvestConfig, stream_activations
from sae_core.errors import UserError
from sae_core.kernels.codes import Codes
from sae_core.metrics import evaluating
from sae_core.models import LanguageModel
from sae_core.monet.routing import ExpertRouting
from sae_core.pooling import RowPooler
from sae_core.text import rows_from_texts


@dataclass(frozen=True, eq=False)
class ExpertUse:
    """Experts of one router in n documents."""

    weight: sparse.csr_array
    """Routing weight summed over the tokens of a document, [n, E]."""
    count: sparse.csr_array
    """Tokens of a document in which the expert was active, [n, E]."""
    n_tokens: Int[np.ndarray, " n"]
    """Tokens of a document."""


class UseStats:
    """Streaming use of E experts: update with batches of tokens, merge, compute once."""

    def __init__(self, n_experts: int) -> None:
        self._weight = RowPooler(n_experts, "sum")
        self._count = RowPooler(n_experts, "sum")

    def update(self, codes: Codes, row_id: Int[Tensor, " t"], position: Int[Tensor, " t"]) -> None:
        """Add tokens: their experts, the document of each and its place there."""
        self._weight.update(codes, row_id, position)
        ones = codes.with_values(torch.ones_like(codes.values))
        self._count.update(ones, row_id, position)

    def merge(self, other: "UseStats") -> None:
        """Add the tokens that others have seen."""
        self._weight.merge(other._weight)
        self._count.merge(other._count)

    def compute(self, n: int) -> ExpertUse:
        """The use by documents 0..n-1; documents without tokens have none."""
        ids = np.arange(n)
        weight, n_tokens = self._weight.compute(ids)
        return ExpertUse(weight, self._count.compute(ids)[0], n_tokens)


def measure_use(
    lm: LanguageModel,
    routings: Mapping[int, ExpertRouting],
    texts: Sequence[str],
    config: HarvestConfig | None = None,
) -> dict[int, ExpertUse]:
    """The use of the experts of several routers in documents, in one pass of the model.

    Args:
        lm: a Monet model.
        routings: by layer, see ``sae_core.monet.routing.expert_routing``.
        texts: the documents.
        config: which tokens count; None: all but special tokens and the first of each.
    Raises:
        UserError: no documents, no routers, or halves instead of experts.
    """
    if not texts or not routings:
        raise UserError(f"Expected documents and routers, got {len(texts)} and {len(routings)}.")
    if any(routing.units != "experts" for routing in routings.values()):
        raise UserError("Expected routings of units 'experts', got 'halves'.")
    stats = {layer: UseStats(routing.d_sae) for layer, routing in routings.items()}
    points = [routing.hook_point for routing in routings.values()]
    found: Any
    for found in stream_activations(
        lm, rows_from_texts(list(texts)), points, config or HarvestConfig()
    ):
        for layer, routing in routings.items():
            batch = found[routing.hook_point]
            with evaluating(routing):
                codes = routing.encode_sparse(batch.x.to(routing.device, routing.dtype))
            stats[layer].update(codes, batch.row_id, batch.position)
    return {layer: stat.compute(len(texts)) for layer, stat in stats.items()}
