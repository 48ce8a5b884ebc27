"""From texts to SparseFeatures: harvest activations, encode them, pool them to rows."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from scipy import sparse

from sae_core.activations import Activations, HarvestConfig, stream_activations
from sae_core.encoder import SparseEncoder
from sae_core.errors import UserError
from sae_core.features import SparseFeatures
from sae_core.kernels.codes import Codes
from sae_core.metrics import check_width, evaluating
from sae_core.pooling import POOLINGS, RowPooler, pool_tokens
from sae_core.provenance import Provenance, package_versions
from sae_core.text import TextRow

if TYPE_CHECKING:
    from sae_core.models import LanguageModel

__all__ = ["POOLINGS_AND_NONE", "RowPooler", "RowTable", "featurize", "pool_tokens"]

POOLINGS_AND_NONE = (*POOLINGS, "none")


class RowTable:
    """Row ids, texts and labels of the rows that pass through, for the table of the features."""

    def __init__(self) -> None:
        self.row_id: list[int] = []
        self.text: list[str] = []
        self.meta: list[dict[str, Any]] = []

    def record(self, rows: Iterable[TextRow]) -> Iterator[TextRow]:
        """The same rows, each noted as it passes."""
        for row in rows:
            self.row_id.append(row.row_id)
            self.text.append(row.text)
            self.meta.append(row.meta)
            yield row

    def ids(self) -> Int[np.ndarray, " n_rows"]:
        return np.array(self.row_id, dtype=np.int64)

    def table(self, n_tokens: Int[np.ndarray, " n_rows"]) -> pa.Table:
        """Columns row_id, text, n_tokens and one per label; a label that clashes is ``meta.NAME``.

        A label is int64 or float64 or bool where all its values are, else string; absent is null.
        """
        columns = {
            "row_id": pa.array(self.row_id, pa.int64()),
            "text": pa.array(self.text, pa.string()),
            "n_tokens": pa.array(n_tokens, pa.int32()),
        }
        names = dict.fromkeys(name for meta in self.meta for name in meta)
        for name in names:
            values = [meta.get(name) for meta in self.meta]
            columns[f"meta.{name}" if name in columns else name] = _column(values)
        return pa.table(columns)


def _column(values: list[Any]) -> pa.Array:
    """One type for a whole column; NaN is null, because a result holds no NaN."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool}:
        return pa.array(values, pa.bool_() if kinds else pa.string())
    if kinds <= {int}:
        if all(value is None or -(2**63) <= value < 2**63 for value in values):
            return pa.array(values, pa.int64())
    elif kinds <= {int, float}:
        floats = [None if value is None else float(value) for value in values]
        return pa.array(floats, pa.float64(), from_pandas=True)
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def featurize(
    lm: "LanguageModel",
    sae: SparseEncoder,
    rows: Iterable[TextRow],
    hook_point: str,
    *,
    pooling: str = "max",
    config: HarvestConfig | None = None,
    data_id: str,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> SparseFeatures:
    """Sparse features of texts: activations at the hook point, encoded, pooled to rows.

    Every input row is in the table once, in input order, with its text and labels and
    ``n_tokens``, the tokens pooled; a row without a kept token has an empty code and 0. With
    pooling ``none`` every kept token is a row of its own: ``row_id`` is then a running number,
    ``source_row_id`` the row of the text and ``position`` the token's place in that row, sorted
    by the two; text and labels stay with the source.

    Args:
        lm: the language model that the SAE was trained on.
        sae: an SAE, or what else gives sparse codes (``sae_core.monet.routing``).
        rows: the texts; each row_id once.
        hook_point: where the SAE was trained, e.g. ``layers.15.out``.
        pooling: max, mean, sum or last over the kept tokens of a row, see ``pool_tokens``; or none.
        config: which tokens are kept, and the batches; batches make no difference to the result.
            ``max_tokens`` must be None, since it would cut a row in two.
        data_id: where the texts come from, for the provenance.
        seed: seed of the run that made the SAE, for the provenance.
        progress: called with the number of tokens of each finished batch.
    Raises:
        UserError: d_in of the SAE differs from the hook point's, no rows, a row_id twice, an
            unknown pooling, or max_tokens.
    """
    config = config or HarvestConfig()
    check_whole_rows(pooling, config)
    table = RowTable()
    found = encode_rows(lm, sae, table.record(rows), hook_point, pooling, config, progress)
    return features_of(found, table, origin(lm, sae, hook_point, data_id, seed))


def check_whole_rows(pooling: str, config: HarvestConfig) -> None:
    """Raises:
    UserError: an unknown pooling, or max_tokens, which would cut a row in two.
    """
    if pooling not in POOLINGS_AND_NONE:
        raise UserError(f"Expected a pooling of {POOLINGS_AND_NONE}, got {pooling!r}.")
    if config.max_tokens is not None:
        raise UserError(
            f"Features need whole rows: expected max_tokens None, got {config.max_tokens}; "
            "limit the number of rows instead."
        )


def origin(
    lm: "LanguageModel", sae: SparseEncoder, hook_point: str, data_id: str, seed: int
) -> Provenance:
    """Where the features of a text come from."""
    return Provenance(
        model_id=lm.model_id,
        model_revision=lm.revision,
        hook_point=hook_point,
        sae_hash=sae.hash(),
        data_id=data_id,
        seed=str(seed),
        versions=package_versions("sae-apps", "torch", "transformers"),
    )


class EncodedRows(NamedTuple):
    """Codes of rows, or of their tokens, with what says whose they are."""

    acts: sparse.csr_array
    """[n, d_sae] float32; n rows, or n kept tokens."""
    columns: dict[str, np.ndarray]
    """Pooled: n_tokens [n] int32, the rows in their order. Tokens: source_row_id [n] int64 and
    position [n] int32, sorted by the row's place and the position."""


def encode_rows(
    lm: "LanguageModel",
    sae: SparseEncoder,
    rows: Iterable[TextRow],
    hook_point: str,
    pooling: str,
    config: HarvestConfig,
    progress: Callable[[int], None] | None = None,
) -> EncodedRows:
    """Codes of rows in their order; see ``featurize``. A pooled row without a token is empty.

    Raises:
        UserError: d_in of the SAE differs from the hook point's, or a row_id twice.
    """
    row_id: list[int] = []
    tokens = _encoded(lm, sae, _noted(rows, row_id), hook_point, config, progress)
    if pooling == "none":
        return _tokens_in_order(tokens, row_id, sae.d_sae)
    pooler = RowPooler(sae.d_sae, pooling)
    for codes, batch in tokens:
        pooler.update(codes, batch.row_id, batch.position)
    acts, n_tokens = pooler.compute(np.array(row_id, dtype=np.int64))
    return EncodedRows(acts, {"n_tokens": n_tokens})


def features_of(found: EncodedRows, table: RowTable, provenance: Provenance) -> SparseFeatures:
    """Encoded rows with their table: that of the rows, or that of the tokens.

    Raises:
        UserError: no row, or no token where tokens are the rows.
    """
    if not table.row_id:
        raise UserError("Expected at least one row of text, got none.")
    n = len(next(iter(found.columns.values())))
    if not n:
        raise UserError(
            f"Expected at least one token to keep, got none in {len(table.row_id)} rows."
        )
    if "n_tokens" in found.columns:
        rows = table.table(found.columns["n_tokens"])
    else:
        rows = pa.table({"row_id": np.arange(n, dtype=np.int64), **found.columns})
    return SparseFeatures(found.acts, rows, provenance)


def _noted(rows: Iterable[TextRow], row_id: list[int]) -> Iterator[TextRow]:
    for row in rows:
        row_id.append(row.row_id)
        yield row


def _encoded(
    lm: "LanguageModel",
    sae: SparseEncoder,
    rows: Iterable[TextRow],
    hook_point: str,
    config: HarvestConfig,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[Codes, Activations]]:
    for found in stream_activations(lm, rows, [hook_point], config):
        batch = found[hook_point]
        check_width(sae, batch.d_in, hook_point, lm.model_id)
        with evaluating(sae):
            codes = sae.encode_sparse(batch.x.to(sae.device, sae.dtype))
        yield codes, batch
        if progress is not None:
            progress(len(batch))


def _tokens_in_order(
    tokens: Iterable[tuple[Codes, Activations]], row_ids: list[int], d_sae: int
) -> EncodedRows:
    parts = [sparse.csr_array((0, d_sae), dtype=np.float32)]
    source, position = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int32)]
    for codes, batch in tokens:
        parts.append(codes.to_scipy())
        source.append(batch.row_id.cpu().numpy())
        position.append(batch.position.cpu().numpy())
    row_id, place = np.concatenate(source), np.concatenate(position)
    ids = np.array(row_ids, dtype=np.int64)
    by_id = np.argsort(ids, kind="stable")
    order = np.lexsort((place, by_id[np.searchsorted(ids, row_id, sorter=by_id)]))
    acts = sparse.csr_array(sparse.vstack(parts, format="csr"))[order]
    acts.eliminate_zeros()
    return EncodedRows(acts, {"source_row_id": row_id[order], "position": place[order]})
