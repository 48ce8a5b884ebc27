"""The work behind ``sae-apps select``: open everything, encode the pool, pick, write."""

from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_apps.selection.budget import parse_budget
from sae_apps.selection.config import SelectConfig
from sae_apps.selection.embed import EmbedConfig, Encoder, load_encoder
from sae_apps.selection.inputs import target_features
from sae_apps.selection.instructions import InstructionSource, source_from_rows
from sae_apps.selection.pool import FINISHED, PoolFeatures, write_pool
from sae_apps.selection.prototypes import make_prototypes
from sae_apps.selection.select import select
from sae_apps.selection.tokens import top_tokens
from sae_core.errors import UserError

from .common import plain
from .featurize import open_run
from .progress import Progress
from .select_data import PoolOptions, TargetOptions, is_local, names, open_one, open_targets
from .select_files import KEY, Output, digest, write_files
from .select_text import summarise

if TYPE_CHECKING:
    from sae_apps.selection.result import SelectionResult

    from .select import EncodeOptions, SelectOptions

SAMPLE = 256  # picks on which the tokens of latents are looked up
N_TOKENS = 5  # kept for each latent


@dataclass(frozen=True)
class Asked:
    """The options, by group."""

    chosen: "SelectOptions"
    encoding: "EncodeOptions"
    pool: PoolOptions
    target: TargetOptions
    method: str
    config: SelectConfig
    """Without embed, prototypes and strategy."""
    embed: EmbedConfig
    accept_terms: bool = False


@dataclass(frozen=True)
class Plan:
    """What is to be done, with everything opened but the pool's features."""

    encoder: Encoder
    pool: InstructionSource
    targets: InstructionSource
    evaluation: InstructionSource | None
    config: SelectConfig
    folder: Path
    """Of the pool's features."""
    method: str
    """The method's name, with every setting that differs from it."""
    identity: dict[str, Any]
    """All that the picks depend on."""


def absent(asked: Asked) -> list[str]:
    """What is not on this machine yet, so that an estimate would have to download it."""
    from .cached import absent_model

    run = open_run(asked.chosen.run)
    model = asked.encoding.model or run.settings.model.name
    specs = [*names(asked.pool, "--pool FILE"), *names(asked.target, "--target FILE")]
    if asked.chosen.evaluation:
        specs.append(asked.chosen.evaluation)
    missing = [f"the data {spec} is not on this machine" for spec in specs if not is_local(spec)]
    return missing + absent_model(model)


def make_plan(asked: Asked) -> Plan:
    """Open the data and the encoder.

    Raises:
        UserError: anything that is missing or does not fit, before the pool is encoded.
    """
    chosen, encoding = asked.chosen, asked.encoding
    parse_budget(chosen.budget)
    finished = open_run(chosen.run)
    specs = names(asked.pool, "--pool FILE")
    if len(specs) != 1:
        raise UserError(f"Expected one pool, got {len(specs)}: {', '.join(specs)}.")
    pool, targets = open_one(specs[0], asked.pool), open_targets(asked.target)
    first = next(iter(pool), None)
    if first is not None and KEY in first.record:
        raise UserError(f"Expected a pool without the column {KEY!r}, got one: {specs[0]}.")
    evaluation = None
    if chosen.evaluation:
        columns = replace(asked.target, group=None, id=None)
        evaluation = open_one(chosen.evaluation, columns)
    encoder = load_encoder(
        finished.folder.path,
        model=encoding.model,
        device=encoding.device or finished.settings.model.device,
        accept_terms=asked.accept_terms,
        config=asked.embed,
    )
    config = resolve(asked)
    identity = {
        "pool": pool.id,
        "targets": targets.id,
        "evaluation": evaluation.id if evaluation else None,
        "budget": str(chosen.budget),
        "select": asdict(config) | {"embed": None},
        "encoding": encoder.identity(),
    }
    facts = [pool.id, encoding.shard_rows, identity["encoding"]]
    name = f"{Path(specs[0]).name.partition('.')[0]}-{digest(facts)}"
    features = (
        Path(encoding.features) if encoding.features else finished.folder.path / "pools" / name
    )
    label = method_label(asked, config)
    return Plan(encoder, pool, targets, evaluation, config, features, label, plain(identity))


