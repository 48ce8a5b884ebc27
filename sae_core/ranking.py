"""The active entries of TopK and BatchTopK where tokens or latents are split among processes.

A process ranks what it has; what decides in the end is the k-th largest of all (see parallel.py).
Pre-activations that equal it are all active, so that no process need know the others' ties.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.kernels.codes import Codes, codes_where
from sae_core.parallel import Layout
from sae_core.sae import SAE


def select(sae: SAE, pre: Float[Tensor, "n d_sae"], layout: Layout) -> Codes:
    """Active entries, as ``sae.select`` finds them, of all latents and all processes' tokens."""
    if sae.config.kind == "batch_topk" and layout.mesh is not None:
        n = len(pre) * layout.parts("tokens")
        kth = layout.kth_largest(pre.flatten(), sae.config.k * n)
        return codes_where((pre >= kth) & (pre > 0), pre)
    return best_of_all(sae.select(pre), sae.config.k, layout)


def best_of_all(codes: Codes, k: int, layout: Layout) -> Codes:
    """Of at most k entries a token on each latent part the k largest of all parts."""
    if layout.parts("latents") == 1:
        return codes
    values = codes.values.detach()
    slot = torch.arange(len(values), device=values.device) - codes.crow[codes.row]
    dense = values.new_full((codes.n, k), -torch.inf)
    dense[codes.row, slot] = values
    everyone = layout.gathered(dense, "latents").transpose(0, 1).flatten(1)
    kth = everyone.topk(k, dim=1).values[:, -1]
    return codes.keep(values >= kth[codes.row])
