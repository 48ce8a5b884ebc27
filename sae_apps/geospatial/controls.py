"""What must not know where places are, or knows it from spelling alone: controls of a probe.

    untrained    the same architecture with random weights: what the tokens alone give away
    tokens       which tokens a name has: a count of each token of the vocabulary

Token-shuffled names, the third one, are a setting of the probe (``ProbeConfig.shuffle_seed``).
"""

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

from sae_apps.geospatial.probe import row_table
from sae_apps.geospatial.prompts import ProbeConfig, place_prompts
from sae_core.features import SparseFeatures
from sae_core.models import LanguageModel
from sae_core.provenance import Provenance, package_versions

if TYPE_CHECKING:
    from sae_apps.geospatial.places import Places


def untrained(lm: LanguageModel, seed: int = 0) -> LanguageModel:
    """The same architecture and tokenizer with freshly drawn weights, embeddings included.

    The weights are those that transformers draws for the model's configuration; the global
    generator is left as it was.

    Returns:
        A model on the same device, in the same dtype, in eval mode, with frozen parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(lm.model)(deepcopy(lm.model.config))
    fresh = fresh.to(device=lm.device, dtype=lm.model.dtype).eval().requires_grad_(False)
    return replace(
        lm,
        model=fresh,
        model_id=f"{lm.model_id} untrained",
        revision=f"random weights, seed {seed}",
    )


def token_features(
    lm: LanguageModel, places: "Places", config: ProbeConfig | None = None
) -> SparseFeatures:
    """How often each token of the vocabulary is in a place's name: a probe without a model.

    Whatever a feature knows beyond this it has not read off the spelling of single tokens.

    Args:
        places: n places.
        config: its template decides how the names are cut into tokens.
    Returns:
        Features [n, size of the vocabulary]; the row table is that of ``probe``.
    """
    config = replace(config or ProbeConfig(), tokens="name", pool_bos=False, shuffle_seed=None)
    prompts = place_prompts(lm.tokenizer, places, config)
    ids = [row.ids[row.keep] for row in prompts.rows]
    row = np.repeat(np.arange(places.n), [len(one) for one in ids])
    col = np.concatenate(ids)
    ones = np.ones(len(col), dtype=np.float32)
    acts = sparse.csr_array((ones, (row, col)), shape=(places.n, len(lm.tokenizer)))
    acts.sum_duplicates()
    provenance = Provenance(
        model_id=lm.model_id,
        model_revision=lm.revision,
        hook_point="none: tokens of the name",
        sae_hash="none",
        data_id=f"{places.source} [{config.describe()}]",
        seed="none",
        versions=package_versions("sae-apps", "transformers"),
    )
    return SparseFeatures(acts, row_table(places, prompts), provenance)
