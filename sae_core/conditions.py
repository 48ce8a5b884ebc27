"""What the theory of identifiable SAEs asks of codes, data and dictionary, measured as they stream.

arXiv 2506.14002, Definition 5.2 and Theorem 6.1, speak of the true features; all that is at hand of
a trained SAE is its latents. With u the (normalised) tokens, w_j the unit decoder direction of
latent j, z_j = w_j'(u - c) and F_j its distribution, measured are for each latent

    freq_j       share of tokens on which it fires
    mean_act_j   mean nonzero activation times scale, and peak_j the largest                (H2)
    kurtosis_j   fourth central moment of z over its variance squared: 3 for a Gaussian; a feature
                 of size h and frequency f adds about f h^4 to the moment               (H1, H2)
    alignment_j  cos(w_j, E[u | j fires] - E[u]): 1 where the tokens that excite the latent have
                 nothing in common but its direction                                        (V1)
    rho_j        max_i #(i, j) / #j over latents i that are not its copies, from a sample    (H3)
    excess_j     max_i #(i, j) / #j - freq_i: without what chance gives
    band_freq_j  how often z_j lies in an upper mode that its own lower tail lacks, see modes.py

`band_freq` is our estimate of the frequency of the feature that the latent stands for. It looks at
the data along w_j, not at the threshold, so it can be held against `freq`. Where interference hides
part of a feature's occurrences it is too low: on planted data (d=42, equal sizes) its median over
recovered latents was 0.9 of the true frequency at 3 features a token, 0.7 at 5, 0.5 at 6 and 0.3 to
0.5 at 8 (benchmarks/results/verdict.json).

Latents closer than cosine 0.7 count as copies of one feature: Definition 5.1 joins split features.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import scipy.sparse
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_core.activations import Activations
from sae_core.cooccurrence import indicator, pair_statistics
from sae_core.cosines import unit_rows
from sae_core.errors import UserError
from sae_core.kernels.codes import Codes
from sae_core.modes import upper_mode
from sae_core.sae import SAE

BINS, REACH = 200, 10.0  # of the histogram of z: bins, and standard deviations on either side
SAMPLE_TOKENS = 65536  # tokens whose codes are kept for the co-occurrence
FIRED_BLOCK = 1 << 16  # firings whose tokens are gathered at a time
PROJECT_BLOCK = 1 << 22  # entries of a block of projections


@dataclass(frozen=True)
class Conditions:
    """Measurements over n_tokens tokens; arrays hold 0 where a mask says undefined."""

    n_tokens: int
    """Tokens measured."""
    n_sampled: int
    """Tokens behind the co-occurrence."""
    d_in: int
    """Width of the data."""
    l0: float
    """Mean active latents a token."""
    l0_low: int
    """10th percentile of the active latents a token."""
    l0_high: int
    """90th percentile of the active latents a token."""
    count: Int[Tensor, "d_sae"]
    """Tokens on which the latent fired."""
    mean_act: Float[Tensor, "d_sae"]
    """Mean nonzero activation times scale, in units of the normalised tokens."""
    peak: Float[Tensor, "d_sae"]
    """Largest activation times scale."""
    kurtosis: Float[Tensor, "d_sae"]
    """Of the projection on the latent's direction; 0 where this does not vary."""
    alignment: Float[Tensor, "d_sae"]
    """Cosine of the direction with the mean of the tokens that it fires on; 0 where none does."""
    rho: Float[Tensor, "d_sae"]
    """Largest share of the latent's firings that another latent accompanies."""
    excess: Float[Tensor, "d_sae"]
    """Largest such share beyond the other latent's own frequency."""
    partner: Int[Tensor, "d_sae"]
    """The latent behind `excess`; -1 where the latent did not fire in the sample."""
    sample_count: Int[Tensor, "d_sae"]
    """Firings within the sample."""
    band_freq: Float[Tensor, "d_sae"]
    """Estimated frequency of the feature behind the latent."""
    has_band: Bool[Tensor, "d_sae"]
    """Whether an upper mode stands out from the noise, so that band_freq is defined."""
    n_copies: Int[Tensor, "d_sae"]
    """Other alive latents closer than cosine 0.7."""
    coherence: Float[Tensor, "d_sae"]
    """Largest |cosine| with an alive latent that is no copy."""
    max_cosine: Float[Tensor, "d_sae"]
    """Largest |cosine| with any other alive latent, copies included."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.count)

    @property
    def freq(self) -> Float[Tensor, "d_sae"]:
        """Share of tokens on which the latent fired, float64."""
        return self.count.double() / max(1, self.n_tokens)

    @property
    def is_alive(self) -> Bool[Tensor, "d_sae"]:
        """Fired at least once."""
        return self.count > 0


class ConditionStats:
    """Running sums of one SAE over tokens; `update` token batches of any size, `merge`, `compute`.

    Memory: d_sae * (d_in + 200) numbers, the codes of the first `sample_tokens` tokens, and blocks.
    """

    def __init__(
        self, sae: SAE, probe: Float[Tensor, "n d_in"], sample_tokens: int = SAMPLE_TOKENS
    ) -> None:
        """Fix the origin and the units of the histograms.

        Args:
            probe: some hundred tokens or more, of the same kind as those measured; processes whose
                statistics are merged must use the same.
            sample_tokens: tokens whose codes are kept for the co-occurrence.
        Raises:
            UserError: fewer than two tokens, or another width.
        """
        if len(probe) < 2:
            raise UserError(f"Expected a probe of at least 2 tokens, got {len(probe)}.")
        self.sae, self.sample_tokens = sae, sample_tokens
        u, _ = sae.normalise(probe.to(sae.W_enc.device))
        with torch.no_grad():
            self.w = unit_rows(sae.W_dec.detach().float())
            self.centre = u.float().mean(0)
            self.unit = ((u.float() - self.centre) @ self.w.T).std(0).clamp_min(1e-12)
        device, m = self.w.device, sae.d_sae
        self.n_tokens = 0
        self.count = torch.zeros(m, dtype=torch.int64, device=device)
        self.total_act = torch.zeros(m, dtype=torch.float64, device=device)
        self.peak = torch.zeros(m, device=device)
        self.total = torch.zeros(sae.d_in, dtype=torch.float64, device=device)
        self.fired = torch.zeros(m, sae.d_in, device=device)
        self.power = torch.zeros(4, m, dtype=torch.float64, device=device)
        self.hist = torch.zeros(m * BINS, dtype=torch.int64, device=device)
        self.l0_hist = torch.zeros(m + 1, dtype=torch.int64, device=device)
        self.sample: list[Any] = []  # CSR arrays of 1 where a latent fires

    @torch.no_grad()
    def update(self, x: Float[Tensor, "n d_in"]) -> None:
        """Add tokens (raw, as the SAE reads them)."""
        sae = self.sae
        u, _ = sae.normalise(x.to(self.w.device))
        codes = sae.codes_of(u)
        centred = u.float() - self.centre
        values = (codes.values * sae.scale[codes.col]).float()
        self.n_tokens += codes.n
        self.count += torch.bincount(codes.col, minlength=sae.d_sae)
        self.total_act.index_add_(0, codes.col, values.double())
        self.peak.scatter_reduce_(0, codes.col, values, "amax")
        self.total += centred.sum(0, dtype=torch.float64)
        self.l0_hist += torch.bincount(codes.crow.diff(), minlength=sae.d_sae + 1)
        self._add_fired(codes, centred)
        self._add_projections(centred)
        self._add_sample(codes)

    def _add_fired(self, codes: Codes, centred: Tensor) -> None:
        for part in torch.arange(len(codes.col), device=self.w.device).split(FIRED_BLOCK):
            self.fired.index_add_(0, codes.col[part], centred[codes.row[part]])

    def _add_projections(self, centred: Tensor) -> None:
        step = max(1, PROJECT_BLOCK // self.sae.d_sae)
        first = torch.arange(self.sae.d_sae, device=self.w.device) * BINS
        for block in centred.split(step):
            z = block @ self.w.T / self.unit
            power = z
            for i in range(4):
                self.power[i] += power.sum(0, dtype=torch.float64)
                power = power * z
            bin_ = ((z / REACH + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
            self.hist += torch.bincount((bin_ + first).flatten(), minlength=len(self.hist))

    def _add_sample(self, codes: Codes) -> None:
        room = self.sample_tokens - sum(part.shape[0] for part in self.sample)
        if room > 0:
            self.sample.append(indicator(codes)[:room])

    def merge(self, other: "ConditionStats") -> None:
        """Add the statistics of later tokens.

        Raises:
            UserError: of another SAE or measured with another probe.
        """
        if not (torch.equal(self.w, other.w) and torch.equal(self.unit, other.unit)):
            raise UserError("Expected statistics of one SAE and one probe, got those of two.")
        self.n_tokens += other.n_tokens
        for name in ("count", "total_act", "total", "fired", "power", "hist", "l0_hist"):
            getattr(self, name).add_(getattr(other, name))
        self.peak = torch.maximum(self.peak, other.peak)
        room = self.sample_tokens - sum(part.shape[0] for part in self.sample)
        for part in other.sample:
            if room > 0:
                self.sample.append(part[:room])
                room -= part.shape[0]

    @torch.no_grad()
    def compute(self) -> Conditions:
        """Raises:
        UserError: no tokens were measured.
        """
        if not self.n_tokens:
            raise UserError("Expected tokens to measure the conditions on, got none.")
        n, alive = self.n_tokens, self.count > 0
        shift = self.fired.double() / self.count.clamp_min(1)[:, None] - self.total / n
        alignment = torch.cosine_similarity(shift, self.w.double(), dim=1) * alive
        m1, m2, m3, m4 = self.power / n
        var = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        kurtosis = torch.where(var > 1e-9, fourth / var.clamp_min(1e-9) ** 2, 0.0)
        band, has_band = upper_mode(self.hist.view(-1, BINS), n)
        pairs = pair_statistics(self.w, alive, scipy.sparse.vstack(self.sample, format="csr"))
        spread = self.l0_hist.cumsum(0) / n
        return Conditions(
            n_tokens=n,
            n_sampled=sum(part.shape[0] for part in self.sample),
            d_in=self.sae.d_in,
            l0=float(self.count.sum()) / n,
            l0_low=int((spread < 0.1).sum()),
            l0_high=int((spread < 0.9).sum()),
            count=self.count.cpu().clone(),
            mean_act=(self.total_act / self.count.clamp_min(1)).float().cpu(),
            peak=self.peak.cpu().clone(),
            kurtosis=kurtosis.float().cpu(),
            alignment=alignment.float().cpu(),
            band_freq=band.float().cpu(),
            has_band=has_band.cpu(),
            **pairs,
        )


def measure_conditions(
    sae: SAE, batches: Iterable[Activations | Tensor], sample_tokens: int = SAMPLE_TOKENS
) -> Conditions:
    """The conditions over a stream of tokens; the first batch is the probe.

    Raises:
        UserError: no tokens, or of another width than the SAE's.
    """
    stats = None
    was_training = sae.training
    sae.eval()  # in training mode a token's BatchTopK code depends on its batch
    try:
        for batch in batches:
            x = batch.x if isinstance(batch, Activations) else batch
            stats = ConditionStats(sae, x, sample_tokens) if stats is None else stats
            stats.update(x)
    finally:
        sae.train(was_training)
    if stats is None:
        raise UserError("Expected tokens to measure the conditions on, got none.")
    return stats.compute()
