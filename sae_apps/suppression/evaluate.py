"""How much of a concept an edit removes, and what it costs: whole curves over strengths.

    erased(s) = (A(0) - A(s)) / (A(0) - 1/2),    A: balanced accuracy of a probe on pooled texts
    gap(s)    = nll a token of concept texts - nll a token of their neutral rewrites
    damage    : perplexity and KL on neutral text, accuracy lost by probes of other concepts

A by a fixed probe (fitted on the plain model) and by one refitted at every strength. Intervals
resample documents: test texts by their document for removal, neutral texts for damage. Probes are
not refitted within the resamples, so that intervals are those of the test set alone; the spread
over seeds of the split shows the rest. Protocol: as NeuronLens, at the matched erasure
of GeoAE; the likelihood gap and the refitted probe are additions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_apps.suppression.curves import Curve, check_strengths, resample
from sae_apps.suppression.likelihood import Reading, pool_texts, read_texts
from sae_apps.suppression.plain_texts import PlainTexts, ReadConfig, read_plain
from sae_apps.suppression.probes import CHANCE, Probe, fit_probe
from sae_apps.suppression.rivals import at_strength
from sae_apps.suppression.trial import Labelled, Trial
from sae_core.errors import UserError
from sae_core.models import LanguageModel

_LEAST = 0.02  # a probe must beat chance by this much before "erased" means anything


@dataclass(frozen=True)
class EvaluationConfig:
    """How a trial is run."""

    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0)
    """Ascending from 0."""
    read_at: str | None = None
    """Hook point of the probes; None: that of the edit (of a prompt: must be given)."""
    n_draws: int = 1000
    """Resamples of the documents."""
    seed: int = 0
    """Of the resamples."""
    penalty: float = 0.05
    """Of the probes."""
    read: ReadConfig = ReadConfig()
    """Lengths and batches."""

    def __post_init__(self) -> None:
        check_strengths(np.asarray(self.strengths, dtype=np.float64))
        if self.n_draws < 1:
            raise UserError(f"Expected at least 1 resample, got {self.n_draws}.")


Both = tuple[Float[np.ndarray, " s"], Float[np.ndarray, "b s"]]  # on all documents, on resamples


class Reader:
    """Reads a trial's texts at one place; what the plain model makes of them is kept."""

    def __init__(self, lm: LanguageModel, read_at: str, config: ReadConfig | None = None) -> None:
        self.lm, self.read_at, self.config = lm, read_at, config or ReadConfig()
        self._plain: dict[tuple[str, ...], PlainTexts] = {}

    def plain(self, texts: Sequence[str]) -> PlainTexts:
        """The plain model's states, from the second time on without a pass."""
        key = tuple(texts)
        if key not in self._plain:
            self._plain[key] = read_plain(self.lm, texts, self.read_at, self.config)
        return self._plain[key]

    def pool(
        self, texts: Sequence[str], edits: Sequence[Any]
    ) -> list[Float[np.ndarray, "n d"]]:
        """Mean activations of the texts: plain, then under each edit."""
        return pool_texts(self.lm, self.plain(texts), edits)

    def read(self, texts: Sequence[str], edits: Sequence[Any]) -> list[Reading]:
        """Likelihoods as well."""
        return read_texts(self.lm, self.plain(texts), edits, self.read_at)


def erasure(
    reader: Reader, edit: Any, trial: Trial, strengths: Sequence[float], penalty: float = 0.05
) -> Float[np.ndarray, " s"]:
    """``erased_fixed`` at each strength: one pass over the texts, whatever the strengths.

    Raises:
        UserError: a concept that no probe of the plain model tells apart.
    """
    edits = [at_strength(edit, s) for s in strengths]
    train, test = reader.pool(trial.train.texts, []), reader.pool(trial.test.texts, edits)
    right = _right(train, test, trial.train, trial.test, penalty, False)
    label = trial.test.is_concept
    return _erased(_accuracies(right, label, np.ones((1, len(label)), dtype=np.int64))[0])[1:]


