"""Optional dependencies: import one, or say in a sentence which extra brings it."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from sae_core.errors import MissingExtraError

FAISS_CPU = ("faiss-cpu",)
FAISS_GPU = ("faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")


def require(module: str, extra: str) -> ModuleType:
    """Import ``module`` and return it; ``extra`` is the extra of sae-apps that installs it.

    Only the absence of ``module`` itself is translated: an installed module that fails on one of
    its own imports is a broken installation, and its own message says more.

    Raises:
        MissingExtraError: ``module`` is not installed; names the extra and the pip command.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        wanted = error.name or ""
        if module != wanted and not module.startswith(wanted + "."):
            raise
        raise MissingExtraError(
            f"The module {module!r} is not installed; it comes with the extra {extra!r}: "
            f'pip install "sae-apps[{extra}]".'
        ) from error


def _installed(names: tuple[str, ...]) -> list[str]:
    """Those distributions that are present, each as ``name version``."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def faiss_conflict() -> str | None:
    """One sentence where two builds of the module ``faiss`` are installed at once, else None.

    The builds write the same files, so with both present the one installed last is imported and
    uninstalling either breaks the other; the extras ``cpu`` and ``gpu`` exclude each other.
    """
    found = [*_installed(FAISS_CPU), *_installed(FAISS_GPU)]
    if len(found) < 2:
        return None
    names = " ".join(entry.split()[0] for entry in found)
    return (
        f"Expected one build of faiss, got {' and '.join(found)}, which overwrite each other: "
        f"run `pip uninstall {names}`, then install one of the extras 'cpu' and 'gpu'."
    )
