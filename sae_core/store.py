"""Files that are whole or absent: atomic folders with checksums, and SparseFeatures on disk.

A folder is written beside its place under a temporary name; ``manifest.json`` (sha256 and bytes of
every file) comes last, everything is fsynced, and one rename puts it in place. Python cannot
exchange two folders in one system call, so an overwrite moves the old folder aside first: a kill
between the two renames leaves the old folder under a known name, from which every later read or
write puts it back.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy
from scipy import sparse

from sae_core.disk import (
    append_jsonl,
    atomic_write_text,
    disk_errors,
    fsync,
    owner_tag,
    remove_stale,
    siblings,
)
from sae_core.errors import CorruptFileError, UserError, reason
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance
from sae_core.untrusted import MAX_D_SAE, read_object, read_table, reading

__all__ = [
    "append_jsonl",
    "atomic_folder",
    "atomic_write_text",
    "disk_errors",
    "load_features",
    "recover_folder",
    "save_features",
    "verify_folder",
]

MANIFEST = "manifest.json"
FORMAT = "sae-apps-folder"
VERSION = 1
_CHUNK = 1 << 20


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends well it takes the place of ``path``.

    On any exception nothing new remains and an old folder is untouched. Before anything else,
    left-overs of killed processes are removed, and an old folder that a kill left aside is put
    back. One writer per path at a time.

    Args:
        path: the folder to create; it may exist if it is empty.
        overwrite: replace a folder that this function wrote earlier (one with a manifest).
    Raises:
        UserError: the folder holds something already, the disk is full, or it may not be written.
    """
    target = Path(path).resolve()
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(target)
        remove_stale(target)
        _refuse_occupied(target, overwrite)
        temp = target.with_name(f".{target.name}.{owner_tag('tmp')}")
        temp.mkdir()
    try:
        with disk_errors(target):  # inside: it asks a full disk before the clean-up makes room
            yield temp
            _write_manifest(temp)
            _refuse_occupied(target, overwrite)
            _swap_in(temp, target)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


