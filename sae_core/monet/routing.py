"""Routing weights of a Monet model as sparse features of tokens.

    f[i, j] = sum_h g_1[h, i] g_2[h, j]        of expert (i, j), number i * n + j

(arXiv 2412.04139; the authors read experts above 0.01 as active). Without an n x n tensor a token:
f >= t needs one head with g_1 g_2 >= t / H, hence both gates >= t / H; of the pairs that pass, f is
computed from all heads, so every value is exact and none above the threshold is missing.

An expert has no fixed direction: what it adds depends on the input, E_ij(x). There is nothing to
add to the residual stream, and no decoder to compare between runs; only deleting or scaling a
gate has a meaning (``masks``). The 2 n halves (``units="halves"``) are the only units whose gates
vary independently: f is a sum of H products of theirs.
"""

import hashlib
import json
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import UserError
from sae_core.hooks import decoder_blocks
from sae_core.kernels.codes import Codes, codes_where, row_starts
from sae_core.monet.masks import router_layers
from sae_core.monet.router import Gates, MonetRouter

_PAIRS = 1 << 22  # pairs of gates at once: about 200 MiB
_SLACK = 1 - 1e-6  # of the bound of one head, for the rounding of the sum


class ExpertRouting:
    """The router of one group of layers, read as an encoder: activations in, expert weights out.

    It stands wherever an SAE is only read (``featurize``, selection, geography, separability), with
    the hook point ``hook_point``.

    Args:
        router: of a model; shared, not copied, and read with its running moments in any mode.
        hook_point: its input in the model.
        threshold: smallest weight that counts, in [0, 1).
        units: ``experts`` [n * n], or ``halves`` [2 n]: sum_h g_1[h], then sum_h g_2[h].
    Raises:
        UserError: a threshold out of range, or unknown units.
    """

    def __init__(
        self,
        router: MonetRouter,
        hook_point: str,
        threshold: float = 0.01,
        units: Literal["experts", "halves"] = "experts",
    ) -> None:
        if not 0 <= threshold < 1:
            raise UserError(f"Expected a threshold in [0, 1), got {threshold}.")
        if units not in ("experts", "halves"):
            raise UserError(f"Expected units 'experts' or 'halves', got {units!r}.")
        self.router, self.hook_point = router, hook_point
        self.threshold, self.units = threshold, units

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return self.router.w1.in_features

    @property
    def d_sae(self) -> int:
        """Number of experts, or of halves."""
        return self.router.n**2 if self.units == "experts" else 2 * self.router.n

    @property
    def device(self) -> torch.device:
        """Of the router."""
        return self.router.w1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the router."""
        return self.router.w1.weight.dtype

    training = False

    def train(self, mode: bool = True) -> "ExpertRouting":
        """Itself: the router's mode is the model's affair."""
        return self

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "t d"]) -> Codes:
        """Weights of the experts (or halves) of t tokens, those at or above the threshold.

        Args:
            x: input of the router, i.e. the normalised residual stream.
        """
        was_training = self.router.training
        try:
            g1, g2 = self.router.eval()(x)
        finally:
            self.router.train(was_training)
        if self.units == "halves":
            weights = torch.cat((g1.sum(1), g2.sum(1)), -1)
            return codes_where((weights >= self.threshold) & (weights > 0), weights)
        return expert_codes((g1, g2), self.threshold)

    def hash(self) -> str:
        """sha256 of the router and of what is read of it."""
        digest = hashlib.sha256(json.dumps([self.threshold, self.units]).encode())
        for name, tensor in sorted(self.router.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()


def expert_routing(
    model: Any, layer: int, threshold: float = 0.01, units: Literal["experts", "halves"] = "experts"
) -> ExpertRouting:
    """The routing of one group of layers of a model, as an encoder.

    Args:
        model: a ``MonetForCausalLM``.
        layer: a layer with a router, see ``router_layers``.
        threshold: smallest weight that counts.
        units: experts or halves.
    Raises:
        UserError: the model is no Monet, or the layer has no router.
    """
    leaders = router_layers(model)
    if layer not in leaders:
        raise UserError(f"Expected a layer with a router, one of {leaders}, got {layer}.")
    path, blocks = cast("tuple[str, Any]", decoder_blocks(model))
    return ExpertRouting(blocks[layer].router, f"{path}.{layer}.router.in", threshold, units)


def expert_codes(gates: Gates, threshold: float) -> Codes:
    """Experts with sum_h g_1[h, i] g_2[h, j] >= threshold (> 0 for 0), exactly.

    Args:
        gates: g_1 and g_2, each [t, heads, n].
        threshold: in [0, 1).
    """
    (t, heads, n), parts = gates[0].shape, []
    cut = threshold / heads * _SLACK
    active = [(g >= cut) & (g > 0) for g in gates]
    per_token = (active[0].sum(-1) * active[1].sum(-1)).sum(-1)
    step = max(1, int(_PAIRS / max(1.0, float(per_token.float().mean()))))
    for start in range(0, t, step):
        span = slice(start, start + step)
        key = _candidates(gates[0][span], gates[1][span], cut)
        token, i, j = key // n**2 + start, key % n**2 // n, key % n
        weight = torch.zeros(len(key), dtype=gates[0].dtype, device=key.device)
        for h in range(heads):
            weight += gates[0][token, h, i] * gates[1][token, h, j]
        kept = weight >= max(threshold, torch.finfo(weight.dtype).tiny)
        parts.append((token[kept], (i * n + j)[kept], weight[kept]))
    row, col, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return Codes(row_starts(row, t), row, col, values, n**2)


def _candidates(g1: Tensor, g2: Tensor, cut: float) -> Tensor:
    """Ascending keys token * n^2 + i * n + j of the pairs that reach the cut in some head."""
    t, heads, n = g1.shape
    flat = [g.reshape(t * heads, n) for g in (g1, g2)]
    (row, i), (row2, j) = (((g >= cut) & (g > 0)).nonzero(as_tuple=True) for g in flat)
    starts = row_starts(row2, t * heads)
    n_second = (starts[1:] - starts[:-1])[row]
    first = torch.arange(len(row), device=row.device).repeat_interleave(n_second)
    before = n_second.cumsum(0) - n_second
    second = torch.arange(len(first), device=row.device) - before[first] + starts[row[first]]
    passes = flat[0][row, i][first] * flat[1][row2, j][second] >= cut
    first, second = first[passes], second[passes]
    return torch.unique((row[first] // heads) * n**2 + i[first] * n + j[second])