def evaluate(
    lm: LanguageModel,
    edit: Any,
    trial: Trial,
    config: EvaluationConfig,
    *,
    method: str,
    reader: Reader | None = None,
) -> Curve:
    """The curve of one edit.

    Args:
        edit: any edit with ``hook_point``, ``strength`` and ``apply``, or a ``PromptEdit``.
        trial: the texts.
        method: its name in the tables.
        reader: of this model, which has read the texts for another edit; in place of
            ``config.read`` and ``config.read_at``.
    Returns:
        Columns: ``accuracy_fixed``, ``erased_fixed``, ``accuracy_refitted``, ``erased_refitted``,
        ``perplexity``, ``perplexity_increase``, ``kl`` [nats a token]; with pairs ``gap`` and
        ``gap_change`` [nats a token]; for other concepts ``other_NAME`` (balanced accuracy) and
        ``others_lost``, the mean loss of accuracy.
    Raises:
        UserError: a prompt without ``read_at``; or a concept that no probe of the plain model
            tells apart.
    """
    read_at = config.read_at or getattr(edit, "hook_point", None)
    if read_at is None:
        raise UserError("Expected read_at for an instruction, which has no hook point, got None.")
    reader = reader or Reader(lm, read_at, config.read)
    if reader.read_at != read_at:
        raise UserError(f"Expected a reader of {read_at}, got one of {reader.read_at}.")
    strengths = np.asarray(config.strengths, dtype=np.float64)
    edits = [at_strength(edit, s) for s in strengths[1:]]
    rng = np.random.default_rng(config.seed)
    columns: dict[str, np.ndarray] = {}
    draws: dict[str, np.ndarray] = {}

    def add(name: str, both: tuple[np.ndarray, np.ndarray]) -> None:
        columns[name], draws[name] = both

    weight = resample(trial.test.group, config.n_draws, rng)
    weight = _with_both_classes(weight, trial.test.is_concept)
    train, test = (reader.pool(part.texts, edits) for part in (trial.train, trial.test))
    for kind in ("fixed", "refitted"):
        right = _right(train, test, trial.train, trial.test, config.penalty, kind == "refitted")
        accuracy = _accuracies(right, trial.test.is_concept, weight)
        add(f"accuracy_{kind}", accuracy)
        add(f"erased_{kind}", (_erased(accuracy[0]), _erased(accuracy[1], accuracy[0])))
    neutral = reader.read(trial.neutral, edits)
    again = resample(np.arange(len(trial.neutral)), config.n_draws, rng)
    for name, both in _damage(neutral, again).items():
        add(name, both)
    if len(trial.pairs):
        gap = _gap(reader, edits, trial, weight)
        add("gap", gap)
        add("gap_change", (gap[0] - gap[0][0], gap[1] - gap[1][:, :1]))
    for name, both in _others(reader, edits, trial, config, rng).items():
        add(name, both)
    how = {
        "read_at": reader.read_at,
        "n_train": len(trial.train.texts), "n_test": len(trial.test.texts),
        "n_neutral": len(trial.neutral), "n_pairs": len(trial.pairs), "seed": config.seed,
        "n_draws": config.n_draws, "penalty": config.penalty,
        "context_size": reader.config.context_size,
    }  # fmt: skip
    return Curve(method, trial.concept, strengths, columns, draws, how)


def _others(
    reader: Reader,
    edits: Sequence[Any],
    trial: Trial,
    config: EvaluationConfig,
    rng: np.random.Generator,
) -> dict[str, Both]:
    """Accuracy of fixed probes of the other concepts, and its mean loss."""
    found: dict[str, Both] = {}
    lost: list[Both] = []
    for name, (train, test) in trial.others.items():
        plain, pooled = reader.pool(train.texts, []), reader.pool(test.texts, edits)
        right = _right(plain, pooled, train, test, config.penalty, False)
        weight = resample(test.group, config.n_draws, rng)
        point, many = _accuracies(
            right, test.is_concept, _with_both_classes(weight, test.is_concept)
        )
        found[f"other_{name}"] = point, many
        lost.append((point[0] - point, many[:, :1] - many))
    if lost:
        n = min(len(many) for _, many in lost)  # resamples without a class were left out
        mean = np.mean([point for point, _ in lost], axis=0)
        found["others_lost"] = mean, np.mean([many[:n] for _, many in lost], axis=0)
    return found


