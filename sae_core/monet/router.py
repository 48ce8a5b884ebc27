"""The router of a group of Monet layers, and the two losses that keep it even and decided.

For each head h and side s (1: first halves i, 2: second halves j), from x [d] of a token:

    l_s = W_s x                                  logits [H, n], no bias
    z_s = (l_s - mean_h) / sqrt(var_h + eps)     moments of a head over tokens and halves
    t_h = min(max_i z_s[h, i], q),   q = Phi^-1(1 - k / n)
    g_s[h, :] = softmax over {l_s[h, i] : z_s[h, i] >= t_h}

(Monet, arXiv 2412.04139, section 3, "adaptive routing with batch normalization"). About k of the n
halves pass the cut, and the best always does. In training the statistics are those of the batch;
running ones are kept for inference, so that a token's gates do not depend on its batch then. The
cut carries no gradient.

    uniformity = -1/(2 H n) sum_{s,h,i} log mean_tokens g_s[h, i]         at least ln n
    ambiguity  =  1/(2 H)   sum_{s,h}   mean_tokens (1 - max_i g_s[h, i]) in [0, 1]

(equations 16 and 17; the mean over tokens inside the logarithm is not printed there, but the values
reported lie just above ln n, as they then must). Deviation: a half that no token of the batch uses
has log 0, so the mean is floored at ``FLOOR``. Such a half has no gradient either and never comes
back, which batches of two million tokens hide and small ones do not: ``mean_logits_use`` takes the
softmax over all logits, without the cut, and reaches every half.
"""

from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Gates = tuple[Float[Tensor, "*b heads n"], Float[Tensor, "*b heads n"]]
Moments = tuple[Float[Tensor, "heads"], Float[Tensor, "heads"]]
Use = Float[Tensor, "heads n"]
FLOOR = 1e-6
EPS, MOMENTUM = 1e-5, 0.1  # those of torch's batch normalisation, as in the published code


class RunningMoments(nn.Module):
    """What parameter-free batch normalisation keeps, under the names of its checkpoints."""

    running_mean: Float[Tensor, "heads"]
    running_var: Float[Tensor, "heads"]
    num_batches_tracked: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(heads))
        self.register_buffer("running_var", torch.ones(heads))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


@dataclass
class Seen:
    """What a router saw of a batch in training, once for each side."""

    moments: list[Moments] = field(default_factory=list)
    use: list[Use] = field(default_factory=list)
    """Mean softmax over all logits, with its gradient."""


class MonetRouter(nn.Module):
    """W_1, W_2 [H n, d] and the running moments of their logits.

    Args:
        d_model: width d of the residual stream.
        heads: H.
        n: halves a side; n * n experts.
        k: halves that are wanted on average a head and side.
    """

    def __init__(self, d_model: int, heads: int, n: int, k: int) -> None:
        super().__init__()
        self.heads, self.n = heads, n
        self.quantile = NormalDist().inv_cdf(1 - k / n)
        self.w1 = nn.Linear(d_model, heads * n, bias=False)
        self.w2 = nn.Linear(d_model, heads * n, bias=False)
        self.norm1, self.norm2 = RunningMoments(heads), RunningMoments(heads)

    def forward(self, x: Float[Tensor, "*b d"], seen: Seen | None = None) -> Gates:
        """Gates of both sides, float32; each row [n] sums to 1.

        Args:
            x: normalised residual stream.
            seen: in training, where the moments of the batch are put for ``track``, and the use of
                the halves; None: moments are tracked at once.
        """
        logits = [w(x).unflatten(-1, (self.heads, self.n)).float() for w in (self.w1, self.w2)]
        if self.training:
            moments = [batch_moments(one.detach()) for one in logits]
            if seen is None:
                self.track(moments)
            else:
                seen.moments += moments
                seen.use += [mean_logits_use(one) for one in logits]
        else:
            moments = [(m.running_mean, m.running_var) for m in (self.norm1, self.norm2)]
        first, second = (
            cut_softmax(one, mean, var + EPS, self.quantile)
            for one, (mean, var) in zip(logits, moments, strict=True)
        )
        return first, second

    @torch.no_grad()
    def track(self, moments: list[Moments]) -> None:
        """Move the running moments of both sides towards those of a batch."""
        for norm, (mean, var) in zip((self.norm1, self.norm2), moments, strict=True):
            norm.running_mean.lerp_(mean, MOMENTUM)
            norm.running_var.lerp_(var, MOMENTUM)
            norm.num_batches_tracked += 1


def batch_moments(logits: Float[Tensor, "*b heads n"]) -> Moments:
    """Mean and variance of the logits of each head over tokens and halves."""
    flat = logits.flatten(0, -3)
    return flat.mean((0, 2)), flat.var((0, 2), correction=0)


def cut_softmax(
    logits: Float[Tensor, "*b heads n"],
    mean: Float[Tensor, "heads"],
    var: Float[Tensor, "heads"],
    quantile: float,
) -> Float[Tensor, "*b heads n"]:
    """Softmax over the logits that pass the cut; all others are exactly 0."""
    with torch.no_grad():
        z = (logits - mean[:, None]) * var.rsqrt()[:, None]
        passes: Bool[Tensor, "*b heads n"] = z >= z.amax(-1, keepdim=True).clamp_max(quantile)
    return logits.masked_fill(~passes, -torch.inf).softmax(-1)


def mean_use(gates: Float[Tensor, "*b heads n"]) -> Use:
    """Mean gate of each half over tokens."""
    return gates.flatten(0, -3).mean(0)


def mean_logits_use(logits: Float[Tensor, "*b heads n"]) -> Use:
    """The same of gates without a cut: positive for every half."""
    return logits.softmax(-1).flatten(0, -3).mean(0)


def uniformity(first: Use, second: Use) -> Float[Tensor, ""]:
    """Cross-entropy of the use of both sides to an even one, in nats; least at ln n."""
    parts = [-use.clamp_min(FLOOR).log().mean() for use in (first, second)]
    return (parts[0] + parts[1]) / 2


def ambiguity(gates: Gates) -> Float[Tensor, ""]:
    """Mean weight beside the strongest half of a head, in [0, 1]."""
    parts = [1 - g.amax(-1).mean() for g in gates]
    return (parts[0] + parts[1]) / 2
