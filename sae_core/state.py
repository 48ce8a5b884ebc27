"""Configuration and state of one training run: what a checkpoint must hold beside the weights."""

from dataclasses import dataclass, field
from math import inf, sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

from sae_core.errors import UserError
from sae_core.firing import FiringStats
from sae_core.gba import GBAConfig
from sae_core.kernels.adam import Adam
from sae_core.loss import SparsityConfig
from sae_core.parallel import ALONE, Layout
from sae_core.reweighting import WeightConfig, Weights

Precision = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the SAE's own shape is in SAEConfig."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 1024
    """Tokens a step (for resuming and estimates; the batches decide)."""
    lr: float | None = None
    """Peak learning rate (None: `default_lr`)."""
    warmup_frac: float = 0.05
    """Share of the steps with a linearly rising learning rate."""
    decay_frac: float = 0.5
    """Share of the steps, at the end, with a linearly falling learning rate."""
    seed: int = 0
    """Initial weights and batch order."""
    init_tokens: int = 16384
    """Tokens of the first batches that set b_dec and the starting thresholds."""
    precision: Precision = "float32"
    """Type of the encoder's product; active entries are always recomputed in float32. int8: 8-bit
    integers with a margin (kernels/screen.py) where a threshold decides, numba is installed and the
    processor has instructions for them (VNNI), else bfloat16."""
    log_every: int = 10
    """Steps summed up in one StepRecord."""
    gba: GBAConfig = field(default_factory=GBAConfig)
    """Groups, target frequencies and controller of kind gba."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """Sparsity terms of the other kinds."""
    weights: WeightConfig = field(default_factory=WeightConfig)
    """Weights of the input dimensions in the reconstruction loss."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.log_every < 1:
            raise UserError(
                f"steps, batch_size and log_every must be at least 1, got {self.steps}, "
                f"{self.batch_size} and {self.log_every}."
            )
        if self.lr is not None and not 0 < self.lr < inf:
            raise UserError(f"lr must be a number above 0, got {self.lr}.")
        if self.init_tokens < 1:
            raise UserError(f"init_tokens must be at least 1, got {self.init_tokens}.")
        if self.precision not in (known := get_args(Precision)):
            raise UserError(f"precision must be one of {', '.join(known)}, got {self.precision!r}.")
        parts = (self.warmup_frac, self.decay_frac)
        if not (min(parts) >= 0 and sum(parts) <= 1):  # so that NaN is refused
            raise UserError(
                f"warmup_frac and decay_frac must be shares that sum to at most 1, got "
                f"{self.warmup_frac} and {self.decay_frac}."
            )

    @property
    def product_type(self) -> torch.dtype:
        """Of products that rank or are looked at themselves, for which 8 bits are too few."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16


@dataclass
class TrainState:
    """Everything besides the weights that a step reads and writes; see checkpoint.py.

    Tensors of [d_sae] numbers hold those of this process's latents; `taf` is that of all groups.
    """

    step: int = 0
    tokens: int = 0
    variance: float = 1.0
    spread: float = 1.0
    l1: float = 0.0
    threshold: float = 0.0
    group: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    taf: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    demand: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    firing: FiringStats = field(default_factory=lambda: FiringStats(0))
    tokens_since: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    optimizer: Adam | None = None
    weights: Weights | None = None
    layout: Layout = ALONE

    @property
    def started(self) -> bool:
        """False before the first batch was seen."""
        return self.optimizer is not None


def default_lr(kind: str, d_sae: int) -> float:
    """Peak rate that did best in benchmarks/results/sae_quality.json (d_sae 4,608, batch 1,024).

    Above 16,384 latents it falls as 1/sqrt(d_sae), the rule of the TopK trainers.
    """
    base = {"gba": 8e-3, "topk": 4e-3, "batch_topk": 4e-3, "jumprelu": 4e-3, "relu": 2e-3}[kind]
    return base / max(1.0, sqrt(d_sae / 2**14))


def learning_rate(step: int, peak: float, config: TrainConfig) -> float:
    """Linear warm-up, plateau, linear decay to 1/decay-steps of the peak; step counts from 0."""
    warmup = max(1, round(config.warmup_frac * config.steps))
    decay = max(1, round(config.decay_frac * config.steps))
    return peak * min(1.0, (step + 1) / warmup, (config.steps - step) / decay)
