"""How compiled loops are compiled, and where their code is kept.

numba (extras ``cpu``, ``geo``) compiles; modules with such loops are imported only where it is.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sae_core.download import cache_dir


@cache
def has_numba() -> bool:
    """Can compiled loops run here?"""
    return find_spec("numba") is not None


def has_threads() -> bool:
    """Has numba threads that any number of callers may use at once?

    Those of OpenMP and TBB; its own, which stand in where neither is there, end the process. So do
    those of OpenMP in a fork of a process that has started them: there the answer is no.
    """
    return not _forked and has_numba() and _has_layer()


@cache
def _has_layer() -> bool:
    return any(map(_loads, ("omppool", "tbbpool")))


def _after_fork() -> None:
    global _forked
    threads = sys.modules.get("numba.np.ufunc.parallel")  # whoever started them
    _forked = _forked or getattr(threads, "_is_initialized", False)


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _loads(layer: str) -> bool:
    try:
        import_module(f"numba.np.ufunc.{layer}")
    except ImportError:
        return False
    return True


def compiler(name: str) -> Callable[..., Callable[[Callable], Any]]:
    """A decorator ``jit(**options)``: numba's njit with the code kept in the user's cache.

    Args:
        name: of the folder in the cache; ``$NUMBA_CACHE_DIR`` wins if it is set. numba looks for
            changes only in the file of a loop, so what is compiled into loops of other files needs
            a name that follows from its text.
    """

    def jit(**options: Any) -> Callable[[Callable], Any]:
        def decorate(function: Callable) -> Any:
            return _compiled(function, name, options)

        return decorate

    return jit


def _compiled(function: Callable, name: str, options: dict[str, Any]) -> Any:
    """numba decides the folder while it decorates, and would choose one beside the source."""
    from numba import config, njit

    settings: Any = config  # its fields are made at run time
    before = settings.CACHE_DIR
    folder = before or _writable(cache_dir() / "numba" / name)
    if folder is None:
        return njit(nogil=True, **options)(function)
    settings.CACHE_DIR = folder
    try:
        return njit(nogil=True, cache=True, **options)(function)
    finally:
        settings.CACHE_DIR = before


def _writable(folder: Path) -> str | None:
    """The folder if this user may write there, else None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return os.fspath(folder)
    except OSError:
        return None