def _right(
    train: Sequence[Float[np.ndarray, "m d"]],
    test: Sequence[Float[np.ndarray, "n d"]],
    train_labels: Labelled,
    test_labels: Labelled,
    penalty: float,
    refit: bool,
) -> Bool[np.ndarray, "s n"]:
    """Whether the probe is right about each test text, at each strength."""
    fixed = fit_probe(train[0], train_labels.is_concept, penalty=penalty)
    found = []
    for place, pooled in enumerate(test):
        probe: Probe = fixed
        if refit and place:
            probe = fit_probe(train[place], train_labels.is_concept, penalty=penalty)
        found.append(probe.is_right(pooled, test_labels.is_concept))
    return np.stack(found)


def _accuracies(
    right: Bool[np.ndarray, "s n"], label: Bool[np.ndarray, " n"], weight: Int[np.ndarray, "b n"]
) -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, "b s"]]:
    """Balanced accuracy at each strength, and on each resample."""

    def share(times: np.ndarray) -> np.ndarray:
        parts = []
        for one in (label, ~label):
            inside = times[:, one].astype(np.float64)
            parts.append(inside @ right[:, one].T / inside.sum(axis=1, keepdims=True))
        return (parts[0] + parts[1]) / 2

    return share(np.ones((1, len(label))))[0], share(weight)


def _with_both_classes(
    weight: Int[np.ndarray, "b n"], label: Bool[np.ndarray, " n"]
) -> Int[np.ndarray, "b n"]:
    """The resamples that drew texts of both classes: without one no accuracy is defined."""
    kept = weight[(weight[:, label].sum(axis=1) > 0) & (weight[:, ~label].sum(axis=1) > 0)]
    if not len(kept):
        raise UserError("Expected documents of both classes in some resample, got none.")
    return kept


def _erased(accuracy: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
    """(A(0) - A(s)) / (A(0) - 1/2); resamples share the denominator of the whole set."""
    above = float((accuracy if reference is None else reference)[0]) - CHANCE
    if above < _LEAST:
        raise UserError(
            f"Expected a probe of the plain model that is right on more than {CHANCE + _LEAST:.0%} "
            f"of the texts, got {CHANCE + above:.1%}: nothing can be erased."
        )
    return (accuracy[..., :1] - accuracy) / above


def _damage(
    readings: Sequence[Reading], weight: Int[np.ndarray, "b n"]
) -> dict[str, tuple[Float[np.ndarray, " s"], Float[np.ndarray, "b s"]]]:
    """Perplexity, its increase, and KL a token."""
    tokens = readings[0].n_tokens.astype(np.float64)
    nll = np.stack([one.nll for one in readings], axis=1)
    kl = np.stack([one.kl for one in readings], axis=1)
    every = np.ones((1, len(tokens)))
    found = {}
    for name, values in (("perplexity", nll), ("kl", kl)):
        point, many = (w @ values / (w @ tokens)[:, None] for w in (every, weight))
        if name == "perplexity":
            point, many = np.exp(point), np.exp(many)
            found["perplexity_increase"] = (point[0] - point[0, 0], many - many[:, :1])
        found[name] = (point[0], many)
    return found


def _gap(
    reader: Reader, edits: Sequence[Any], trial: Trial, weight: Int[np.ndarray, "b n"]
) -> Both:
    """nll a token of concept texts minus that of their rewrites, each a ratio of sums."""
    sides = []
    # a pair counts as often as its concept text was drawn, both sides alike
    times = weight[:, trial.pairs[:, 0]].astype(np.float64)
    every = np.ones((1, len(trial.pairs)))
    for side in (0, 1):
        texts = [trial.test.texts[int(i)] for i in trial.pairs[:, side]]
        readings = reader.read(texts, edits)
        tokens = readings[0].n_tokens.astype(np.float64)
        nll = np.stack([one.nll for one in readings], axis=1)
        sides.append([t @ nll / np.maximum(t @ tokens, 1.0)[:, None] for t in (every, times)])
    return (sides[0][0] - sides[1][0])[0], sides[0][1] - sides[1][1]
