"""What turns rows into codes: a language model, an SAE of one of its hook points, and settings."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sae_apps.selection.templates import FORMS, choose_form
from sae_core.activations import resolve_hook_point
from sae_core.encoder import SparseEncoder
from sae_core.errors import CorruptFileError, UserError
from sae_core.metrics import check_width
from sae_core.models import DTYPES, LanguageModel, load_model
from sae_core.pooling import POOLINGS
from sae_core.sae import load_sae

SPANS = ("all", "prompt", "response")


@dataclass(frozen=True)
class EmbedConfig:
    """How a row becomes one code."""

    pooling: str = "mean"
    """mean, as published; max, sum or last (see ``sae_core.pooling``)."""
    span: str = "all"
    """Tokens that are pooled: all, prompt or response. The model reads the whole row anyway."""
    special: bool = False
    """Whether special tokens, tokens of the chat template and the first token are pooled too."""
    max_len: int = 2048
    """Tokens of a row that are read, from its beginning; at most the model's positions."""
    form: str = "chat"
    """chat: the model's chat template; plain: prompt and response without one."""
    batch_tokens: int = 4096
    """Tokens a forward pass at most, padding counted; one row of max_len always fits."""
    window_rows: int = 256
    """Rows that are sorted by length together."""

    def __post_init__(self) -> None:
        for name, known in (("pooling", POOLINGS), ("span", SPANS), ("form", FORMS)):
            if getattr(self, name) not in known:
                raise UserError(f"Expected a {name} of {known}, got {getattr(self, name)!r}.")
        for name in ("max_len", "batch_tokens", "window_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"Expected {name} of at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True, eq=False)
class Encoder:
    """A language model and an SAE of one of its hook points."""

    lm: LanguageModel
    """The model that the SAE was trained on."""
    sae: SparseEncoder
    """On the device of the model, or another; or the routing of a Monet model."""
    hook_point: str
    """Where the SAE was trained, e.g. ``layers.15.out``."""
    config: EmbedConfig = field(default_factory=EmbedConfig)
    """What is read and pooled."""

    def parameters(self) -> list[torch.Tensor]:
        """Weights of the model and of the SAE; a router is part of the model."""
        own = self.sae.parameters() if isinstance(self.sae, torch.nn.Module) else ()
        return [*self.lm.model.parameters(), *own]

    @property
    def context(self) -> int:
        """Tokens of a row that the model reads at most."""
        return min(self.config.max_len, self.lm.max_positions)

    def identity(self) -> dict[str, Any]:
        """Everything that a code depends on, as one flat mapping of strings and numbers."""
        facts = {
            "model_id": self.lm.model_id,
            "model_revision": self.lm.revision,
            "model_dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "tokenizer": _tokenizer_hash(self.lm.tokenizer),
            "hook_point": self.hook_point,
            "sae_hash": self.sae.hash(),
        }
        return facts | {f"embed.{name}": value for name, value in asdict(self.config).items()}


def load_encoder(
    path: str | Path,
    *,
    model: str | LanguageModel | None = None,
    device: str | None = None,
    accept_terms: bool = False,
    config: EmbedConfig = EmbedConfig(),  # noqa: B008 - frozen
) -> Encoder:
    """The encoder of a finished run, or of a folder that ``save_sae`` wrote.

    Args:
        path: folder of a run (with a folder ``sae`` in it) or of an SAE.
        model: where the model is, if no longer under the name that the SAE was trained with;
            None takes that name.
        device: of model and SAE, e.g. ``cuda``; None is the cpu, or the device of a loaded model.
        accept_terms: consent to the terms of a model that has some.
        config: what is read and pooled.
    Raises:
        UserError: no SAE there, one that does not say where it was trained, or a model other than
            the one that it was trained on; CorruptFileError: a damaged file.
    """
    path = Path(path)
    folder = path / "sae" if (path / "sae" / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        found = "a folder without one" if path.is_dir() else "nothing"
        raise UserError(f"Expected a finished run or the folder of an SAE at {path}, got {found}.")
    sae, facts = load_sae(folder)
    for name in ("hook_point", "model_id"):
        if not facts.get(name):
            raise UserError(
                f"Expected the SAE in {folder} to come with its {name}, got none in config.json: "
                "build an Encoder from the model, the SAE and the hook point instead."
            )
    if model is None or isinstance(model, str):
        name = model or facts["model_id"]
        dtype = _trained_dtype(path)
        model = load_model(name, dtype=dtype, device=device or "cpu", accept_terms=accept_terms)
    _check_model(model, facts, folder)
    point = resolve_hook_point(model.model, facts["hook_point"])
    if point.path.rpartition(".")[2].isdigit():  # a whole block: the residual stream
        check_width(sae, model.d_model, point.name, model.model_id)
    choose_form(model.tokenizer, config.form)  # says so once where there is no chat template
    return Encoder(model, sae.to(device or model.device).eval(), facts["hook_point"], config)


def _check_model(lm: LanguageModel, facts: dict[str, Any], folder: Path) -> None:
    """The weights decide where both are known, since a model may have moved; else its name does."""
    trained, revision = facts["model_id"], facts.get("model_revision") or "unknown"
    known = "unknown" not in (revision, lm.revision)
    if (lm.revision != revision) if known else (lm.model_id != trained):
        raise UserError(
            f"Expected the model that the SAE in {folder} was trained on, {trained} "
            f"({revision[:12]}), got {lm.model_id} ({lm.revision[:12]})."
        )


def _trained_dtype(run: Path) -> torch.dtype:
    """The model's dtype in training, as ``run.json`` of the run (or of the SAE's run) has it."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    for file in (run / "run.json", run.parent / "run.json"):
        if file.is_file():
            try:
                settings = json.loads(file.read_text("utf-8"))["config"]["model"]
                return known[settings["dtype"]]
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptFileError(
                    f"{file}: expected the settings of a run, got {error!r}."
                ) from error
    return torch.float32


def _tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of vocabulary, rules and chat template; truncation and padding are not part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = json.loads(backend.to_str())
        for name in ("truncation", "padding"):
            rules.pop(name, None)
    text = json.dumps([rules, getattr(tokenizer, "chat_template", None)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
