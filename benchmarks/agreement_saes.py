"""The SAEs of benchmarks.agreement, which other suites use too: settings, training, cache.

Every SAE is kept in the cache folder under a hash of its settings and data. The activations are
those of benchmarks.sae_quality; a seed decides the initial weights and the order of the batches.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import commit
from benchmarks.sae_quality import BATCH, D_SAE, TOKENS
from sae_core.buffer import batches
from sae_core.errors import UserError
from sae_core.sae import SAE, SAEConfig, load_sae, save_sae
from sae_core.shards import ShardedActivations
from sae_core.state import default_lr
from sae_core.train import TrainConfig, train

D_IN = 576  # SmolLM2-135M
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """One kind of SAE with its settings; the seed comes later."""

    kind: str
    """gba, topk, batch_topk, jumprelu or relu."""
    name: str
    """Names the settings in the result file; "default" are those of the comparison."""
    size: str
    """Data: full or reduced."""
    sae: SAEConfig
    """Shape."""
    train: TrainConfig
    """Schedule; lr is set."""

    @property
    def row_name(self) -> str:
        """Key of the row in the result file."""
        return f"{self.kind}-{self.name}-{self.size}"


def make_variant(
    kind: str,
    name: str,
    size: str,
    *,
    d_sae: int = D_SAE,
    k: int = 64,
    tokens: int | None = None,
    settings: Sequence[str] = (),
) -> Variant:
    """The settings of one kind; `settings` are changes like "gba.ratio=100".

    Raises:
        UserError: a change that names no setting.
    """
    steps = max(1, (tokens or TOKENS[size]) // BATCH)
    sae = SAEConfig(D_IN, d_sae, kind=kind, k=k)  # type: ignore[arg-type]
    config = TrainConfig(
        steps=steps, batch_size=BATCH, lr=default_lr(kind, d_sae), precision="bfloat16"
    )
    for setting in settings:
        sae, config = changed(sae, config, setting)
    return Variant(kind, name, size, sae, config)


def changed(sae: SAEConfig, config: TrainConfig, setting: str) -> tuple[SAEConfig, TrainConfig]:
    """Apply "sae.tied=true", "gba.ratio=100" or "lr=0.001" (a field of TrainConfig).

    Raises:
        UserError: no such field.
    """
    path, _, text = setting.partition("=")
    owner, _, field = path.rpartition(".")
    nested = {f.name: getattr(config, f.name) for f in fields(config)}
    holders: dict[str, Any] = {"sae": sae, "": config}
    holders |= {name: value for name, value in nested.items() if is_dataclass(value)}
    holder = holders.get(owner)
    if holder is None or field not in {f.name for f in fields(holder)}:
        raise UserError(
            f"Expected OWNER.FIELD=VALUE with an owner of {', '.join(filter(None, holders))}, or "
            f"FIELD=VALUE of TrainConfig, got {setting!r}."
        )
    try:
        value = json.loads(text)
    except ValueError:
        value = text  # a bare word
    if isinstance(getattr(holder, field), float) and isinstance(value, int):
        value = float(value)  # "100" for 100.0
    new = replace(holder, **{field: value})
    if owner == "sae":
        return new, config  # type: ignore[return-value]
    return sae, replace(config, **{owner: new}) if owner else new  # type: ignore[return-value]


def settings_hash(variant: Variant, config: TrainConfig, data_id: str) -> str:
    """Hex digest of everything that decides the weights but the code."""
    what = {"sae": asdict(variant.sae), "train": asdict(config), "data": data_id}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def trained(
    activations: ShardedActivations,
    variant: Variant,
    seed: int,
    folder: Path,
    *,
    fresh: bool = False,
) -> SAE:
    """The SAE of one seed: from the folder if it is there, else trained and put there."""
    config = replace(variant.train, seed=seed)
    data_id = json.dumps(activations.manifest["settings"], sort_keys=True)
    place = folder / settings_hash(variant, config, data_id)
    if place.exists() and not fresh:
        return load_sae(place)[0]
    begin = time.perf_counter()
    sae = SAE(variant.sae, generator=torch.Generator().manual_seed(seed))
    records = list(train(sae, batches(activations, config.batch_size, seed=seed), config))
    seconds = round(time.perf_counter() - begin, 1)
    log.info("%s seed %d: %.0f s, %s", variant.row_name, seed, seconds, records[-1])
    extra = {"variant": variant.row_name, "seed": seed, "seconds": seconds, "commit": commit()}
    save_sae(place, sae, extra, overwrite=True)
    return sae
