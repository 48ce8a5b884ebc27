"""The control of a deletion: random experts that carry as much routing weight."""

import numpy as np
from jaxtyping import Float, Int

from sae_core.errors import UserError


def matched_random(
    mass: Float[np.ndarray, " E"], chosen: Int[np.ndarray, " e"], seed: int = 0
) -> Int[np.ndarray, " r"]:
    """Experts in random order, none of the chosen, until their mass is that of the chosen.

    The last one is left out where that comes nearer. The number of experts may differ from that of
    the chosen: the weight that is taken out of the layer is what is held equal.

    Args:
        mass: routing weight a token of each expert.
        chosen: the experts to be matched.
        seed: of the order.
    Returns:
        numbers, ascending; all others with mass where they carry less than the chosen.
    Raises:
        UserError: negative mass.
    """
    if (mass < 0).any():
        raise UserError(f"Expected masses of at least 0, got {mass.min()}.")
    wanted = float(mass[chosen].sum())
    others = np.setdiff1d(np.flatnonzero(mass > 0), chosen)
    order = np.random.default_rng(seed).permutation(others)
    total = np.cumsum(mass[order])
    n = int(np.searchsorted(total, wanted))
    before = total[n - 1] if n else 0.0
    if n < len(order) and total[n] - wanted <= wanted - before:
        n += 1
    return np.sort(order[:n])