def verify_folder(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check every file of an atomic folder against its manifest, by size and sha256.

    Returns:
        The manifest: ``{"format", "version", "files": {name: {"sha256", "bytes"}}}``.
    Raises:
        UserError: there is no such folder.
        CorruptFileError: the manifest or a file is missing, unreadable, or not what was written.
    """
    folder = Path(path).resolve()
    recover_folder(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UserError(f"Expected a folder at {path}, got {found}.")
    manifest = _read_manifest(folder / MANIFEST)
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CorruptFileError(f"{file} is missing: expected {expected['bytes']} bytes.")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise CorruptFileError(f"{file}: expected {expected['bytes']} bytes, got {size}.")
        if (digest := _sha256(file)) != expected["sha256"]:
            raise CorruptFileError(
                f"{file} was altered: expected sha256 {expected['sha256']}, got {digest}."
            )
    return manifest


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Put back the old folder that a writer, killed between its two renames, left aside.

    Does nothing when ``path`` exists or nothing was left.
    """
    target = Path(path).resolve()
    if target.exists() or not target.parent.is_dir():
        return
    left = [old for old in siblings(target, "old") if (old / MANIFEST).is_file()]
    if left:
        os.replace(max(left, key=lambda old: old.stat().st_mtime_ns), target)


def save_features(
    folder: str | os.PathLike[str], features: SparseFeatures, *, overwrite: bool = False
) -> None:
    """Write ``features.safetensors`` (CSR), ``rows.parquet`` and ``provenance.json``, atomically.

    Args:
        folder: a new or empty folder; with overwrite, also one that was written here before.
    Raises:
        UserError: the folder is taken, the disk is full, or it may not be written.
    """
    acts = features.acts
    tensors = {
        "indptr": acts.indptr.astype(np.int64),
        "indices": acts.indices.astype(np.int32),
        "data": acts.data,
        "shape": np.array(acts.shape, dtype=np.int64),
    }
    with atomic_folder(folder, overwrite=overwrite) as temp:
        safetensors.numpy.save_file(tensors, temp / "features.safetensors")
        pq.write_table(features.rows, temp / "rows.parquet")
        text = json.dumps(features.provenance.to_dict(), indent=1, ensure_ascii=False)
        (temp / "provenance.json").write_text(text, encoding="utf-8")


def load_features(folder: str | os.PathLike[str]) -> SparseFeatures:
    """Read what :func:`save_features` wrote; checksums and every law of SparseFeatures are checked.

    Raises:
        UserError: there is no such folder.
        CorruptFileError: a file is missing, altered, or not a file of features.
    """
    folder = Path(folder)
    manifest = verify_folder(folder)
    for name in ("features.safetensors", "rows.parquet", "provenance.json"):
        if name not in manifest["files"]:
            raise CorruptFileError(f"{folder} holds no features: expected {name} in its manifest.")
    with reading("features", folder):
        tensors = safetensors.numpy.load_file(folder / "features.safetensors")
        n_rows, d_sae = (int(n) for n in tensors["shape"])
        if d_sae > MAX_D_SAE or n_rows != len(tensors["indptr"]) - 1:
            raise ValueError(f"a matrix of {n_rows} x {d_sae}")
        parts = (tensors["data"], tensors["indices"], tensors["indptr"])
        acts = sparse.csr_array(parts, shape=(n_rows, d_sae))
        rows = read_table(folder / "rows.parquet")
        provenance = Provenance(**read_object(folder / "provenance.json"))
        return SparseFeatures(acts, rows, provenance)


def _refuse_occupied(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"Expected a folder at {target}, got a file.")
    if os.path.ismount(target):
        raise UserError(f"Expected a folder that can be renamed, got {target}: a mount point.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"Expected a new or empty folder, got {target}, which already holds files.")
    if not (target / MANIFEST).is_file():  # someone else's folder: replacing it would delete it
        raise UserError(
            f"Expected a folder with a {MANIFEST} to overwrite, got {target} without one: "
            "it was not written by this program and stays as it is."
        )


def _swap_in(temp: Path, target: Path) -> None:
    """Rename temp to target; an old target is moved aside before and deleted after."""
    aside = target.with_name(f".{target.name}.{owner_tag('old')}")
    if target.exists() and any(target.iterdir()):
        os.replace(target, aside)
    try:
        os.replace(temp, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.replace(aside, target)
        raise
    fsync(target.parent)
    if aside.exists():
        # Under a name for rubbish first: a half-deleted folder must never be put back.
        rubbish = target.with_name(f".{target.name}.{owner_tag('tmp')}")
        os.replace(aside, rubbish)
        shutil.rmtree(rubbish, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files: dict[str, dict[str, str | int]] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if name == MANIFEST:
            raise ValueError(f"{MANIFEST} is written by atomic_folder; use another name.")
        files[name] = {"sha256": _sha256(file), "bytes": file.stat().st_size}
        fsync(file)
    manifest = {"format": FORMAT, "version": VERSION, "files": files}
    with open(folder / MANIFEST, "x", encoding="utf-8") as out:
        json.dump(manifest, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    for sub in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        fsync(sub)


def _read_manifest(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CorruptFileError(f"{file} is missing: expected the manifest of a finished folder.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        kind, version = manifest["format"], manifest["version"]
        files = {str(k): (str(v["sha256"]), int(v["bytes"])) for k, v in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(
            f"{file}: expected a manifest in JSON, got {reason(error)}."
        ) from error
    if (kind, version) != (FORMAT, VERSION):
        raise CorruptFileError(
            f"{file}: expected {FORMAT} version {VERSION}, got {kind} version {version}."
        )
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CorruptFileError(f"{file}: expected names inside the folder, got {name!r}.")
    return manifest


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for block in iter(lambda: stream.read(_CHUNK), b""):
            digest.update(block)
    return digest.hexdigest()