def resolve(asked: Asked) -> SelectConfig:
    """The settings with ``auto`` replaced by what the method, or else the prototypes, ask for.

    Raises:
        UserError: settings that exclude each other.
    """
    named = SelectConfig.preset(asked.method)
    prototypes, strategy = asked.chosen.prototypes, asked.chosen.strategy
    if prototypes == "auto":
        prototypes = named.prototypes
    if strategy == "auto" and prototypes == named.prototypes:
        strategy = named.strategy
    elif strategy == "auto":
        strategy = {"one": "topk", "each": "nearest"}.get(prototypes, "round_robin")
    return replace(asked.config, prototypes=prototypes, strategy=strategy, embed=asked.embed)


def method_label(asked: Asked, config: SelectConfig) -> str:
    """``mona``, or ``mona with weights=idf``: the name alone means the method and nothing else."""
    named = SelectConfig.preset(asked.method)
    embed = named.embed or EmbedConfig()
    ours = asdict(config) | asdict(asked.embed)
    theirs = asdict(named) | asdict(embed)
    free = {"embed", "n_reasons", "seed", "batch_tokens", "window_rows"}  # change no score
    changed = [f"{k}={v}" for k, v in ours.items() if k not in free and theirs[k] != v]
    return f"{asked.method} with {', '.join(changed)}" if changed else asked.method


def run(asked: Asked, plan: Plan, output: Output, *, quiet: bool = False) -> dict[str, Any]:
    """Encode what is not yet encoded, pick, and write the files; returns the summary."""
    # before the long part: what is wrong with the few targets, or with the budget, shows at once
    targets = target_features(plan.targets, plan.encoder)
    make_prototypes(targets, plan.config.prototypes)
    features = encode_pool(asked, plan, quiet=quiet)
    result = select(
        features,
        targets,
        plan.encoder,
        asked.chosen.budget,
        config=plan.config,
        evaluation=plan.evaluation,
        records=plan.pool,
    )
    tokens = named_tokens(plan.encoder, result)
    facts = {
        "method": plan.method,
        "files": [str(path) for path in (*output.data.values(), output.meta)],
        "features": str(plan.folder),
    }
    summary = summarise(result, tokens, facts)
    write_files(output, result, plan.identity, summary, tokens)
    return summary


def encode_pool(asked: Asked, plan: Plan, *, quiet: bool) -> PoolFeatures:
    """The features of the pool, by the engine that was asked for."""
    encoding, folder = asked.encoding, plan.folder
    n_rows = None
    if not (folder / FINISHED).is_file():
        n_rows = sum(1 for _ in plan.pool)
        budget = parse_budget(asked.chosen.budget)
        if budget.unit != "tokens":
            budget.of_pool(np.ones(n_rows, dtype=np.int64))
    with Progress("encode", n_rows, "rows", enabled=not quiet) as shown:
        if encoding.engine == "local":
            return write_pool(
                plan.encoder,
                plan.pool,
                folder,
                shard_rows=encoding.shard_rows,
                progress=shown.update,
            )
        from sae_apps.selection.cluster import EncoderSpec, write_pool_ray

        spec = EncoderSpec(
            str(Path(asked.chosen.run or "").resolve()),
            encoding.model,
            encoding.device or str(plan.encoder.lm.device),
            asked.accept_terms,
            asked.embed,
        )
        return write_pool_ray(
            spec,
            plan.pool,
            folder,
            shard_rows=encoding.shard_rows,
            address=encoding.address,
            num_workers=encoding.workers,
            encoder=plan.encoder,
            progress=shown.update,
        )


def named_tokens(encoder: Encoder, result: "SelectionResult") -> dict[int, list[str]]:
    """The top tokens of every latent that a pick names, looked up in the best picks."""
    latents = {latent for row in result.reasons["latents"].to_pylist() for latent in row}
    best = set(result.picks["row_id"].to_pylist()[:SAMPLE])
    if not latents or result.source is None:
        return {}
    rows = list(islice((row for row in result.source if row.row_id in best), len(best)))
    return top_tokens(encoder, source_from_rows("picks", rows), latents, N_TOKENS)
