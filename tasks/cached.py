"""What is on this machine already, so that an estimate downloads nothing."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_core.models import LanguageModel
    from sae_core.text import TextSource

    from .settings import ModelOptions, TextOptions

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def absent_model(name: str) -> list[str]:
    """The note that a model must be fetched or converted before it can be loaded; else empty.

    Raises:
        UserError: nothing can be found under this name: a file that does not exist, or a misspelt
            embedded name. CorruptFileError: not a whole .gguf.
    """
    from sae_core.weights import check_gguf, refuse_misspelt

    refuse_misspelt(name)
    if is_model_cached(name):
        return []
    path = Path(name).expanduser()
    if not path.is_file():
        return [f"the model {name} is not on this machine yet"]
    check_gguf(path)
    return [f"the model {name} is not converted yet"]


def is_model_cached(name: str) -> bool:
    """Whether the model can be loaded, or refused, without a download or a conversion."""
    from sae_core.download import cache_dir, sha256_file
    from sae_core.models import EMBEDDED
    from sae_core.weights import is_converted

    path = Path(name).expanduser()
    stem = name
    if name in EMBEDDED:
        sha256 = EMBEDDED[name].sha256
    elif path.is_file() and path.suffix.lower() == ".gguf":
        stem, sha256 = path.stem, sha256_file(path)
    else:
        return path.exists() or _is_in_hub_cache(name)
    return is_converted(cache_dir() / "models" / f"{stem}-{sha256[:8]}", sha256)


def _is_in_hub_cache(name: str) -> bool:
    """Whether configuration, tokenizer and every file of weights lie in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    def found(file: str) -> str | None:
        path = try_to_load_from_cache(name, file)
        return path if isinstance(path, str) else None

    try:
        if not found("config.json") or not any(found(file) for file in _TOKENIZERS):
            return False
    except ValueError:  # no valid hub id: loading it says so in a sentence
        return True
    if found("model.safetensors"):
        return True
    index = found("model.safetensors.index.json")
    if not index:
        return False
    try:
        files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged index
        return False
    return all(found(str(file)) for file in set(files))


def is_text_cached(source: str) -> bool:
    """Whether the text is a local file, or the demo text that was built before."""
    from .text import DEMO, demo_path

    return demo_path().is_file() if source == DEMO else Path(source).expanduser().exists()


def open_cached(
    model: "ModelOptions", text: "TextOptions", accept_terms: bool
) -> tuple["LanguageModel | None", "TextSource | None", list[str]]:
    """The model and the text where they are at hand, and what is left out because they are not.

    Raises:
        UserError: a local file or an embedded name that cannot be used.
    """
    from .settings import open_model, open_source
    from .text import looks_like_path

    notes = []
    lm = source = None
    if is_text_cached(text.source) or looks_like_path(text.source):
        source = open_source(text)
    else:
        notes.append(f"the text {text.source} is not on this machine yet")
    if missing := absent_model(model.name):
        notes += missing
    else:
        lm = open_model(model, accept_terms=accept_terms)
    return lm, source, notes
