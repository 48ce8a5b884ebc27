"""How the compiled loops are compiled, and where their code is kept.

numba (extra ``cpu``) compiles; the modules that use this one are imported only where it is present.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any

from numba import config as numba_config
from numba import njit

from sae_core.download import cache_dir

_SETTINGS: Any = numba_config  # its fields are made at run time


def _cache_folder() -> str | None:
    """A folder for compiled code that this user may write, or None; never the installed package."""
    folder = cache_dir() / "numba" / "geospatial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return os.fspath(folder)
    except OSError:
        return None


def jit(**options: Any) -> Callable[[Callable], Any]:
    """numba's njit with the code kept in the user's cache; ``$NUMBA_CACHE_DIR`` wins if it is set.

    numba decides the folder while it decorates, and would choose ``__pycache__`` beside the source.
    """

    def decorate(function: Callable) -> Any:
        before = _SETTINGS.CACHE_DIR
        folder = before or _cache_folder()
        if folder is None:
            return njit(nogil=True, **options)(function)
        _SETTINGS.CACHE_DIR = folder
        try:
            return njit(nogil=True, cache=True, **options)(function)
        finally:
            _SETTINGS.CACHE_DIR = before

    return decorate
