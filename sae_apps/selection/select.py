"""Pick the rows of a pool that look most like targets to the latents of an SAE.

    score(i) = similarity(z_i, z*)      z mean-pooled codes, z* the mean code of the targets

MONA (arXiv 2503.15573) takes the generalised Jaccard similarity, one prototype and the top n;
``SelectConfig.preset("mona")`` is that and nothing else. Every deviation is a switch of its own.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from sae_apps.selection.budget import Budget, parse_budget
from sae_apps.selection.config import PRESENCE, SelectConfig
from sae_apps.selection.contamination import contamination
from sae_apps.selection.duplicates import exact_duplicates, near_duplicates, without
from sae_apps.selection.embed import Encoder
from sae_apps.selection.inputs import (
    as_encoder,
    as_source,
    check_match,
    pool_features,
    target_features,
)
from sae_apps.selection.instructions import InstructionSource
from sae_apps.selection.pool import PoolFeatures
from sae_apps.selection.presence import Background, background_of, presence
from sae_apps.selection.prototypes import make_prototypes
from sae_apps.selection.ranking import (
    NEAREST,
    Limits,
    Measure,
    Picks,
    idf_weights,
    pick,
    reasons_of,
)
from sae_apps.selection.result import SelectionResult
from sae_core.errors import UserError
from sae_core.provenance import package_versions


def select(
    pool: Any,
    targets: Any,
    sae: Encoder | str | Path | None = None,
    budget: Budget | float | str = 0.05,
    *,
    config: SelectConfig = SelectConfig(),  # noqa: B008 - frozen
    evaluation: Any = None,
    records: Any = None,
    folder: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> SelectionResult:
    """Pick the rows of a pool that are most like the targets.

    Args:
        pool: rows (an InstructionSource, or what ``open_instructions`` understands), features of
            rows (PoolFeatures, SparseFeatures), or the folder of a written pool.
        targets: rows or features, likewise; with groups where prototypes are made by group.
        sae: an Encoder, or the folder of a run or an SAE; not needed where both are features.
        budget: 0.05, "5%", 1000, "1000 rows" or "200k tokens".
        config: metric, prototypes, strategy and so on.
        evaluation: rows that no pick may contain, e.g. a test set; None: not checked.
        records: the pool's rows where ``pool`` is features: for the picks' records, and for what
            is decided on text.
        folder: where the pool's features are kept, and taken up again after a kill; None: in a
            temporary folder, for this call.
        progress: called with numbers of pool rows as they are encoded.
    Raises:
        UserError: an empty pool, a target without text, a budget over the pool, features of
            another SAE or model, a row_id twice, or settings that exclude each other.
    """
    wanted = parse_budget(budget)
    source = as_source(records if records is not None else pool)
    checked = as_source(evaluation)
    if evaluation is not None and checked is None:
        raise UserError("Expected an evaluation set as rows of text, got features.")
    needs_text = config.exact_duplicates or config.near_duplicates or checked is not None
    if needs_text and source is None:
        raise UserError(
            "Expected the pool's records for what is decided on text (duplicates, evaluation), got "
            "features alone: pass records=..."
        )
    encoder = as_encoder(sae, config.embed)
    aims = target_features(targets, encoder)  # first: what is wrong with few rows shows at once
    with tempfile.TemporaryDirectory(prefix="sae-apps-pool-") as temp:
        place = Path(folder) if folder is not None else Path(temp) / "pool"
        features = pool_features(pool, encoder, source, place, progress)
        check_match(features, aims, config.embed)
        return _selected(features, aims, wanted, config, source, checked)


def _selected(
    pool: PoolFeatures,
    targets: PoolFeatures,
    budget: Budget,
    config: SelectConfig,
    source: InstructionSource | None,
    evaluation: InstructionSource | None,
) -> SelectionResult:
    """The selection, once everything is encoded."""
    rows = pool.rows()
    row_ids, tokens = rows["row_id"].to_numpy(), rows["n_tokens"].to_numpy()
    may, removed = allowed_rows(row_ids, config, source, evaluation)
    amount = budget.of_pool(tokens[may], n_pool=len(may))
    strata = {
        "none": lambda: None,
        "strata": lambda: tokens,
        "target_strata": lambda: targets.rows()["n_tokens"].to_numpy(),
    }[config.length]()
    limits = Limits(may, tokens, amount, budget.unit == "tokens", strata)
    measure = make_measure(pool, targets, config)
    scored, picks = pick(pool, measure, limits, config.strategy)
    if config.metric != "l2" and not scored.score[may].any():
        raise UserError(
            f"Expected a row that shares a latent of weight above 0 with the targets, got a score "
            f"of 0 for all {int(may.sum())} rows."
        )
    if not len(picks.row):
        raise UserError(
            f"Expected a budget in which the best row fits, got {amount} tokens for one of "
            f"{int(tokens[may][np.argmax(scored.score[may])])}."
        )
    reasons = reasons_of(pool, measure, picks, row_ids, config.n_reasons)
    counts = {
        "rows": len(row_ids),
        "without_text": int(pool.manifest.get("without_text", 0)),
        "empty": int(scored.is_empty.sum()),
        **removed,
        "picked": len(picks.row),
        "picked_tokens": int(tokens[picks.row].sum()),
    }
    names = pa.array(measure.prototypes.names, pa.string())
    return SelectionResult(
        _picks_table(picks, row_ids, tokens, names),
        pa.table(
            {
                "row_id": pa.array(row_ids, pa.int64()),
                "score": pa.array(scored.score, pa.float32()),
                "group": names.take(pa.array(scored.group)),
                "n_tokens": pa.array(tokens, pa.int64()),
            }
        ),
        reasons,
        counts,
        {"budget": asdict(budget), **asdict(config)},
        _provenance(pool, targets, evaluation),
        source,
    )


def _background(pool: PoolFeatures, config: SelectConfig) -> Background:
    most = 0 if config.metric == "presence_plain" else None
    return background_of((shard.acts for shard in pool), components=most)


def make_measure(pool: PoolFeatures, targets: PoolFeatures, config: SelectConfig) -> Measure:
    """Prototypes of the targets, and what the measure takes from the pool."""
    is_presence = config.metric in PRESENCE
    shards = (replace(one, acts=presence(one.acts)) for one in targets) if is_presence else targets
    return Measure(
        make_prototypes(shards, config.prototypes),
        config.metric,
        idf_weights(pool) if config.weights == "idf" else None,
        _background(pool, config) if is_presence else None,
        NEAREST if config.strategy == "nearest" else 1,
    )


def allowed_rows(
    row_ids: Int[np.ndarray, " n"],
    config: SelectConfig,
    source: InstructionSource | None,
    evaluation: InstructionSource | None,
) -> tuple[Bool[np.ndarray, " n"], dict[str, int]]:
    """Rows that may be picked, and how many each check leaves out of those before it left.

    Exact duplicates go first, then near ones, then rows that share text with the evaluation set.
    """
    may = np.ones(len(row_ids), dtype=bool)
    counts = {"exact_duplicates": 0, "near_duplicates": 0, "contaminated": 0}

    def drop(name: str, ids: Int[np.ndarray, " k"]) -> None:
        dropped = may & np.isin(row_ids, ids)
        counts[name] = int(dropped.sum())
        may[dropped] = False

    if source is not None and config.exact_duplicates:
        drop("exact_duplicates", exact_duplicates(source, span=config.duplicate_span).row_id)
    if source is not None and config.near_duplicates is not None:
        left = without(source, row_ids[~may])
        found = near_duplicates(
            left,
            threshold=config.near_duplicates,
            span=config.duplicate_span,
            seed=config.seed,
        )
        drop("near_duplicates", found.row_id)
    if source is not None and evaluation is not None:
        drop("contaminated", contamination(without(source, row_ids[~may]), evaluation).picks)
    if not may.any():
        raise UserError(f"Expected a row of {len(may)} to be left to pick from, got {counts}.")
    return may, counts


def _picks_table(
    picks: Picks, row_ids: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"], names: pa.Array
) -> pa.Table:
    return pa.table(
        {
            "rank": pa.array(np.arange(len(picks.row)), pa.int64()),
            "row_id": pa.array(row_ids[picks.row], pa.int64()),
            "score": pa.array(picks.score, pa.float32()),
            "group": names.take(pa.array(picks.group)),
            "n_tokens": pa.array(tokens[picks.row], pa.int64()),
        }
    )


def _provenance(
    pool: PoolFeatures, targets: PoolFeatures, evaluation: InstructionSource | None
) -> dict[str, Any]:
    origin = pool.provenance.to_dict() | {
        "data_id": pool.source,
        "targets": targets.source,
        "evaluation": evaluation.id if evaluation is not None else "none",
        "encoding": pool.manifest.get("identity", pool.provenance.data_id),
        "fvu": pool.manifest.get("fvu"),
        "versions": package_versions("sae-apps", "torch", "transformers", "numpy", "scipy"),
    }
    return origin
