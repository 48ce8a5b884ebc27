"""The settings of a run: what the commands read from flags and files, and recipes fill by name.

Each group belongs to one step: model, text, harvest, sae, train. Fields that the core owns
(HarvestConfig, SAEConfig, TrainConfig) are not repeated here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_core.errors import UserError
from sae_core.models import DEFAULT_MODEL, LanguageModel
from sae_core.sae import SAEConfig
from sae_core.state import TrainConfig
from sae_core.tokens import HarvestConfig

from .common import token_count

if TYPE_CHECKING:
    from sae_core.text import TextSource

WIDTHS_PER_LATENT = 8  # default dictionary: 8 x d_in, 4,608 for the default model
SHARDS = 16  # a kill costs at most this part of the harvest, within the bounds below
MIN_SHARD_TOKENS, MAX_SHARD_TOKENS = 8192, 65536


@dataclass(frozen=True)
class ModelOptions:
    """The language model."""

    name: str = DEFAULT_MODEL
    """Embedded name, hub id, local folder or local .gguf."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward pass."""
    device: str = "cpu"
    """Where the model and the SAE run, as torch names it: cpu, cuda, cuda:1."""


@dataclass(frozen=True)
class TextOptions:
    """The text."""

    source: str = "demo"
    """demo, a jsonl/json/csv/tsv/parquet/txt file (also .gz), or a Hugging Face dataset id."""
    column: str | None = None
    """Column that holds the text (null: text, or the only text column)."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    held_out_frac: float = 0.05
    """Share of the rows kept for evaluation, chosen by a hash of the row's number."""
    split_seed: int | None = None
    """Of that choice (null: the run's seed, or that of the run behind --activations)."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out_frac < 1:
            raise UserError(
                "text.held_out_frac must lie between 0 and 1 (both excluded), "
                f"got {self.held_out_frac}."
            )


@dataclass(frozen=True)
class RunOptions:
    """The run."""

    out: str | None = None
    """Folder of the run; the same command resumes what is in it."""
    activations: str | None = None
    """Folder of a finished run on the same model, text and hook point, whose stored activations are
    used: another seed, kind or width without another harvest."""
    hook: str | None = None
    """Hook point, e.g. layers.15.out or layers.3.mlp.in (null: output of the middle layer)."""
    tokens: int | str = "1M"
    """Training tokens read from the text, e.g. 200k or 1M; all: every token there is."""
    epochs: float = 1.0
    """Passes over these tokens; tokens * epochs / train.batch_size are the training steps."""
    eval_tokens: int | str = "50k"
    """Held-out tokens for FVU, L0 and firing frequencies (fewer where the text has fewer)."""
    loss_tokens: int | str = "10k"
    """Held-out tokens for the loss recovered; each costs four full forward passes."""
    seed: int = 0
    """Initial weights, batch order and held-out rows."""
    store_dtype: Literal["model", "float32", "bfloat16", "float16"] = "model"
    """Precision of the activations on disk (model: as the forward pass)."""
    checkpoint_every: int = 100
    """Training steps between checkpoints; one is also written on SIGINT and SIGTERM."""
    log: Literal["none", "wandb", "tensorboard"] = "none"
    """Also send the metrics there."""
    latent_parts: int = 1
    """Parts into which the processes of torchrun split the latents, where one card cannot hold the
    SAE; what is left of the processes splits the tokens of each batch."""

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.checkpoint_every < 1 or self.seed < 0:
            raise UserError(
                "epochs must be above 0, checkpoint_every at least 1 and seed at least 0, got "
                f"{self.epochs}, {self.checkpoint_every} and {self.seed}."
            )
        if self.latent_parts < 1:
            raise UserError(f"latent_parts must be at least 1, got {self.latent_parts}.")
        for name in ("tokens", "eval_tokens", "loss_tokens"):
            value = getattr(self, name)
            if not (name == "tokens" and value == "all"):
                token_count(value, f"--{name.replace('_', '-')}")


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the result of a run, and a few things that do not (see identity)."""

    model: ModelOptions = field(default_factory=ModelOptions)
    text: TextOptions = field(default_factory=TextOptions)
    run: RunOptions = field(default_factory=RunOptions)
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    sae: Mapping[str, Any] = field(default_factory=dict)
    """Fields of SAEConfig without d_in; an absent or empty d_sae means 8 x d_in."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """steps and seed are set from the run's tokens, epochs and seed."""

    def __post_init__(self) -> None:
        # Refuse a bad value before anything is loaded; where d_sae follows from the model's width,
        # any width that holds k will do here, and ``check`` comes again when the width is known.
        k = self.sae.get("k", SAEConfig.k)
        if not isinstance(k, int):
            raise UserError(f"sae.k must be a whole number, got {k!r}.")
        d_in = max(1, k)
        self.check(d_in, is_known=bool(self.sae.get("d_sae")))
        if self.harvest.max_tokens is not None:
            raise UserError(
                f"harvest.max_tokens is set by tokens, got {self.harvest.max_tokens} beside it."
            )

    @property
    def split_seed(self) -> int:
        """Seed of the held-out rows."""
        return self.run.seed if self.text.split_seed is None else self.text.split_seed

    @property
    def max_tokens(self) -> int | None:
        """Training tokens to read; None: all."""
        return None if self.run.tokens == "all" else token_count(self.run.tokens)

    def check(self, d_in: int, *, is_known: bool = True) -> None:
        """Raises:
        UserError: the SAE's settings, or its target frequencies, do not fit each other.
        """
        from sae_core.gba import assign_groups, group_targets

        config = self.sae_config(d_in)
        if is_known and config.kind == "gba":
            assign_groups(config.d_sae, self.train.gba.n_groups)
            group_targets(self.train.gba, config.k, config.d_sae)

    def sae_config(self, d_in: int) -> SAEConfig:
        values = dict(self.sae)
        values["d_sae"] = values.get("d_sae") or WIDTHS_PER_LATENT * d_in
        return SAEConfig(d_in=d_in, **values)

    def hook_point(self, lm: LanguageModel) -> str:
        return self.run.hook or f"layers.{lm.n_layers // 2}.out"

    def store_dtype(self) -> str:
        return self.model.dtype if self.run.store_dtype == "model" else self.run.store_dtype

    def shard_tokens(self) -> int:
        wanted = (self.max_tokens or SHARDS * MAX_SHARD_TOKENS) // SHARDS
        return min(max(wanted, MIN_SHARD_TOKENS), MAX_SHARD_TOKENS)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result: a folder holds runs of one identity only."""
        config = asdict(self)
        run = config.pop("run")
        for name in ("out", "log", "checkpoint_every", "activations", "latent_parts"):
            del run[name]
        for name in ("tokens", "eval_tokens", "loss_tokens"):
            run[name] = run[name] if run[name] == "all" else token_count(run[name])
        del config["harvest"]["max_tokens"]
        if config["text"].pop("split_seed") not in (None, run["seed"]):
            config["text"]["split_seed"] = self.text.split_seed
        for name in ("steps", "seed"):
            del config["train"][name]
        return run | config

    @staticmethod
    def of_identity(identity: Mapping[str, Any], **run: Any) -> "TrainSettings":
        """The settings of a run folder; ``run`` adds what the identity leaves out.

        Raises:
            UserError: the settings are of another version of the program.
        """
        from .parsing import take

        groups = {"model", "text", "harvest", "sae", "train"}
        try:
            flat = {key: value for key, value in identity.items() if key not in groups}
            return TrainSettings(
                model=ModelOptions(**identity["model"]),
                text=TextOptions(**identity["text"]),
                run=RunOptions(**(flat | run)),
                harvest=HarvestConfig(**identity["harvest"]),
                sae=identity["sae"],
                train=take(TrainConfig, identity["train"]),
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"Expected the settings of a run of this version, got others: {error}."
            ) from error


def open_model(options: ModelOptions, *, accept_terms: bool = False) -> LanguageModel:
    """Raises:
    UserError: see ``load_model``.
    """
    import torch

    from sae_core.models import load_model

    dtype = getattr(torch, options.dtype)
    return load_model(options.name, dtype=dtype, device=options.device, accept_terms=accept_terms)


def open_source(options: TextOptions) -> "TextSource":
    """Raises:
    UserError: no such text, an empty or undecodable file, a column that is not there.
    """
    from .text import open_text

    return open_text(options.source, column=options.column, split=options.split)


def need_out(out: str | None) -> Path:
    """Raises:
    UserError: no folder was given.
    """
    if not out:
        raise UserError("Expected a folder for the results, got none: add --out FOLDER.")
    return Path(out)
