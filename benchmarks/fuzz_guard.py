"""A guarded child: limits of memory and time, and an eye on every file it opens for writing."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

CPU_S, WALL_S = 5.0, 60.0
ROOM = 3 << 30  # bytes that one input may ask for on top of what the imports hold
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOVES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate",
    "shutil.rmtree", "shutil.move", "os.chmod", "os.chown", "os.utime",
}  # fmt: skip
RUNS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class",
        "socket.connect"}  # fmt: skip


class TooLong(BaseException):
    """The limit of time is over; no Exception, so that nothing turns it into a message."""


@dataclass
class Watch:
    """What the audit hook has seen since the last input."""

    inside: str
    """Everything may be written below this folder."""
    is_on: bool = False
    """Hooks cannot be taken away."""
    seen: list[str] = field(default_factory=list)
    """Writes elsewhere, programs started, pickles read."""

    def install(self) -> None:
        """From here on every event of the interpreter is looked at."""
        sys.addaudithook(self._look)

    def _look(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & WRITES and not self._is_fine(path):
                self.seen.append(f"opened {path!r} to write")
        elif event in MOVES:
            wrong = [a for a in args[:2] if isinstance(a, str | bytes | os.PathLike)]
            if any(not self._is_fine(one) for one in wrong):
                self.seen.append(f"{event} {wrong!r}")
        elif event in RUNS and not (event == "pickle.find_class" and _is_compiler()):
            self.seen.append(f"{event} {args!r:.200}")

    def _is_fine(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        text = os.fsdecode(path)
        full = os.path.realpath(text)
        return (
            full.startswith(self.inside) or full == os.devnull or "__pycache__" in full
            or not os.path.isabs(text) and os.getcwd().startswith(self.inside)
            and ".." not in Path(text).parts
        )  # fmt: skip


def _is_compiler() -> bool:
    """The compiler numba keeps its own cache as pickles."""
    frame = sys._getframe()
    while frame is not None:
        if "/numba/core/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def limit_memory(room: int = ROOM) -> None:
    """What asks for more from now on gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    wanted = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (wanted, resource.getrlimit(resource.RLIMIT_AS)[1]))


@contextmanager
def limit_time(cpu: float = CPU_S, wall: float = WALL_S) -> Iterator[None]:
    """TooLong after so many seconds of processor time, or of the clock."""

    def stop(_signum: int, _frame: FrameType | None) -> None:
        raise TooLong

    old = [signal.signal(s, stop) for s in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, cpu)
    signal.setitimer(signal.ITIMER_REAL, wall)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), old, strict=True):
            signal.signal(number, handler)


def judged(read: Callable[[], Any], watch: Watch) -> tuple[str, str]:
    """What came of one input: accepted, refused, unclear, traceback, memory, hung or outside."""
    from sae_core.errors import UserError

    watch.seen.clear()
    watch.is_on = True
    began = time.process_time()
    try:
        with limit_time():
            read()
        what, told = "accepted", ""
    except UserError as error:
        told = str(error)
        is_one = "\n" not in told.strip() and len(told) <= 12_000 and bool(told.strip())
        what = "refused" if is_one else "unclear"
    except MemoryError as error:
        what, told = "memory", f"MemoryError: {error}"
    except TooLong:
        what, told = "hung", f"{time.process_time() - began:.1f} s of processor time"
    except SystemExit as leave:
        what, told = ("accepted", "") if not leave.code else ("traceback", f"exit {leave.code}")
    except BaseException as error:
        what, told = "traceback", _where(error)
    finally:
        watch.is_on = False
    return ("outside", "; ".join(watch.seen)[:500]) if watch.seen else (what, told[:500])


def _where(error: BaseException) -> str:
    """The error, and the last place in this project that it came through."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if any(f"/{part}/" in file for part in ("sae_core", "sae_apps", "tasks")):
            place = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[:200]} at {place}"
