"""Rows of instructions to sparse codes: the mean over a row's tokens of what the SAE reads there.

    z_s = (1 / T) sum_t SAE(h_t)        t over the T tokens of the row that count

MONA (arXiv 2503.15573, equations 6 and 7) takes every token. Here the template's tokens, special
tokens and the first token, an attention sink, are left out unless ``special`` is set: every row
shares them, so they raise every similarity and tell no two rows apart.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from scipy import sparse

from sae_apps.selection.encoder import EmbedConfig, Encoder, load_encoder
from sae_apps.selection.instructions import InstructionRow
from sae_apps.selection.spans import Tokens, tokenise
from sae_core.activations import Activations
from sae_core.errors import UserError
from sae_core.features import SparseFeatures
from sae_core.kernels.codes import Codes
from sae_core.metrics import check_width, evaluate, evaluating
from sae_core.pooling import RowPooler
from sae_core.provenance import Provenance, package_versions
from sae_core.sae import SAE
from sae_core.text import windows
from sae_core.tokenised import TokenisedRow, stream_kept

__all__ = [
    "EmbedConfig",
    "Encoder",
    "check_fit",
    "encode",
    "load_encoder",
    "measure_fvu",
    "stream_codes",
]


def encode(
    encoder: Encoder,
    rows: Iterable[InstructionRow],
    *,
    data_id: str = "rows",
    progress: Callable[[int], None] | None = None,
) -> SparseFeatures:
    """The codes of rows, in their order.

    Batches, padding and the order of the rows change a code by rounding alone.

    Args:
        rows: each row_id once; a row without text has an empty code.
        data_id: where the rows come from, for the provenance.
        progress: called with the number of rows of each finished window.
    Returns:
        Features whose row table has ``row_id``, ``n_tokens`` (tokens pooled), ``length`` (tokens
        of the whole rendered row, 0 without text) and ``group`` (string, may be null).
    Raises:
        UserError: no rows, a row_id twice, an SAE of another width, a tokenizer without offsets.
    """
    parts, n_tokens, lengths = [], [], []
    row_id: list[int] = []
    group: list[str | None] = []
    for window in windows(rows, encoder.config.window_rows):
        tokens = tokenise(encoder.lm.tokenizer, window, encoder.config, encoder.context)
        acts, counted = _pool(encoder, tokens)
        parts.append(acts)
        n_tokens.append(counted)
        lengths += [one.length for one in tokens]
        row_id += [row.row_id for row in window]
        group += [row.group for row in window]
        if progress is not None:
            progress(len(window))
    if not parts:
        raise UserError(f"Expected at least one row, got none from {data_id}.")
    table = pa.table(
        {
            "row_id": pa.array(row_id, pa.int64()),
            "n_tokens": pa.array(np.concatenate(n_tokens), pa.int32()),
            "length": pa.array(lengths, pa.int32()),
            "group": pa.array(group, pa.string()),
        }
    )
    acts = sparse.csr_array(sparse.vstack(parts, format="csr"))
    return SparseFeatures(acts, table, _provenance(encoder, data_id))


def measure_fvu(encoder: Encoder, rows: Iterable[InstructionRow]) -> float | None:
    """FVU of the SAE on the rows' own tokens; None where fewer than two tokens count, and for
    experts, which reconstruct nothing.

    Special and first tokens stay out whatever the configuration says: SAEs are not trained on them.

    Raises:
        UserError: activations of another width, or that do not vary.
    """
    sae = encoder.sae
    if not isinstance(sae, SAE):
        return None
    config = replace(encoder.config, span="all", special=False)
    encoder = replace(encoder, config=config)
    found: list[Activations] = []
    for window in windows(rows, config.window_rows):
        tokens = tokenise(encoder.lm.tokenizer, window, config, encoder.context)
        found += stream_tokens(encoder, tokens)
    if sum(len(batch) for batch in found) < 2:
        return None
    return evaluate(sae, found).fvu


def check_fit(encoder: Encoder, rows: Iterable[InstructionRow]) -> float | None:
    """FVU of the SAE on rows, refused above 1; None where they have fewer than two tokens.

    Raises:
        UserError: the FVU is above 1.
    """
    fvu = measure_fvu(encoder, rows)
    if fvu is not None and fvu > 1:
        raise UserError(
            f"Expected an SAE trained on {encoder.hook_point} of {encoder.lm.model_id}, with an "
            f"FVU below 1 on the pool's text, got {fvu:.3f}: it reconstructs worse than the mean."
        )
    return fvu


def stream_codes(encoder: Encoder, tokens: list[Tokens]) -> Iterator[tuple[Codes, Activations]]:
    """Codes of the tokens that count, with the activations (and places) they come from."""
    sae = encoder.sae
    for batch in stream_tokens(encoder, tokens):
        with evaluating(sae):
            yield sae.encode_sparse(batch.x.to(sae.device, sae.dtype)), batch


def stream_tokens(encoder: Encoder, tokens: list[Tokens]) -> Iterator[Activations]:
    """Activations of the tokens that count; their ``row_id`` is the place in ``tokens``."""
    rows = [TokenisedRow(one.ids, one.keep) for one in tokens]
    for found in stream_kept(
        encoder.lm,
        rows,
        [encoder.hook_point],
        context_size=encoder.context,
        batch_tokens=encoder.config.batch_tokens,
        window_rows=encoder.config.window_rows,
    ):
        batch = found[encoder.hook_point]
        check_width(encoder.sae, batch.d_in, encoder.hook_point, encoder.lm.model_id)
        yield batch


def _pool(
    encoder: Encoder, tokens: list[Tokens]
) -> tuple[sparse.csr_array, Int[np.ndarray, " n_rows"]]:
    pooler = RowPooler(encoder.sae.d_sae, encoder.config.pooling)
    for codes, batch in stream_codes(encoder, tokens):
        pooler.update(codes, batch.row_id, batch.position)
    return pooler.compute(np.arange(len(tokens)))


def _provenance(encoder: Encoder, data_id: str) -> Provenance:
    c = encoder.config
    special = "with" if c.special else "without"
    return Provenance(
        model_id=encoder.lm.model_id,
        model_revision=encoder.lm.revision,
        hook_point=encoder.hook_point,
        sae_hash=encoder.sae.hash(),
        data_id=f"{data_id}[{c.pooling} of {c.span}, {c.form}, {special} special, {c.max_len}]",
        seed="none",
        versions=package_versions("sae-apps", "torch", "transformers"),
    )
