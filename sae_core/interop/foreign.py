"""Which library wrote a folder, told from the files in it."""

from collections.abc import Callable
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from sae_core.errors import UserError
from sae_core.interop import dictionary_learning, saelens_config, sparsify
from sae_core.interop.result import Converted
from sae_core.interop.saelens import read_sae_lens

Reader = Callable[..., Converted]
FORMATS: dict[str, tuple[tuple[str, str], Reader]] = {
    "SAELens": ((saelens_config.CONFIG, saelens_config.WEIGHTS), read_sae_lens),
    "sparsify": ((sparsify.CONFIG, sparsify.WEIGHTS), sparsify.read_sparsify),
    "dictionary_learning": (
        (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
        dictionary_learning.read_dictionary_learning,
    ),
}


def read_foreign(
    folder: Path | str, *, x: Float[Tensor, "n d_in"] | None = None
) -> Converted:
    """The SAE in a folder of SAELens, sparsify or dictionary_learning.

    Args:
        folder: of one SAE.
        x: real activations [n, d_in] to check the conversion on, beside random ones.
    Raises:
        UserError: none of the three, or not readable; see the three readers.
        ConversionError: the SAE does not compute what the file's formula computes.
    """
    folder = Path(folder)
    name = foreign_format(folder)
    if name is None:
        raise UserError(_unknown(folder))
    return FORMATS[name][1](folder, x=x)


def foreign_format(folder: Path) -> str | None:
    """The library whose two files lie in the folder, or None."""
    for name, (files, _) in FORMATS.items():
        if all((folder / file).is_file() for file in files):
            return name
    return None


def _unknown(folder: Path) -> str:
    expected = "; ".join(f"{name}: {a} and {b}" for name, ((a, b), _) in FORMATS.items())
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        return f"Expected the folder of one SAE at {folder}, got {found}."
    below = sorted(
        path.relative_to(folder).as_posix()
        for depth in ("*", "*/*")
        for path in folder.glob(depth)
        if path.is_dir() and foreign_format(path)
    )
    if below:
        shown = ", ".join(below[:8]) + (" and more" if len(below) > 8 else "")
        return f"Expected the folder of one SAE, got {folder} with SAEs in {shown}: name one."
    present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "no files"
    return f"Expected the files of one library in {folder} ({expected}), got {present}."
