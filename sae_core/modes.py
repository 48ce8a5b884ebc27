"""How often a projection lies in an upper mode: an estimate of the frequency of its feature.

    band_freq = max_t P(z > m + t) - P(z < m - t),   m the median,

over the t where the lower tail has at most 0.3 of the upper one (of few features, interference is
not quite symmetric) and the difference is four standard errors, sqrt((P + P) / n), or more.

Noise and interference of many features make a projection z = w'u nearly symmetric; a feature along
w adds an upper mode that the lower tail does not have. No source: this project's estimator.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IMPURITY = 0.3  # largest ratio of the lower tail to the upper
SIGNIFICANT = 4.0  # standard errors that an upper mode must stand out by


def upper_mode(hist: Int[Tensor, "m bins"], n: int) -> tuple[Float[Tensor, "m"], Bool[Tensor, "m"]]:
    """Band frequency of each histogram of n values, and whether it stands out from its noise.

    The distribution is linear within a bin, so that a median inside a bin makes no asymmetry.
    """
    bins = hist.shape[1]
    below = torch.nn.functional.pad(hist.cumsum(1).double() / n, (1, 0))
    edge = (below <= 0.5).sum(1).sub(1).clamp(0, bins - 1)
    low, high = (below.gather(1, (edge + i)[:, None])[:, 0] for i in (0, 1))
    median = edge + (0.5 - low) / (high - low).clamp_min(1e-12)

    def cdf(place: Tensor) -> Tensor:
        place = place.clamp(0, bins)
        left = place.floor().long().clamp_max(bins - 1)
        a, b = below.gather(1, left), below.gather(1, left + 1)
        return a + (place - left) * (b - a)

    t = torch.arange(1, bins // 2, dtype=torch.float64, device=hist.device)
    above, under = 1 - cdf(median[:, None] + t), cdf(median[:, None] - t)
    excess = above - under
    is_mode = (under <= IMPURITY * above) & (excess > SIGNIFICANT * ((above + under) / n).sqrt())
    found = excess.masked_fill(~is_mode, 0.0).max(1).values
    return found, found > 0
