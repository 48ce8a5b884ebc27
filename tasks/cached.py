"""What is on this machine already, so that an estimate downloads nothing."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_core.models import LanguageModel
    from sae_core.text import TextSource

    from .settings import ModelOptions, TextOptions


def is_model_cached(name: str) -> bool:
    """Whether the model can be loaded without a download or a conversion."""
    from sae_core.download import cache_dir
    from sae_core.models import EMBEDDED

    if name in EMBEDDED:
        return any((cache_dir() / "models").glob(f"{name}-*/converted.json"))
    path = Path(name).expanduser()
    if path.is_dir():
        return True
    if path.is_file():
        return any((cache_dir() / "models").glob(f"{path.stem}-*/converted.json"))
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no valid hub id: loading it says so in a sentence
        return True


def is_text_cached(source: str) -> bool:
    """Whether the text is a local file, or the demo text that was built before."""
    from sae_core.download import cache_dir

    if source == "demo":
        return any((cache_dir() / "text").glob("demo-*.parquet"))
    return Path(source).expanduser().exists()


def open_cached(
    model: "ModelOptions", text: "TextOptions", accept_terms: bool
) -> tuple["LanguageModel | None", "TextSource | None", list[str]]:
    """The model and the text where they are at hand, and what is left out because they are not.

    Raises:
        UserError: a local file or an embedded name that cannot be used.
    """
    from .settings import open_model, open_source

    notes = []
    lm = source = None
    if is_text_cached(text.source) or _is_local_path(text.source):
        source = open_source(text)
    else:
        notes.append(f"the text {text.source} is not on this machine yet")
    if is_model_cached(model.name) or _is_local_path(model.name):
        lm = open_model(model, accept_terms=accept_terms)
    else:
        notes.append(f"the model {model.name} is not on this machine yet")
    return lm, source, notes


def _is_local_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.endswith((".gguf", ".jsonl", ".txt", ".csv"))
