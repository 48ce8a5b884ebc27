"""Values of all units on labelled texts, in one pass through the model.

Values that are zero are not kept. The permutation test of ``choice`` needs them again for every
unit, so they stay in memory: 12 bytes for each non-zero value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sae_apps.suppression.bins import bin_of, entries
from sae_apps.suppression.histogram import EdgeSketch, Histogram, HurdleCounts
from sae_apps.suppression.units import Units
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.errors import UserError
from sae_core.kernels.codes import Codes, row_starts
from sae_core.metrics import evaluate
from sae_core.models import LanguageModel
from sae_core.sae import SAE
from sae_core.text import rows_from_texts

_CHECKED = 256  # tokens on which the SAE must reconstruct better than the mean of the tokens


@dataclass(frozen=True, eq=False)
class TokenValues:
    """Non-zero values of every unit on every kept token of n_texts texts."""

    token: Int[np.ndarray, " nnz"]
    """Number of the token, ascending."""
    unit: Int[np.ndarray, " nnz"]
    """Number of the unit."""
    value: Float[np.ndarray, " nnz"]
    """float32."""
    text: Int[np.ndarray, " n"]
    """Text of each token."""
    n_texts: int
    """Number of texts."""
    n_units: int
    """Number of units."""
    has_atom: bool
    """Whether the units are one-sided."""

    def of_texts(self, keep: Bool[np.ndarray, " n_texts"]) -> "TokenValues":
        """Only the tokens of some texts, numbered anew; the numbers of the texts stay."""
        inside = keep[self.text]
        number = np.cumsum(inside) - 1
        mine = inside[self.token]
        return TokenValues(
            number[self.token[mine]],
            self.unit[mine],
            self.value[mine],
            self.text[inside],
            self.n_texts,
            self.n_units,
            self.has_atom,
        )

    def of_units(self, index: Int[np.ndarray, " u"]) -> Float[np.ndarray, "n u"]:
        """Dense values of chosen units."""
        place = np.full(self.n_units, -1)
        place[index] = np.arange(len(index))
        mine = place[self.unit] >= 0
        dense = np.zeros((len(self.text), len(index)), dtype=np.float32)
        dense[self.token[mine], place[self.unit[mine]]] = self.value[mine]
        return dense

    def bins(self, edges: Float[np.ndarray, "u B_minus_1"]) -> Int[np.ndarray, " nnz"]:
        """Bin of each value."""
        return bin_of(self.value, self.unit, edges, self.has_atom)


def read_values(
    lm: LanguageModel, units: Units, texts: Sequence[str], config: HarvestConfig
) -> TokenValues:
    """Run the texts through the model once and keep what the units say.

    Raises:
        UserError: no tokens; an SAE that reconstructs worse than the mean, as one of another layer.
    """
    token, unit, value, text, n = [], [], [], [], 0
    for found in stream_activations(lm, rows_from_texts(list(texts)), [units.hook_point], config):
        batch = found[units.hook_point]
        if n == 0 and units.sae is not None and len(batch) >= 2:
            _check_fit(units, batch.x[:_CHECKED], lm.model_id)
        with torch.no_grad():
            one = entries(units.values(batch.x), not units.two_sided)
        token.append((one.row + n).astype(np.int32))
        unit.append(one.unit.astype(np.int32))
        value.append(one.value)
        text.append(batch.row_id.numpy())
        n += len(batch)
    if not n:
        raise UserError(f"Expected at least one token to keep, got none in {len(texts)} texts.")
    at, unit_of, number, of_text = (np.concatenate(part) for part in (token, unit, value, text))
    atom = not units.two_sided
    return TokenValues(at, unit_of, number, of_text, len(texts), units.n_units, atom)


def _check_fit(units: Units, x: torch.Tensor, model_id: str) -> None:
    if not isinstance(units.sae, SAE):
        raise UserError("Expected an SAE, got experts of a Monet: they have nothing to write to.")
    fvu = evaluate(units.sae, [x.to(units.sae.device)]).fvu
    if fvu > 1:
        raise UserError(
            f"Expected an SAE trained on {units.hook_point} of {model_id}, with an FVU below 1 on "
            f"the texts, got {fvu:.3f}: it reconstructs worse than the mean."
        )


def histogram_of(
    values: TokenValues,
    labels: Int[np.ndarray, " n_texts"],
    classes: Sequence[str],
    *,
    n_bins: int,
    seed: int,
) -> Histogram:
    """Hurdle histogram of all units over tokens that inherit the label of their text."""
    batch = _as_values(values)
    sketch = EdgeSketch(values.n_units, n_bins, seed, has_atom=values.has_atom)
    sketch.update(batch)
    counts = HurdleCounts(sketch.compute(), classes, values.has_atom)
    counts.update(batch, labels[values.text])
    return counts.compute()


def _as_values(values: TokenValues) -> Codes | np.ndarray:
    if not values.has_atom:
        return values.of_units(np.arange(values.n_units))
    row = torch.from_numpy(values.token.astype(np.int64))
    col = torch.from_numpy(values.unit.astype(np.int64))
    crow = row_starts(row, len(values.text))
    return Codes(crow, row, col, torch.from_numpy(values.value), values.n_units)
