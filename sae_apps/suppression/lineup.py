"""The rivals that a method of suppression is compared with, all fitted on the same tokens.

    {mask, range, AurA, direction, LEACE, random} x {units}  +  {direction, LEACE, instruction}

Each token of a text bears the text's label; special tokens and the first of a text are left out,
as in ``suppress``. Formulas and sources in ``rivals`` and ``rival_fits``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse

from sae_apps.suppression.probes import check_labels
from sae_apps.suppression.rival_fits import (
    Values,
    choose_units,
    fit_aura,
    fit_direction,
    fit_leace,
    fit_mask,
    fit_range,
    moments,
    random_units,
)
from sae_apps.suppression.rivals import PromptEdit
from sae_apps.suppression.units import Units
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.errors import UserError
from sae_core.kernels.codes import Codes
from sae_core.models import LanguageModel
from sae_core.text import TextRow

_ROWS = 4096  # tokens encoded at once


@dataclass(frozen=True, eq=False)
class TokenSample:
    """Activations of labelled tokens at one hook point."""

    hook_point: str
    """Where they were read."""
    x: Float[np.ndarray, "n d"]
    """[n, d] float32."""
    is_concept: Bool[np.ndarray, " n"]
    """Label of the token's text."""

    def __post_init__(self) -> None:
        check_labels(self.x, self.is_concept)


def token_sample(
    lm: LanguageModel,
    hook_point: str,
    texts: Sequence[str],
    is_concept: Bool[np.ndarray, " m"],
    *,
    context_size: int = 128,
    batch_tokens: int = 2048,
) -> TokenSample:
    """Read the tokens of labelled texts; memory grows with the tokens.

    Raises:
        UserError: one class only, labels of another length, or an unknown hook point.
    """
    check_labels(np.empty(len(texts)), is_concept)
    x, text = _tokens(lm, hook_point, texts, context_size, batch_tokens)
    return TokenSample(hook_point, x, is_concept[text])


def background_tokens(
    lm: LanguageModel,
    hook_point: str,
    texts: Sequence[str],
    *,
    context_size: int = 128,
    batch_tokens: int = 2048,
) -> Float[np.ndarray, "n d"]:
    """Tokens of running text without a label, read as ``token_sample`` reads; none for no text."""
    if not texts:
        return np.empty((0, lm.d_model), dtype=np.float32)
    return _tokens(lm, hook_point, texts, context_size, batch_tokens)[0]


def _tokens(
    lm: LanguageModel, hook_point: str, texts: Sequence[str], context_size: int, batch_tokens: int
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """Activations [n, d] and the text of each."""
    rows = [TextRow(place, text, {}) for place, text in enumerate(texts)]
    config = HarvestConfig(context_size=context_size, batch_tokens=max(batch_tokens, context_size))
    x, row = [], []
    for found in stream_activations(lm, rows, [hook_point], config):
        x.append(found[hook_point].x.float().cpu().numpy())
        row.append(found[hook_point].row_id.numpy())
    return np.concatenate(x), np.concatenate(row)


def sample_values(units: Units, sample: TokenSample) -> Values:
    """Values of all units on a sample: CSR for latents, else dense.

    Raises:
        UserError: a sample of another hook point.
    """
    if units.hook_point != sample.hook_point:
        raise UserError(f"Expected a sample of {units.hook_point}, got one of {sample.hook_point}.")
    parts = []
    for first in range(0, len(sample.x), _ROWS):
        found = units.values(torch.from_numpy(sample.x[first : first + _ROWS]))
        parts.append(found.to_scipy() if isinstance(found, Codes) else found.numpy())
    if sparse.issparse(parts[0]):
        return sparse.csr_array(sparse.vstack(parts, format="csr"))
    return np.concatenate(parts)


def fit_rivals(
    units: Units,
    sample: TokenSample,
    *,
    n_units: int,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The rivals that edit units of one kind, by name.

    ``mask`` and ``range`` take the units of the largest mean |a| as NeuronLens does, ``mask_d`` and
    ``range_d`` those of the largest d' (``range_d`` with the range of the positive values);
    ``aura`` damps all units; ``direction``, ``direction_rest`` (which keeps what the rest has of
    it) and ``leace`` act within the units of the largest d', or for residual dimensions on all of
    them; ``random`` is the control of ``mask_d``. ``leace`` is absent where the package
    ``concept-erasure`` is, and ``random`` where fewer than n_units other units are ever active,
    unless asked for by name.

    Args:
        units: all units of a place.
        sample: tokens of the same place.
        n_units: how many units are edited.
        seed: of the random units.
        names: some of them; None: all.
    Raises:
        UserError: unknown name, or fewer units than asked for.
    """
    values, label = sample_values(units, sample), sample.is_concept
    stats = moments(values, label)
    two_sided = units.two_sided
    loud = choose_units(stats, n_units, "mean_abs")
    apart = choose_units(stats, n_units, "d_prime", two_sided=two_sided)
    whole = units.kind == "residual"
    inside: dict[str, Any] = {} if whole else {"units": units, "chosen": apart}
    live = np.asarray(stats.mean_abs.sum(axis=0) > 0)
    live[apart] = False
    point = units.hook_point
    masked = fit_mask(units, stats, apart)
    every: dict[str, Callable[[], Any]] = {
        "mask": lambda: fit_mask(units, stats, loud),
        "mask_d": lambda: masked,
        "range": lambda: fit_range(units, stats, loud),
        "range_d": lambda: fit_range(units, stats, apart, positives=not two_sided),
        "aura": lambda: fit_aura(units, values, label),
        "direction": lambda: fit_direction(point, values, label, **inside),
        "direction_rest": lambda: fit_direction(point, values, label, center="rest", **inside),
        "leace": lambda: fit_leace(point, values, label, **inside),
        "random": lambda: random_units(masked, units, live, n_units, seed),
    }
    unknown = set(names or ()) - set(every)
    if unknown:
        raise UserError(f"Expected names out of {', '.join(every)}, got {min(unknown)!r}.")
    if names is None:
        has = {
            "leace": find_spec("concept_erasure") is not None,
            "random": int(live.sum()) >= n_units,
        }
        names = [name for name in every if has.get(name, True)]
    return {name: every[name]() for name in names}


def instruction(concept: str) -> PromptEdit:
    """A plain request for the absence of a concept, before the text."""
    return PromptEdit(f"The following text is free of anything {concept}.\n")
