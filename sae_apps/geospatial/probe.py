"""What a model and an SAE make of places: one sparse code, or one activation, per place.

    z_s = pool_{t in tokens(s)} SAE(h_t)        or, as published,   SAE(mean_t h_t)

Source of the published procedure: De Sabbata, Mizzaro and Roitero, arXiv 2505.03368; see
``prompts`` for what is read. With pooling ``last`` the two orders are the same.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from sae_apps.geospatial.prompts import PlacePrompts, ProbeConfig, place_prompts
from sae_core.encoder import SparseEncoder
from sae_core.errors import UserError
from sae_core.features import SparseFeatures
from sae_core.metrics import check_width, evaluating
from sae_core.models import LanguageModel
from sae_core.pooling import RowPooler
from sae_core.provenance import Provenance, package_versions
from sae_core.tokenised import stream_kept

if TYPE_CHECKING:
    from sae_apps.geospatial.places import Places

CAREFUL = ProbeConfig()
_ENCODED_ROWS = 4096  # places encoded at once


def probe(
    lm: LanguageModel,
    sae: SparseEncoder,
    hook_point: str,
    places: "Places",
    config: ProbeConfig = CAREFUL,
) -> SparseFeatures:
    """Features of places: the code of each place's name at one hook point.

    Args:
        lm: the model that the SAE was trained on.
        sae: of the width of the hook point.
        hook_point: e.g. ``layers.15.out``.
        places: n places.
        config: what is read, and how it is pooled.
    Returns:
        Features [n, d_sae] in the order of the places. Row table: ``row_id`` of the place,
        ``prompt``, ``n_tokens`` (tokens of the name) and ``n_pooled``.
    Raises:
        UserError: an SAE of another width, and see ``place_prompts``.
    """
    return probe_saes(lm, {"sae": (sae, hook_point)}, places, config)["sae"]


def probe_saes(
    lm: LanguageModel,
    saes: Mapping[str, tuple[SparseEncoder, str]],
    places: "Places",
    config: ProbeConfig = CAREFUL,
) -> dict[str, SparseFeatures]:
    """``probe`` for several SAEs, each with its hook point, in one pass of the model.

    Raises:
        UserError: no SAE, or whatever ``probe`` refuses.
    """
    if not saes:
        raise UserError("Expected at least one SAE, got none.")
    prompts = place_prompts(lm.tokenizer, places, config)
    points = list(dict.fromkeys(point for _, point in saes.values()))
    if config.pooling == "last" or config.pool_in == "activations":
        units = _units(lm, points, prompts, config)
        codes = {
            name: encode_units(lm, sae, point, units[point]) for name, (sae, point) in saes.items()
        }
    else:
        codes = _pooled_codes(lm, saes, points, prompts, config)
    table = row_table(places, prompts)
    return {
        name: SparseFeatures(acts, table, _provenance(lm, *saes[name], places, config))
        for name, acts in codes.items()
    }


def probe_units(
    lm: LanguageModel,
    hook_points: Sequence[str],
    places: "Places",
    config: ProbeConfig = CAREFUL,
) -> dict[str, Float[np.ndarray, "n d_in"]]:
    """Raw activations of places, pooled as ``config`` says: the baseline of any feature.

    Args:
        hook_points: the residual stream is ``layers.N.out``; the MLP's neurons are
            ``model.layers.N.mlp.down_proj.in`` in Llama-like models.
    Returns:
        [n, d_in] float32 for each hook point, in the order of the places.
    Raises:
        UserError: unknown hook point, and see ``place_prompts``.
    """
    prompts = place_prompts(lm.tokenizer, places, config)
    return _units(lm, list(dict.fromkeys(hook_points)), prompts, config)


def row_table(places: "Places", prompts: PlacePrompts) -> pa.Table:
    """The row table of features of these places."""
    n_pooled = [int(row.keep.sum()) for row in prompts.rows]
    return pa.table(
        {
            "row_id": pa.array(places.row_id, pa.int64()),
            "prompt": pa.array(prompts.texts, pa.string()),
            "n_tokens": pa.array(prompts.n_tokens, pa.int32()),
            "n_pooled": pa.array(n_pooled, pa.int32()),
        }
    )


def encode_units(
    lm: LanguageModel, sae: SparseEncoder, hook_point: str, units: Float[np.ndarray, "n d_in"]
) -> sparse.csr_array:
    """Codes [n, d_sae] of activations that are pooled already; what is 0 is left out."""
    check_width(sae, units.shape[1], hook_point, lm.model_id)
    parts = []
    for first in range(0, len(units), _ENCODED_ROWS):
        x = torch.from_numpy(units[first : first + _ENCODED_ROWS])
        with evaluating(sae):
            codes = sae.encode_sparse(x.to(sae.device, sae.dtype))
        parts.append(codes.to_scipy().astype(np.float32))
    acts = sparse.csr_array(sparse.vstack(parts, format="csr"))
    acts.eliminate_zeros()
    acts.sort_indices()
    return acts


def _units(
    lm: LanguageModel, points: list[str], prompts: PlacePrompts, config: ProbeConfig
) -> dict[str, Float[np.ndarray, "n d_in"]]:
    found: dict[str, Float[np.ndarray, "n d_in"]] = {}
    for batch in _stream(lm, points, prompts, config):
        for point, one in batch.items():
            rows, pooled = pool_units(one.x.float().cpu(), one.row_id.numpy(), config.pooling)
            if point not in found:
                found[point] = np.zeros((len(prompts.rows), one.d_in), dtype=np.float32)
            found[point][rows] = pooled
    return found


def pool_units(
    x: Float[Tensor, "t d_in"], row: Int[np.ndarray, " t"], pooling: str
) -> tuple[Int[np.ndarray, " r"], Float[np.ndarray, "r d_in"]]:
    """Last, mean or max over the tokens of each row; a row's tokens lie together, in their order.

    Returns:
        the rows, in order of appearance, and their vectors float32.
    """
    starts = np.flatnonzero(np.diff(row, prepend=row[0] - 1))
    values = x.numpy()
    if pooling == "last":
        return row[starts], values[np.append(starts[1:], len(row)) - 1]
    if pooling == "max":
        return row[starts], np.maximum.reduceat(values, starts, axis=0)
    counts = np.diff(np.append(starts, len(row)))
    sums = np.add.reduceat(values.astype(np.float64), starts, axis=0)
    return row[starts], (sums / counts[:, None]).astype(np.float32)


def _pooled_codes(
    lm: LanguageModel,
    saes: Mapping[str, tuple[SparseEncoder, str]],
    points: list[str],
    prompts: PlacePrompts,
    config: ProbeConfig,
) -> dict[str, sparse.csr_array]:
    poolers = {name: RowPooler(sae.d_sae, config.pooling) for name, (sae, _) in saes.items()}
    for batch in _stream(lm, points, prompts, config):
        for name, (sae, point) in saes.items():
            one = batch[point]
            check_width(sae, one.d_in, point, lm.model_id)
            with evaluating(sae):
                codes = sae.encode_sparse(one.x.to(sae.device, sae.dtype))
            poolers[name].update(codes, one.row_id, one.position)
    every = np.arange(len(prompts.rows))
    return {name: pooler.compute(every)[0] for name, pooler in poolers.items()}


def _stream(lm: LanguageModel, points: list[str], prompts: PlacePrompts, config: ProbeConfig):
    longest = max(len(row.ids) for row in prompts.rows)
    return stream_kept(
        lm, prompts.rows, points, context_size=longest, batch_tokens=config.batch_tokens,
        window_rows=max(256, config.batch_tokens // longest),
    )  # fmt: skip


def _provenance(
    lm: LanguageModel, sae: SparseEncoder, hook_point: str, places: "Places", config: ProbeConfig
) -> Provenance:
    return Provenance(
        model_id=lm.model_id,
        model_revision=lm.revision,
        hook_point=hook_point,
        sae_hash=sae.hash(),
        data_id=f"{places.source} [{config.describe()}]",
        seed="none" if config.shuffle_seed is None else str(config.shuffle_seed),
        versions=package_versions("sae-apps", "torch", "transformers"),
    )
