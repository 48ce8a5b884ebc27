"""What ``sae-apps featurize`` does: the features of a text, by this process or by workers."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sae_core.errors import UserError

from .featurize import FeaturizeOptions, FinishedRun
from .progress import Progress
from .stored import featurize_stored

if TYPE_CHECKING:
    from sae_core.feature_shards import FeaturePlan
    from sae_core.features import SparseFeatures
    from sae_core.text import TextSource

    from .settings import ModelOptions

LOG = logging.getLogger(__name__)


def featurize_run(
    run: FinishedRun,
    source: "TextSource",
    options: FeaturizeOptions,
    out: Path,
    *,
    is_local: bool = True,
    accept_terms: bool = False,
    quiet: bool = False,
) -> "SparseFeatures":
    """Features of ``source`` in the folder ``out``; features that are there already are reused, and
    those that a kill left unfinished in ``OUT.partial`` are continued.

    Raises:
        UserError: ``out`` holds something else; the model does not fit the SAE.
    """
    from sae_core.feature_shards import FeaturePlan, forget_shards
    from sae_core.store import load_features, save_features

    data_id = f"{source.id}[pooling {options.pooling}]"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = load_features(out)
        check_same(found, run, data_id, options, out)
        forget_shards(out)
        LOG.info("%s holds these features already: nothing to do.", out)
        return found
    if options.stored:
        features = featurize_stored(run, source, options.pooling, data_id, quiet=quiet)
        save_features(out, features)
        return features
    plan = FeaturePlan(
        run.hook_point,
        data_id,
        options.pooling,
        run.settings.harvest,
        run.settings.run.seed,
        options.shard_rows,
    )
    model = replace(run.settings.model, name=options.model or run.settings.model.name)
    if options.engine == "ray":
        return _by_workers(run, source, plan, model, options, out, accept_terms, quiet)
    return _in_process(run, source, plan, model, out, is_local, accept_terms, quiet)


def _in_process(
    run: FinishedRun, source: "TextSource", plan: "FeaturePlan", model: "ModelOptions", out: Path,
    is_local: bool, accept_terms: bool, quiet: bool,
) -> "SparseFeatures":  # fmt: skip
    from sae_core.feature_shards import featurize_to
    from sae_core.tokens import count_tokens

    from .settings import open_model

    lm = open_model(model, accept_terms=accept_terms)
    n_tokens = None
    if is_local:  # a stream from the network is not read twice for the sake of a display
        n_tokens = count_tokens(lm.tokenizer, source, plan.config)
    with Progress("featurize", n_tokens, "tokens", enabled=not quiet) as shown:
        return featurize_to(out, lm, run.sae, source, plan, progress=shown.update)


def _by_workers(
    run: FinishedRun, source: "TextSource", plan: "FeaturePlan", model: "ModelOptions",
    options: FeaturizeOptions, out: Path, accept_terms: bool, quiet: bool,
) -> "SparseFeatures":  # fmt: skip
    from sae_core.feature_workers import FeaturizerSpec, featurize_ray

    spec = FeaturizerSpec(
        str(run.folder.sae.resolve()), model.name, model.dtype, model.device, accept_terms
    )
    with Progress("featurize", None, "rows", enabled=not quiet) as shown:
        return featurize_ray(
            out,
            spec,
            source,
            plan,
            address=options.address,
            num_workers=options.workers,
            progress=shown.update,
        )


def check_same(
    found: "SparseFeatures", run: FinishedRun, data_id: str, options: FeaturizeOptions, out: Path
) -> None:
    """Raises:
    UserError: the features come from another SAE, text, pooling or model.
    """
    origin = found.provenance
    expected = {
        "sae_hash": run.sae.hash(),
        "data_id": data_id,
        "model_id": options.model or run.settings.model.name,
    }
    for name, value in expected.items():
        if getattr(origin, name) != value:
            raise UserError(
                f"{out} already holds other features: {name} is {getattr(origin, name)!r} there "
                f"and {value!r} here; choose another --out."
            )
