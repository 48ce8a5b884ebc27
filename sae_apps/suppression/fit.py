"""From labelled texts to an App: read the units, test them, tabulate posteriors, calibrate.

Every kept token inherits the label of its text. Four fifths of the texts of each class choose the
units and fill the histograms; the rest drops units whose posterior predicts no better than the
prior, fits the temperature of the joint gate of the others and calibrates. The model runs once; its
values lie on disk until the fit is done (``scratch``), so that memory does not grow with the texts.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int

from sae_apps.suppression.app import BEYOND, GATES, App
from sae_apps.suppression.calibration import Calibration, calibration_of
from sae_apps.suppression.choice import Separation, separation
from sae_apps.suppression.histogram import Histogram
from sae_apps.suppression.posterior import (
    MODES,
    attenuation,
    check_prior,
    concept_mask,
    log_odds,
    posterior_tables,
)
from sae_apps.suppression.scratch import read_values
from sae_apps.suppression.tokens import histogram_of
from sae_apps.suppression.units import Units, open_units
from sae_core.activations import HarvestConfig
from sae_core.errors import UserError
from sae_core.models import LanguageModel, load_model
from sae_core.sae import SAE

BACKGROUND = "background"


@dataclass(frozen=True)
class FitConfig:
    """How an App is fitted."""

    n_units: int = 64
    """Units at most."""
    significance: float = 0.05
    """Largest p-value of a chosen unit, corrected for the number of units; 1: no filter."""
    permutations: int = 100
    """Of the texts' labels, for the p-values."""
    n_bins: int = 16
    """Bins beside the atom."""
    mode: str = "excess"
    """excess or posterior, see ``posterior.attenuation``."""
    gate: str = "unit"
    """unit or joint, see ``app``."""
    beyond: str = "overshoot"
    """What a strength above 1 does: overshoot or clip."""
    prior: Mapping[str, float] | None = None
    """Base rate of every class, ``background`` included; None: uniform."""
    held_out_frac: float = 0.2
    """Texts of each class for the calibration; 0: none, and no unit is dropped."""
    min_texts: int = 10
    """Texts that each class must have."""
    seed: int = 0
    """Of the permutations, the split and the sample of the bins."""
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    """Which tokens are read, and the batches."""

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("gate", GATES), ("beyond", BEYOND)):
            if getattr(self, name) not in known:
                raise UserError(f"Expected a {name} of {known}, got {getattr(self, name)!r}.")
        for name, least in (("n_units", 0), ("permutations", 1), ("n_bins", 2), ("min_texts", 2)):
            if getattr(self, name) < least:
                raise UserError(f"Expected {name} of at least {least}, got {getattr(self, name)}.")
        if not 0 < self.significance <= 1:
            raise UserError(f"Expected a significance in (0, 1], got {self.significance}.")
        if (least_p := 1 / (1 + self.permutations)) > self.significance:
            raise UserError(
                f"Expected permutations of at least {ceil(1 / self.significance - 1e-9) - 1} for a "
                f"significance of {self.significance:g}, got {self.permutations}: no p-value is "
                f"below {least_p:.2g}."
            )
        if not 0 <= self.held_out_frac < 1:
            raise UserError(f"Expected held_out_frac in [0, 1), got {self.held_out_frac}.")
        if self.gate == "joint" and self.held_out_frac == 0:
            raise UserError("Expected held_out_frac above 0 for the gate 'joint', got 0.")


@dataclass(frozen=True, eq=False)
class Fit:
    """An App and what led to it."""

    app: App
    """The edit."""
    separation: Separation
    """Of all units."""
    calibration: Calibration | None
    """On held-out texts: the loss of every chosen unit, those dropped included, and the joint gate
    of the units that are left."""
    dropped: int
    """Chosen units that predicted held-out tokens no better than the prior."""
    n_texts: dict[str, int]
    """Texts of each class."""


def fit_app(
    model: LanguageModel | str | Path,
    sae: SAE | str | Path | None,
    texts: Sequence[str],
    labels: Sequence[str],
    concept: str | Sequence[str],
    background: Sequence[str] | None = None,
    *,
    groups: Sequence[Hashable] | None = None,
    hook_point: str | None = None,
    kind: str = "latents",
    config: FitConfig = FitConfig(),  # noqa: B008 - frozen
) -> App:
    """Fit the suppression of one or several concepts; see ``fit_report`` for the whole result."""
    return fit_report(
        model, sae, texts, labels, concept, background,
        groups=groups, hook_point=hook_point, kind=kind, config=config,
    ).app  # fmt: skip


