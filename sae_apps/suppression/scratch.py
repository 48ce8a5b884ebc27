"""Values of units on disk, between the one pass of the model and the passes that count them.

Bins must be known before anything is counted, and the units before the calibration, so a fit goes
over its tokens several times. A pass of the model costs far more than a pass of the disk, and the
values are not small: 8 bytes each, 0.5 kB a token at 64 active latents. So they are written once
and read back block by block. Memory is a few blocks, however many the texts.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np
import torch
from jaxtyping import Bool

from sae_apps.suppression.bins import entries
from sae_apps.suppression.tokens import TokenValues
from sae_apps.suppression.units import Units
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.disk import disk_errors
from sae_core.errors import UserError
from sae_core.metrics import evaluate
from sae_core.models import LanguageModel
from sae_core.sae import SAE
from sae_core.text import rows_from_texts

_CHECKED = 256  # tokens on which the SAE must reconstruct better than the mean of the tokens
_VALUES, _TOKENS = 1 << 20, 1 << 14  # of a block: 8 MB on disk, about 100 MB while it is counted


class TokenFile:
    """Blocks of token values in a file of the temporary folder (TMPDIR).

    The file has no name: whatever ends the process, nothing is left behind. It is iterated as often
    as one likes; one pass at a time.
    """

    def __init__(self, n_units: int, has_atom: bool) -> None:
        self._n_units, self._has_atom = n_units, has_atom
        self._place = tempfile.gettempdir()
        with disk_errors(self._place):
            self._file = tempfile.TemporaryFile(prefix="sae-apps-fit-")  # noqa: SIM115 - closed below
        self._sizes: list[tuple[int, int]] = []
        self._waiting: list[TokenValues] = []
        self._n_values = self._n_tokens = 0

    def append(self, values: TokenValues) -> None:
        """Add tokens; values that do not fill a block wait in memory.

        Raises:
            UserError: the disk is full.
        """
        self._waiting.append(values)
        self._n_values += len(values.value)
        self._n_tokens += len(values.text)
        if self._n_values >= _VALUES or self._n_tokens >= _TOKENS:
            self._write()

    def _write(self) -> None:
        parts, self._waiting, self._n_values, self._n_tokens = self._waiting, [], 0, 0
        per_token = [np.bincount(one.token, minlength=len(one.text)) for one in parts]
        columns = [
            np.concatenate(per_token).astype(np.int32),
            np.concatenate([one.text for one in parts]).astype(np.int64),
            np.concatenate([one.unit for one in parts]).astype(np.int32),
            np.concatenate([one.value for one in parts]).astype(np.float32),
        ]
        with disk_errors(self._place):
            self._file.seek(0, 2)
            for column in columns:
                self._file.write(column.data)
            self._file.flush()
        self._sizes.append((len(columns[0]), len(columns[2])))

    def __iter__(self) -> Iterator[TokenValues]:
        if self._waiting:
            self._write()
        at = 0
        for n, nnz in self._sizes:
            self._file.seek(at)
            counts, text, unit, value = (
                np.frombuffer(self._file.read(m * np.dtype(kind).itemsize), kind)
                for m, kind in ((n, "i4"), (n, "i8"), (nnz, "i4"), (nnz, "f4"))
            )
            at = self._file.tell()
            token = np.repeat(np.arange(n), counts)
            yield TokenValues(token, unit, value.copy(), text, self._n_units, self._has_atom)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()


@contextmanager
def read_values(
    lm: LanguageModel,
    units: Units,
    texts: Sequence[str],
    train: Bool[np.ndarray, " n_texts"],
    config: HarvestConfig,
) -> Iterator[tuple[TokenFile, TokenFile]]:
    """Run the texts through the model once; what the units say of the train texts and the others.

    The files are gone when the block ends.

    Raises:
        UserError: no tokens; an SAE that reconstructs worse than the mean, as one of another layer;
            a full disk.
    """
    atom = not units.two_sided
    with (
        closing(TokenFile(units.n_units, atom)) as fitted,
        closing(TokenFile(units.n_units, atom)) as held_out,
    ):
        n, rows = 0, rows_from_texts(list(texts))
        for found in stream_activations(lm, rows, [units.hook_point], config):
            batch = found[units.hook_point]
            if n == 0 and units.sae is not None and len(batch) >= 2:
                _check_fit(units, batch.x[:_CHECKED], lm.model_id)
            with torch.no_grad():
                one = entries(units.values(batch.x), atom)
            text = batch.row_id.numpy()
            values = TokenValues(one.row, one.unit, one.value, text, units.n_units, atom)
            for file, keep in ((fitted, train[text]), (held_out, ~train[text])):
                if keep.any():
                    file.append(values.select(keep))
            n += len(batch)
        if not n:
            raise UserError(f"Expected at least one token to keep, got none in {len(texts)} texts.")
        yield fitted, held_out


def _check_fit(units: Units, x: torch.Tensor, model_id: str) -> None:
    if not isinstance(units.sae, SAE):
        raise UserError("Expected an SAE, got experts of a Monet: they have nothing to write to.")
    fvu = evaluate(units.sae, [x.to(units.sae.device)]).fvu
    if fvu > 1:
        raise UserError(
            f"Expected an SAE trained on {units.hook_point} of {model_id}, with an FVU below 1 on "
            f"the texts, got {fvu:.3f}: it reconstructs worse than the mean."
        )
