"""The plumbing that every command shares: errors, signals, logging, JSON and counts.

Exit codes: 0 done, 2 bad input (one sentence on stderr), 130 after SIGINT and 143 after SIGTERM
with everything finished so far on disk.
"""

import errno
import json
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

from sae_core.errors import CorruptFileError, UserError
from sae_core.sealed import unsealed

PROG = "sae-apps"
EXIT_OK, EXIT_BAD_INPUT, EXIT_PIPE = 0, 2, 141
# States of the machine that the user can change, as opposed to errors in this program.
MACHINE_ERRORS = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EFBIG: "A file is larger than the limit on the size of files (ulimit -f)",
    errno.EACCES: "Permission denied",
    errno.EPERM: "Permission denied",
    errno.EROFS: "The file system is read-only",
    errno.ENOTDIR: "A part of the path is not a folder",
    errno.EISDIR: "A folder was given where a file is needed",
    errno.EEXIST: "A file is already there",
    errno.ENOENT: "No such file or folder",
    errno.ENAMETOOLONG: "The file name is too long",
}


class Interrupted(BaseException):
    """SIGINT or SIGTERM came; the exit code is 128 + the signal's number.

    No Exception, so that nothing which turns errors into messages swallows it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignal:
    """What SIGINT and SIGTERM do: raise Interrupted at once, or wait for the end of a step.

    Every write of this program is atomic and every stage continues what it finds, so stopping at
    once is safe anywhere; only training waits, to save the step that it is at.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._is_deferred = self._is_patient = False

    def receive(self, signum: int) -> None:
        """Note a signal, and raise Interrupted unless inside ``deferred``; a second one exits."""
        if self.signum is not None and not self._is_patient:
            os._exit(128 + signum)
        self.signum = signum
        if not self._is_deferred:
            raise Interrupted(signum)

    def check(self) -> None:
        """Raises:
        Interrupted: a signal has come.
        """
        if self.signum is not None:
            raise Interrupted(self.signum)

    @contextmanager
    def deferred(self, *, patient: bool = False) -> Iterator[None]:
        """Inside, a signal is only noted; the block calls ``check`` where it can stop.

        Args:
            patient: a second one is noted too, as where a launcher and the system send one each.
        """
        self._is_deferred, self._is_patient = True, patient
        try:
            yield
        finally:
            self._is_deferred = self._is_patient = False


@contextmanager
def catch_signals() -> Iterator[StopSignal]:
    """Route SIGINT and SIGTERM to a StopSignal while the block runs (main thread only)."""
    stop = StopSignal()

    def handle(signum: int, _frame: FrameType | None) -> None:
        stop.receive(signum)

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def one_line(text: str) -> str:
    """``text`` on one line, so that an error stays one sentence."""
    return re.sub(r"\s+", " ", text).strip()


def print_error(message: str) -> None:
    print(f"{PROG}: error: {one_line(message)}", file=sys.stderr)


def nearest(name: str, choices: Iterable[str], n: int = 1) -> list[str]:
    """The ``n`` choices most alike to ``name``; empty where none is similar."""
    return get_close_matches(name, list(choices), n=n, cutoff=0.5)


def run_guarded(body: Callable[[], None]) -> int:
    """Run a command's body and turn what it raises into an exit code.

    A full disk, a missing permission and the like are bad input too; any other exception is a
    defect of this program and keeps its traceback.
    """
    try:
        body()
    except UserError as error:
        print_error(str(error))
        return EXIT_BAD_INPUT
    except Interrupted as stop:
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, less) has gone; without this the interpreter complains while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        print_error(f"{MACHINE_ERRORS[error.errno]}: {error.filename or error}.")
        return EXIT_BAD_INPUT
    return EXIT_OK


@contextmanager
def logging_to_stderr(*, verbose: bool = False, quiet: bool = False) -> Iterator[None]:
    """Send this project's log records to stderr: INFO by default, DEBUG verbose, ERROR quiet."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        if verbose
        else logging.Formatter("%(message)s")
    )
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    loggers = [logging.getLogger(name) for name in ("sae_core", "sae_apps")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(before)


def quiet_libraries() -> None:
    """No progress bars and notices of the model libraries between this project's own lines.

    Takes effect because these libraries read the variables when they are first imported, later.
    """
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def plain(value: Any) -> Any:
    """``value`` as JSON types: dataclasses and tuples unfolded, NaN and infinity as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    to_list = getattr(value, "tolist", None)
    if to_list is not None:  # numpy and torch arrays and scalars
        return plain(to_list())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any, *, indent: int | None = 2) -> str:
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def run_command(
    work: Callable[[StopSignal], tuple[Any, str]], *, as_json: bool, verbose: bool, quiet: bool
) -> int:
    """Run ``work`` and print its result: one JSON object, or its text, on stdout.

    Args:
        work: returns the result as data and as text for people.
        as_json: print the data; whatever else is printed meanwhile goes to stderr.
    """

    def body() -> None:
        out = sys.stdout
        with (
            logging_to_stderr(verbose=verbose, quiet=quiet),
            catch_signals() as stop,
            redirect_stdout(sys.stderr),
        ):
            data, text = work(stop)
        print(to_json(data) if as_json else text.rstrip("\n"), file=out, flush=True)

    quiet_libraries()
    return run_guarded(body)


def token_count(value: int | str, name: str = "--tokens") -> int:
    """``200k`` -> 200000, ``1M`` -> 1000000, ``1_000_000`` -> 1000000.

    Raises:
        UserError: not a whole number above zero.
    """
    match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)([kKmMgGbB]?)", str(value).strip())
    if match:
        factor = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}[match[2].lower()]
        number = float(match[1].replace("_", "").replace(",", "")) * factor
        if number >= 1 and number == int(number):
            return int(number)
    raise UserError(f"{name} must be a count such as 200k, 1M or 1_000_000, got {value!r}.")


def size(n_bytes: float) -> str:
    """Bytes in the largest fitting unit: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def read_json(path: Path) -> dict[str, Any]:
    """Raises:
    CorruptFileError: not a JSON object, or not what was sealed; names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return unsealed(value, path)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"sae": {"k": 3}}`` -> ``{"sae.k": 3}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first setting in which two configurations differ, in words; None where they agree."""
    flat_old, flat_new = flatten(plain(old)), flatten(plain(new))
    for key in [*flat_new, *(key for key in flat_old if key not in flat_new)]:
        was, now = flat_old.get(key, "not set"), flat_new.get(key, "not set")
        if was != now:
            return f"{key} is {was!r} there and {now!r} here"
    return None
