"""One training on planted data, and the path from the published GBA to the default."""

from dataclasses import dataclass, field, replace
from typing import Literal

from sae_core.gba import GBAConfig, paper_main, paper_recommended
from sae_core.sae import Kind


@dataclass(frozen=True)
class Trial:
    """One way to train on a setting."""

    kind: Kind
    """Of the SAE."""
    label: str = "default"
    """Name of the configuration in the result."""
    k: int = 0
    """Active latents a token; 0: from the shape."""
    lr: float | None = None
    """Peak learning rate; None: default."""
    tied: bool = False
    """One direction for encoder and decoder."""
    gate: Literal["jumprelu", "relu"] = "jumprelu"
    """gba: value without the bias or with it."""
    gba: GBAConfig = field(default_factory=GBAConfig)
    """Groups, targets and controller."""


def path() -> dict[str, Trial]:
    """From the published algorithm to the default, one change after the other, then single steps
    back from the default."""
    paper = paper_main()
    quantile = replace(paper, start="quantile")
    every = replace(quantile, period=1, gamma=0.03)
    free = replace(every, b_max=1.0, rule="proportional")
    summed = replace(free, htf=None, ltf=None, targets="fixed")
    base = GBAConfig()
    return {
        "published": Trial("gba", gba=paper, tied=True),
        "published, HTF .5": Trial("gba", gba=paper_recommended(), tied=True),
        "+ quantile start": Trial("gba", gba=quantile, tied=True),
        "+ untied decoder": Trial("gba", gba=quantile),
        "+ every step, gamma .03": Trial("gba", gba=every),
        "+ proportional rule": Trial("gba", gba=free),
        "+ targets sum to k": Trial("gba", gba=summed),
        "+ targets from data": Trial("gba", gba=replace(base, calibrate_tokens=0)),
        "default": Trial("gba"),
        "constant gamma": Trial("gba", gba=replace(base, boost=1.0)),
        "start b=0": Trial("gba", gba=replace(base, start="zero")),
        "tied": Trial("gba", tied=True),
        "published rule": Trial("gba", gba=replace(base, rule="published")),
        "period 50": Trial("gba", gba=replace(base, period=50)),
        "frozen b_dec": Trial("gba", gba=replace(base, centre="mean")),
        "biases at most 0": Trial("gba", gba=replace(base, b_max=0.0)),
        "relu gate": Trial("gba", gate="relu"),
        "one group": Trial("gba", gba=replace(base, n_groups=1)),
        "40 groups": Trial("gba", gba=replace(base, n_groups=40)),
        "ratio 2": Trial("gba", gba=replace(base, ratio=2.0)),
        "ratio 10": Trial("gba", gba=replace(base, ratio=10.0)),
        "ratio 30": Trial("gba", gba=replace(base, ratio=30.0)),
        "fixed targets, ratio 10": Trial("gba", gba=replace(base, ratio=10.0, targets="fixed")),
        "gamma .01": Trial("gba", gba=replace(base, gamma=0.01)),
        "half the k": Trial("gba", k=2),
        "twice the k": Trial("gba", k=6),
    }
