"""Planted data of the reweighting suite: variances that differ by direction, and controls."""

from collections.abc import Callable
from math import cos, pi, sin

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.synthetic import Planted, PlantedConfig, plant


def mixed_dictionary() -> Float[Tensor, "65 40"]:
    """20 axes, 10 digons on an axis each, 5 pentagons on a pair of axes each."""
    v = torch.zeros(65, 40)
    for i in range(20):
        v[i, i] = 1.0
    for i in range(10):
        v[20 + 2 * i, 20 + i], v[21 + 2 * i, 20 + i] = 1.0, -1.0
    corners = torch.tensor([[cos(2 * pi * j / 5), sin(2 * pi * j / 5)] for j in range(5)])
    for i in range(5):
        v[40 + 5 * i : 45 + 5 * i, 30 + 2 * i : 32 + 2 * i] = corners
    return v


def rotation(d: int, seed: int) -> Float[Tensor, "d d"]:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def toy_model(seed: int, steps: int = 1500) -> Planted:
    """The toy of arXiv 2209.10652 without bias: min_W E ||h - ReLU(W'W h)||^2, W [20, 200]."""
    config = PlantedConfig(n=200, d=20, row_sparsity=(2,), coefficients="uniform")
    planted = plant(config, seed)
    w = planted.dictionary.clone().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        h = planted.sample(512, generator).codes.to_dense()
        loss = (h - torch.relu(h @ w @ w.T)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Planted(config, w.detach())


def _mixed(seed: int, *, rotated: bool = False, zipf: float = 0.0) -> Planted:
    config = PlantedConfig(n=65, d=40, row_sparsity=(6,), coefficients="uniform", zipf=zipf)
    v = mixed_dictionary()
    if rotated:
        v = v @ rotation(40, seed)
    if zipf:
        v = v[torch.randperm(65, generator=torch.Generator().manual_seed(seed))]
    return Planted(config, v)


_DIGON = PlantedConfig(
    n=80, d=40, row_sparsity=(6,), dictionary="polygon", coefficients="uniform"
)  # fmt: skip
SETTINGS: dict[str, Callable[[int], Planted]] = {
    "elhage": toy_model,
    "default": lambda seed: plant(PlantedConfig(), seed),
    "digon": lambda seed: plant(_DIGON, seed),
    "mixed": _mixed,
    "rotated": lambda seed: _mixed(seed, rotated=True),
    "zipf": lambda seed: _mixed(seed, zipf=1.0),
}
