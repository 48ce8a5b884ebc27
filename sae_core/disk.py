"""Single files that are whole or absent, a full disk as one sentence, names for unfinished work."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sae_core.errors import UserError

_LOG = logging.getLogger(__name__)
_MIB = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into one sentence; other errors pass unchanged.

    Args:
        path: the file or folder that the block writes, named in the message.
    Raises:
        UserError: the disk is full (or the quota spent), or the folder may not be written.
    """
    path = Path(path)
    full = f"The disk that holds {path} is full: free some space or choose another folder."
    limit = (
        f"Expected room for a file in {path}, got the limit on the size of files: raise it "
        "(ulimit -f) or choose another disk."
    )
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno in _FULL or _says_full(error) or (error.errno is None and _is_full(path)):
            raise UserError(full) from error
        if error.errno == errno.EFBIG or _is_cut(error):
            raise UserError(limit) from error
        if error.errno in _DENIED:
            place = Path(error.filename or path)
            raise UserError(
                f"Expected access to {place} in the folder {place.parent}, got: {error.strerror}."
            ) from error
        raise
    except Exception as error:
        if _says_full(error) or ("inline_container" in str(error) and _is_full(path)):
            raise UserError(full) from error
        if _is_cut(error):
            raise UserError(limit) from error
        raise


def _says_full(error: Exception) -> bool:
    """Whether the text says so: safetensors and arrow pass the reason on without its errno."""
    return any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


def _is_cut(error: Exception) -> bool:
    """Whether a write stopped at a limit on the size of files; numpy gives two numbers alone."""
    text = str(error)
    return "File too large" in text or bool(re.fullmatch(r"\d+ requested and \d+ written", text))


def _is_full(path: Path) -> bool:
    """torch.save and numpy report a short write without a reason, so the disk itself is asked."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(place).free < _MIB


@contextmanager
def replaced_file(path: Path, temp: Path) -> Iterator[IO[bytes]]:
    """A file written as ``temp``, on the disk and renamed to ``path`` when the block ends well."""
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make a folder and be alone in writing to it; the system ends the lock with the process.

    The lock is on the folder itself (flock), so nothing is left behind. Where a file system has no
    locks, nothing is locked.

    Raises:
        UserError: another process is at work there, or the folder may not be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise UserError(
            f"Expected to be alone in writing to {folder}, got another process at work there: wait "
            "for its end or choose another folder."
        ) from error
    except OSError as error:
        _LOG.debug("no lock on %s: %s", folder, error)
    try:
        yield
    finally:
        os.close(fd)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file so that its name holds the old text or the new one, never a part.

    Raises:
        UserError: the disk is full or the folder may not be written.
    """
    path = Path(path)
    temp = path.with_name(f".{path.name}.{owner_tag('tmp')}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        with replaced_file(path, temp) as file:
            file.write(text.encode())


def append_jsonl(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Append one record as one line in one system call; a line that does not fit is taken back.

    Raises:
        UserError: the disk is full or the folder may not be written.
        ValueError: the record holds NaN or infinity, which JSON does not know.
    """
    path = Path(path)
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(fd).st_size
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        finally:
            os.close(fd)


def owner_tag(kind: str) -> str:
    """Part of a name that says whose unfinished work it is: ``kind-<pid>-<machine><random>``."""
    return f"{kind}-{os.getpid()}-{_host()}{secrets.token_hex(4)}"


def _host() -> str:
    """Eight digits for this machine: on a shared disk a process id alone names nobody."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def siblings(target: Path, kind: str) -> list[Path]:
    """Unfinished work of one kind beside its target."""
    start = f".{target.name}.{kind}-"
    pattern = re.compile(rf"{re.escape(start)}\d+-[0-9a-f]{{16}}")
    return [p for p in target.parent.iterdir() if pattern.fullmatch(p.name)]


def remove_stale(target: Path) -> None:
    """Delete what dead processes of this machine left unfinished for ``target``."""
    for kind in ("tmp", "old"):
        for path in siblings(target, kind):
            pid, tag = path.name.rsplit("-", 2)[-2:]
            if tag.startswith(_host()) and not _is_alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it lives, under another user
        return True
    return True


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