def fit_report(
    model: LanguageModel | str | Path,
    sae: SAE | str | Path | None,
    texts: Sequence[str],
    labels: Sequence[str],
    concept: str | Sequence[str],
    background: Sequence[str] | None = None,
    *,
    groups: Sequence[Hashable] | None = None,
    hook_point: str | None = None,
    kind: str = "latents",
    config: FitConfig = FitConfig(),  # noqa: B008 - frozen
) -> Fit:
    """Fit the suppression of one or several concepts, and keep tests and calibration.

    Args:
        model: a loaded language model, or the name or path of one.
        sae: an SAE (then name its hook point) or the folder of one; None for other kinds of units.
        texts: n labelled texts.
        labels: n names of classes.
        concept: what to suppress: one class, or several.
        background: neutral texts, a class of their own; what they share with the concept is kept.
        groups: the document of each text (a sentence and its rewrites are one), which stays
            together when texts are held out; None: each text is one.
        hook_point: where the units are, e.g. ``layers.15.out``.
        kind: latents, residual or neurons.
    Raises:
        UserError: other numbers of labels or groups than of texts, one class only, an unknown
            concept, a class with too few texts, an SAE of another model or layer, a prior of other
            classes, no room for the values in the temporary folder (TMPDIR).
    """
    if groups is not None and len(groups) != len(texts):
        raise UserError(f"Expected a group for each of {len(texts)} texts, got {len(groups)}.")
    texts, names = _joined(texts, labels, background)
    concepts = (concept,) if isinstance(concept, str) else tuple(concept)
    classes = _check_classes(names, concepts, config)
    lm = model if isinstance(model, LanguageModel) else load_model(str(model))
    units = open_units(lm, sae, hook_point, kind)
    label = np.array([classes.index(name) for name in names])
    rng = np.random.default_rng(config.seed)
    train = _train_texts(label, config.held_out_frac, rng, groups)
    with read_values(lm, units, texts, train, config.harvest) as (fitted, held_out):
        hist = histogram_of(fitted, label, classes, n_bins=config.n_bins, seed=config.seed)
        found = separation(
            fitted, hist, label, train, concepts, permutations=config.permutations, rng=rng
        )
        index = found.best(config.n_units, config.significance, two_sided=units.two_sided)

        def calibrated(some: Int[np.ndarray, " u"]) -> Calibration | None:
            tables = posterior_tables(_rows(hist, some), config.prior)
            return calibration_of(held_out, tables, some, label, concepts) if len(some) else None

        quality, kept = calibrated(index), np.ones(len(index), dtype=bool)
        if quality is not None:
            kept = quality.loss < quality.prior_loss
            # the temperature is one of the units that stay: each that goes takes evidence away
            gate = quality if kept.all() else calibrated(index[kept])
            quality = replace(gate or quality, loss=quality.loss)
    app = _assemble(units, lm, _rows(hist, index[kept]), index[kept], quality, concepts, config)
    counts = {name: int((label == i).sum()) for i, name in enumerate(classes)}
    return Fit(app, found, quality, int((~kept).sum()), counts)


def _joined(
    texts: Sequence[str], labels: Sequence[str], background: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    if len(texts) != len(labels):
        raise UserError(
            f"Expected one label for each text, got {len(texts)} texts and {len(labels)} labels."
        )
    if background is not None and BACKGROUND in labels:
        raise UserError(f"Expected no label {BACKGROUND!r} beside background texts, got one.")
    more = list(background or ())
    return [*texts, *more], [*map(str, labels), *[BACKGROUND] * len(more)]


def _check_classes(
    names: Sequence[str], concepts: tuple[str, ...], config: FitConfig
) -> tuple[str, ...]:
    classes = tuple(dict.fromkeys(names))
    if len(classes) < 2:
        raise UserError(f"Expected at least two classes, got {', '.join(classes) or 'none'}.")
    concept_mask(classes, concepts)
    check_prior(classes, config.prior)
    for name in classes:
        if (n := names.count(name)) < config.min_texts:
            raise UserError(
                f"Expected at least {config.min_texts} texts of each class, got {n} of {name!r}."
            )
    return classes


def _train_texts(
    label: Int[np.ndarray, " n"],
    held_out_frac: float,
    rng: np.random.Generator,
    groups: Sequence[Hashable] | None,
) -> Bool[np.ndarray, " n"]:
    """Texts that choose and count; of each class the rest is held out, whole groups at once."""
    place: dict[Hashable, int] = {}
    known = [place.setdefault(one, len(place)) for one in groups or ()]
    own = np.arange(len(place), len(place) + len(label) - len(known))  # background, or all texts
    group = np.concatenate([np.array(known, dtype=np.int64), own])
    train = np.ones(len(label), dtype=bool)
    for one in np.unique(label):
        mine = label == one
        wanted = int(held_out_frac * mine.sum()) - int((mine & ~train).sum())
        for drawn in rng.permutation(np.unique(group[mine & train])):
            if wanted <= 0:
                break
            inside = (group == drawn) & train
            wanted -= int((inside & mine).sum())
            train[inside] = False
    return train


def _rows(hist: Histogram, index: Int[np.ndarray, " u"]) -> Histogram:
    return Histogram(
        hist.counts[index], hist.n, hist.edges[index], hist.classes,
        hist.total[index], hist.square[index], hist.has_atom,
    )  # fmt: skip


def _assemble(
    units: Units,
    lm: LanguageModel,
    hist: Histogram,
    index: Int[np.ndarray, " u"],
    quality: Calibration | None,
    concepts: tuple[str, ...],
    config: FitConfig,
) -> App:
    tables = posterior_tables(hist, config.prior)
    inside = concept_mask(tables.classes, concepts)
    temperature = 1.0 if quality is None else quality.temperature
    neutral = np.zeros(len(index), dtype=np.float32)
    if units.two_sided:
        rest = hist.total[:, ~inside].sum(axis=1) / hist.n[~inside].sum()
        neutral = rest.astype(np.float32)
    return App(
        units=units.take(torch.from_numpy(index)).to(lm.device),
        edges=torch.from_numpy(np.ascontiguousarray(tables.edges)).to(lm.device),
        weights=torch.from_numpy(attenuation(tables, concepts, config.mode)).to(lm.device),
        evidence=torch.from_numpy(temperature * log_odds(tables, concepts)).float().to(lm.device),
        neutral=torch.from_numpy(neutral).to(lm.device),
        prior=float(tables.prior[inside].sum()),
        concepts=concepts,
        mode=config.mode,
        gate=config.gate,
        beyond=config.beyond,
        special_ids=tuple(i for i in lm.tokenizer.all_special_ids if i is not None),
    )
