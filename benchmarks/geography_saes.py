"""The SAEs of benchmarks.geography: trained on independent text, never on the places.

SmolLM2-135M: those of benchmarks.selection_data (layer 15, GBA and TopK, 1M tokens) and of
benchmarks.selection_layers (GBA at four layers, 262,144 tokens). Gemma-3-270m knows more places for
its size and has no SAE elsewhere in these benchmarks, so it gets its own here: GBA at three layers
and TopK at the last of them, 524,288 tokens of the built-in text each, eight latents a dimension.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from sae_apps.tasks.text import open_text
from sae_core.activations import HarvestConfig
from sae_core.buffer import batches
from sae_core.download import cache_dir
from sae_core.gba import GBAConfig
from sae_core.harvest import harvest_shards
from sae_core.models import LanguageModel, load_model
from sae_core.sae import SAE, SAEConfig, load_sae, save_sae
from sae_core.state import TrainConfig, default_lr
from sae_core.text import split_rows
from sae_core.train import train

GEMMA = "gemma-3-270m"
GEMMA_LAYERS = (7, 13, 15)
TOPK_LAYER = 15
TOKENS, CALIBRATE = 524_288, 32_768
BATCH, EXPANSION, K = 1024, 8, 64
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """One SAE to be trained: how, and where in the model."""

    kind: str
    """gba or topk."""
    layer: int
    """The SAE reads the output of this block."""

    @property
    def hook_point(self) -> str:
        """Canonical name of the place in the model."""
        return f"layers.{self.layer}.out"

    @property
    def name(self) -> str:
        """Folder and label."""
        return f"{self.kind}-{self.layer}"


GEMMA_SAES = (*(Trained("gba", layer) for layer in GEMMA_LAYERS), Trained("topk", TOPK_LAYER))


def load_gemma() -> LanguageModel:
    """Gemma-3-270m in bfloat16. Running this benchmark is the consent to its terms of use."""
    return load_model(GEMMA, dtype=torch.bfloat16, accept_terms=True)


def gemma_saes(lm: LanguageModel | None = None) -> dict[str, tuple[str, SAE]]:
    """Name to (hook point, SAE); those of an earlier run are read."""
    folder = cache_dir() / "benchmarks" / "geography" / GEMMA
    missing = [one for one in GEMMA_SAES if not (folder / one.name).exists()]
    if missing:
        _train(lm or load_gemma(), missing, folder)
    return {one.name: (one.hook_point, load_sae(folder / one.name)[0]) for one in GEMMA_SAES}


def _train(lm: LanguageModel, wanted: list[Trained], folder: Path) -> None:
    rows, _ = split_rows(open_text("demo"), 0.1, 0)
    hooks = [f"layers.{layer}.out" for layer in GEMMA_LAYERS]
    config = HarvestConfig(max_tokens=TOKENS + CALIBRATE)
    shards = harvest_shards(lm, rows, hooks, folder / "shards", config, dtype="bfloat16")
    d_sae = EXPANSION * lm.d_model
    for one in wanted:
        settings = TrainConfig(
            steps=TOKENS // BATCH, batch_size=BATCH, lr=default_lr(one.kind, d_sae),
            precision="bfloat16", gba=GBAConfig(calibrate_tokens=CALIBRATE),
        )  # fmt: skip
        sae = SAE(
            SAEConfig(lm.d_model, d_sae, kind=one.kind, k=K),  # type: ignore[arg-type]
            generator=torch.Generator().manual_seed(0),
        )
        *_, last = train(sae, batches(shards[one.hook_point], BATCH, seed=0), settings)
        LOG.info("%s: %s", one.name, last)
        facts = {"hook_point": one.hook_point, "model_id": lm.model_id, "tokens": TOKENS}
        save_sae(folder / one.name, sae, facts, overwrite=True)
