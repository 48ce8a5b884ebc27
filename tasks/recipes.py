"""Named settings: functions that return configurations, used by the commands and from Python.

from sae_apps.tasks.recipes import demo
from sae_apps.tasks.common import StopSignal
from sae_apps.tasks.train import train_run

results = train_run(demo("runs/demo"), StopSignal())
"""

from collections.abc import Callable
from typing import Literal

from sae_core.gba import GBAConfig, ba, paper_main, paper_recommended
from sae_core.models import DEFAULT_MODEL
from sae_core.state import TrainConfig

from .settings import ModelOptions, RunOptions, TextOptions, TrainSettings

# Published settings of Group Bias Adaptation, by the name that --preset takes.
GBA_PRESETS: dict[str, Callable[[], GBAConfig]] = {
    "paper_main": paper_main,
    "paper_recommended": paper_recommended,
    "ba": ba,
}


def demo(
    out: str = "runs/demo", *, precision: Literal["float32", "bfloat16"] = "float32"
) -> TrainSettings:
    """The default model and text in minutes: 450,000 tokens, 4,608 latents, three passes.

    450,000 tokens are the first 2,000 rows or so of the demo text: their stored activations train
    the SAE and become the features, so the model reads them once.

    Args:
        out: folder of the run.
        precision: of the forward pass and the encoder's product; bfloat16 where the processor has
            fast instructions for it.
    """
    return TrainSettings(
        model=ModelOptions(name=DEFAULT_MODEL, dtype=precision),
        text=TextOptions(source="demo"),
        run=RunOptions(
            out=out,
            hook="layers.15.out",
            tokens=450_000,
            epochs=3,
            eval_tokens=65_536,
            loss_tokens=6_000,
        ),
        sae={"kind": "gba", "d_sae": 4608},
        train=TrainConfig(batch_size=1024, precision=precision),
    )
