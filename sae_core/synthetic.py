"""Planted data X = H V + noise: activations whose true features are known.

The data model of arXiv 2506.14002, section 5 (and, for digons and polygons, the toy models that
arXiv 2506.15963 takes from 2209.10652): rows of V [n, d] are the features, rows of H [N, n] hold
few positive coefficients. H is drawn row by row in sparse form and never dense, so n = 65,536
streams in bounded memory.

    planted = plant(PlantedConfig(n=128, d=42, row_sparsity=(3, 20)), seed=0)
    for x in planted.batches(512, seed=0):      # an endless stream of [512, 42]
        ...

Features of a row are drawn one after the other without replacement, with probabilities in
proportion to (rank)^-zipf (successive sampling, Plackett-Luce). On top of that:

    pairs      each drawn feature brings its partner, (0,1), (2,3), ..., beside the s drawn, with
               probability strength / (2 - strength): then P(j | i) of partners, the paper's rho_2,
               is `strength` plus the chance rate
    hierarchy  an odd feature (child) brings its even one (parent) with probability `strength`: at
               1 no child occurs without its parent
    topics     with probability `strength` a slot draws from the row's topic, one of n_topics sets
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi, sin
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_core.errors import UserError
from sae_core.kernels import sparse
from sae_core.kernels.codes import Codes, row_starts

DICTIONARY_SEED = 1_500_000_007  # torch's CPU generator reads the lower 32 bits of a seed


@dataclass(frozen=True)
class PlantedConfig:
    """Shape and law of planted data."""

    n: int = 128
    """Number of true features."""
    d: int = 42
    """Width of the data."""
    row_sparsity: tuple[int, ...] = (3,)
    """Features in a row, s; each row draws one of these with equal probability."""
    dictionary: Literal["gaussian", "orthogonal", "polygon"] = "gaussian"
    """Unit rows: Gaussian directions; orthonormal (n <= d); polygons of `sides` corners, each in
    a plane (sides=2: antipodal pairs, digons, each on a line) of its own."""
    sides: int = 2
    """Corners of a polygon: n = sides * planes."""
    zipf: float = 0.0
    """Exponent of the features' probabilities, (rank)^-zipf (0: all equal)."""
    structure: Literal["independent", "pairs", "topics", "hierarchy"] = "independent"
    """Which features occur together; see the module's text."""
    strength: float = 0.0
    """Probability of the structure's effect, in [0, 1]."""
    n_topics: int = 16
    """Blocks of features for structure "topics"."""
    coefficients: Literal["one", "uniform", "exponential"] = "one"
    """Nonzeros of H: 1; uniform in [0.5, 1.5]; 0.1 + 0.9 * standard exponential."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise in each coordinate of X."""

    def __post_init__(self) -> None:
        s = max(self.row_sparsity, default=0)
        if min(self.row_sparsity, default=0) < 1 or 2 * s > self.n:
            raise UserError(
                f"row_sparsity must lie between 1 and n/2={self.n // 2}, got {self.row_sparsity}."
            )
        if not 0 <= self.strength <= 1 or self.zipf < 0 or self.noise < 0:
            raise UserError(
                "strength must lie in [0, 1], zipf and noise must not be negative, got "
                f"{self.strength}, {self.zipf} and {self.noise}."
            )
        if self.dictionary == "orthogonal" and self.n > self.d:
            raise UserError(f"An orthonormal dictionary needs n <= d={self.d}, got n={self.n}.")
        if self.dictionary == "polygon":
            self._check_polygon()
        if self.structure in ("pairs", "hierarchy") and self.n % 2:
            raise UserError(f"{self.structure} need an even n, got {self.n}.")
        if self.structure == "topics" and not (
            1 <= self.n_topics <= self.n // (2 * s) and self.n % self.n_topics == 0
        ):
            raise UserError(
                f"n_topics must divide n={self.n} into blocks of at least 2s={2 * s} features, "
                f"got {self.n_topics}."
            )

    def _check_polygon(self) -> None:
        planes, rest = divmod(self.n, max(self.sides, 1))
        width = planes * (1 if self.sides == 2 else 2)
        if self.sides < 2 or rest or width > self.d:
            raise UserError(
                f"Polygons need sides >= 2 that divide n={self.n}, and room for their lines or "
                f"planes in d={self.d}, got sides={self.sides}."
            )


class Sample(NamedTuple):
    """Rows of planted data with the truth behind them."""

    x: Float[Tensor, "N d"]
    """Data."""
    codes: Codes
    """H in compressed sparse rows, [N, n]."""


