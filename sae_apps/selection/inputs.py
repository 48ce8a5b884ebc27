"""What a pool, targets and an SAE may be given as, and what they become."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sae_apps.selection.embed import EmbedConfig, Encoder, encode, load_encoder
from sae_apps.selection.instructions import InstructionSource, open_instructions
from sae_apps.selection.pool import PoolFeatures, is_pool, open_pool, write_pool
from sae_core.errors import UserError
from sae_core.features import SparseFeatures

_FREE = ("model_id", "embed.batch_tokens", "embed.window_rows")
"""What two encodings that are compared may differ in: a model may have moved, and batches change a
code by rounding alone."""
_OWN = ("embed.span", "embed.max_len")
"""What targets may have of their own."""


def as_encoder(sae: Encoder | str | Path | None, embed: EmbedConfig | None) -> Encoder | None:
    """An encoder, loaded where a folder is given; ``embed`` takes the place of its settings."""
    if sae is None:
        return None
    if not isinstance(sae, Encoder):
        return load_encoder(sae, config=embed or EmbedConfig())
    return sae if embed is None else replace(sae, config=embed)


def _is_features(spec: Any) -> bool:
    if isinstance(spec, str | Path):
        return is_pool(spec)
    return isinstance(spec, PoolFeatures | SparseFeatures)


def as_source(spec: Any, *, target: bool = False) -> InstructionSource | None:
    """Rows, opened where needed; None where the pool or targets are features."""
    if spec is None or _is_features(spec):
        return None
    if isinstance(spec, InstructionSource):
        return spec
    return open_instructions(spec, target=target)


def _as_features(spec: Any) -> PoolFeatures:
    if isinstance(spec, SparseFeatures):
        return PoolFeatures.of(spec)
    return spec if isinstance(spec, PoolFeatures) else open_pool(spec)


def _need(encoder: Encoder | None, what: str) -> Encoder:
    if encoder is None:
        raise UserError(f"Expected an SAE to encode the {what}, got none: pass sae=...")
    return encoder


def pool_features(
    spec: Any,
    encoder: Encoder | None,
    source: InstructionSource | None,
    folder: Path,
    progress: Callable[[int], None] | None,
) -> PoolFeatures:
    """Features of a pool: as given, opened, or encoded into ``folder``.

    Raises:
        UserError: see ``write_pool``; rows without an encoder.
    """
    if _is_features(spec):
        return _as_features(spec)
    assert source is not None  # what is no features is rows
    return write_pool(_need(encoder, "pool"), source, folder, progress=progress)


def target_features(spec: Any, encoder: Encoder | None) -> PoolFeatures:
    """Features of targets: as given, opened, or encoded in memory.

    Raises:
        UserError: a target without text, or rows without an encoder.
    """
    if _is_features(spec):
        return _as_features(spec)
    source = as_source(spec, target=True)
    assert source is not None  # what is no features is rows
    encoder = _need(encoder, "targets")
    reader = source.open()
    found = encode(encoder, reader, data_id=source.id)
    silent = found.row_ids[found.rows["length"].to_numpy() == 0]
    if reader.n_textless or silent.size:
        where = f", the first with row_id {silent[0]}" if silent.size else ""
        raise UserError(
            f"Expected text in every target of {source.id}, got {reader.n_textless + silent.size} "
            f"targets without text{where}."
        )
    return PoolFeatures((found,), {"source": source.id, "identity": encoder.identity()})


def check_match(pool: PoolFeatures, targets: PoolFeatures, embed: EmbedConfig | None) -> None:
    """Codes can be compared where model, hook point, SAE and settings are the same.

    Raises:
        UserError: they are not, or the pool is not encoded as ``embed`` asks; names the first
            difference.
    """
    ours, theirs = pool.provenance, targets.provenance
    for name in ("model_revision", "hook_point", "sae_hash"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"Expected pool and targets encoded by one model and SAE, got the {name} "
                f"{getattr(ours, name)!r} of the pool and {getattr(theirs, name)!r} of the targets."
            )
    held, given = (one.manifest.get("identity", {}) for one in (pool, targets))
    wanted = {name: value for name, value in given.items() if name not in _OWN}
    if embed is not None:
        wanted |= {f"embed.{name}": value for name, value in asdict(embed).items()}
    for name, value in wanted.items():
        if name in held and name not in _FREE and held[name] != value:
            raise UserError(
                f"Expected a pool encoded with {name} {value!r}, got one with {held[name]!r}."
            )