@dataclass(frozen=True)
class Planted:
    """A planted dictionary and the law of its data."""

    config: PlantedConfig
    """Shape and law."""
    dictionary: Float[Tensor, "n d"]
    """V: row i is feature i, of unit length."""

    def sample(self, n_rows: int, generator: torch.Generator) -> Sample:
        """Draw n_rows rows of X = H V + noise.

        Memory: O(n_rows * (d + max s) + n), never n_rows * n.
        """
        codes = self._codes(n_rows, generator)
        x = sparse.matmul(codes, self.dictionary)
        if self.config.noise:
            x = x + self.config.noise * torch.randn(x.shape, generator=generator)
        return Sample(x, codes)

    def batches(self, batch_size: int, seed: int) -> Iterator[Float[Tensor, "batch d"]]:
        """Endless independent batches [batch_size, d]; the same seed gives the same stream."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.sample(batch_size, generator).x

    def _codes(self, n_rows: int, generator: torch.Generator) -> Codes:
        config = self.config
        sizes = torch.tensor(config.row_sparsity)
        s = sizes[torch.randint(len(sizes), (n_rows,), generator=generator)]
        used = torch.arange(int(sizes.max())) < s[:, None]
        col = _distinct(config, n_rows, used.shape[1], generator)
        if config.structure in ("pairs", "hierarchy"):
            col, used = _bring(config, col, used, generator)
        col, order = torch.where(used, col, config.n).sort(dim=1)
        row, slot = used.gather(1, order).nonzero(as_tuple=True)
        values = _coefficients(config, len(row), generator)
        return Codes(row_starts(row, n_rows), row, col[row, slot], values, config.n)


def plant(config: PlantedConfig, seed: int) -> Planted:
    """Draw a dictionary; `Planted.sample` and `batches` draw its data."""
    # far from the seeds in use: SAE(generator=manual_seed(seed)) draws normals too, and would
    # otherwise start from the very dictionary that it is to find
    generator = torch.Generator().manual_seed(seed + DICTIONARY_SEED)
    match config.dictionary:
        case "gaussian":
            v = torch.randn(config.n, config.d, generator=generator)
        case "orthogonal":
            v = _orthonormal(config.n, config.d, generator)
        case "polygon":
            v = _polygons(config, generator)
    return Planted(config, v / v.norm(dim=1, keepdim=True))


def _orthonormal(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    return torch.linalg.qr(torch.randn(d, n, generator=generator))[0].T.contiguous()


def _polygons(config: PlantedConfig, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Corners of regular polygons in orthogonal planes (digons: on orthogonal lines), rotated."""
    if config.sides == 2:
        corner = torch.tensor([[1.0], [-1.0]])
    else:
        angles = [2 * pi * i / config.sides for i in range(config.sides)]
        corner = torch.tensor([[cos(a), sin(a)] for a in angles])
    planes = config.n // config.sides
    basis = _orthonormal(planes * corner.shape[1], config.d, generator)
    return torch.einsum("sc,pcd->psd", corner, basis.view(planes, -1, config.d)).flatten(0, 1)


def _coefficients(config: PlantedConfig, nnz: int, generator: torch.Generator) -> Tensor:
    match config.coefficients:
        case "one":
            return torch.ones(nnz)
        case "uniform":
            return 0.5 + torch.rand(nnz, generator=generator)
        case "exponential":
            return 0.1 + 0.9 * torch.empty(nnz).exponential_(generator=generator)


def _duplicates(col: Int[Tensor, "N s"]) -> Bool[Tensor, "N s"]:
    """True where a slot repeats an earlier slot of its row."""
    value, order = col.sort(dim=1, stable=True)
    again = torch.zeros_like(col, dtype=torch.bool)
    again[:, 1:] = value[:, 1:] == value[:, :-1]
    return torch.zeros_like(again).scatter_(1, order, again)


def _distinct(
    config: PlantedConfig, n_rows: int, s: int, generator: torch.Generator
) -> Int[Tensor, "N s"]:
    """s distinct features a row: slots that repeat an earlier one are drawn again until none does.

    A discarded value always equals an earlier slot's, so this is successive sampling exactly.
    """
    law = _Law(config, n_rows, generator)
    col = law.draw(torch.arange(n_rows).repeat_interleave(s)).view(n_rows, s)
    while (again := _duplicates(col)).any():
        col[again] = law.draw(again.nonzero()[:, 0])
    return col


def _bring(
    config: PlantedConfig,
    col: Int[Tensor, "N s"],
    used: Bool[Tensor, "N s"],
    generator: torch.Generator,
) -> tuple[Int[Tensor, "N s2"], Bool[Tensor, "N s2"]]:
    """The drawn features and, behind them, the partners that they bring."""
    p = config.strength / (2 - config.strength) if config.structure == "pairs" else config.strength
    brought = used & (torch.rand(col.shape, generator=generator) < p)
    if config.structure == "hierarchy":
        brought &= col % 2 == 1
    partner = col ^ 1
    there = ((partner[:, :, None] == col[:, None, :]) & used[:, None, :]).any(2)
    return torch.cat((col, partner), 1), torch.cat((used, brought & ~there), 1)


class _Law:
    """The distribution of one slot, given its row."""

    def __init__(self, config: PlantedConfig, n_rows: int, generator: torch.Generator) -> None:
        self.config, self.generator = config, generator
        self.cumulative = None
        if config.zipf:
            p = torch.arange(1, config.n + 1, dtype=torch.float64) ** -config.zipf
            self.cumulative = (p / p.sum()).cumsum(0)
        if config.structure == "topics":
            self.topic = torch.randint(config.n_topics, (n_rows,), generator=generator)

    def draw(self, row: Int[Tensor, "m"]) -> Int[Tensor, "m"]:
        """One feature for each entry; topics: every n_topics-th feature from the topic's first."""
        config, m = self.config, len(row)
        if self.cumulative is None:
            found = torch.randint(config.n, (m,), generator=self.generator)
        else:
            u = torch.rand(m, dtype=torch.float64, generator=self.generator)
            found = torch.searchsorted(self.cumulative, u).clamp_max(config.n - 1)
        if config.structure == "topics":
            own = torch.rand(m, generator=self.generator) < config.strength
            in_topic = found - found % config.n_topics + self.topic[row]
            found = torch.where(own, in_topic, found)
        return found
