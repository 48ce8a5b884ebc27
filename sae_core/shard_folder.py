"""A folder of shards while it is written and once it is complete: journal and manifest.

``progress.jsonl`` holds the settings and then one line per finished shard; a shard is renamed into
place before its line is written. ``manifest.json`` comes last.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sae_core.activations import Activations
from sae_core.disk import append_jsonl, atomic_write_text, fsync
from sae_core.errors import CorruptFileError, UserError, reason
from sae_core.provenance import package_versions
from sae_core.sealed import sealed, unsealed
from sae_core.shard_file import DTYPES, Shard, check_digest, check_size, write_shard
from sae_core.tokens import Cursor

FORMAT = "sae-apps-activations"
VERSION = 1
JOURNAL = "progress.jsonl"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Journal:
    """The writing side of a folder."""

    folder: Path
    settings: dict[str, Any]
    shards: list[Shard]

    @staticmethod
    def open(folder: Path, settings: dict[str, Any]) -> "Journal":
        """Read what is there, refuse what belongs to another harvest; writes nothing.

        The shards are read once: what a disk has damaged since must not be trained on.
        """
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            _same_settings(folder, manifest["settings"], settings)
            for shard in manifest["shards"]:
                check_size(folder, shard)
                check_digest(folder, shard)
            return Journal(folder, settings, manifest["shards"])
        if not (folder / JOURNAL).exists():
            ours = (f".{JOURNAL}", f".{MANIFEST}")  # the left-over of a kill at the very beginning
            if folder.exists() and any(not p.name.startswith(ours) for p in folder.iterdir()):
                raise UserError(f"Expected a new or empty folder, got {folder}, which holds files.")
            return Journal(folder, settings, [])
        lines = _whole_lines(folder / JOURNAL)
        if not lines:
            raise CorruptFileError(f"{folder / JOURNAL}: expected the settings in the first line.")
        _same_settings(folder, dict(lines[0].get("settings") or {}), settings)
        shards = _shards_of(folder / JOURNAL, lines[1:])
        for number, shard in enumerate(shards):
            if shard.file != _shard_name(number):
                raise CorruptFileError(
                    f"{folder / JOURNAL}: expected {_shard_name(number)} in line {number + 2}, got "
                    f"{shard.file}; two runs must not write to one folder."
                )
            check_size(folder, shard)
            check_digest(folder, shard)
        return Journal(folder, settings, shards)

    def start(self) -> None:
        """Begin the journal, or take away the half-written end that a kill left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".shard-*"):
            stale.unlink()
        head = {"format": FORMAT, "version": VERSION, "settings": self.settings}
        lines = [sealed(head), *(sealed(asdict(shard)) for shard in self.shards)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        atomic_write_text(self.folder / JOURNAL, text)

    def add(self, parts: list[dict[str, Activations]], end: Cursor) -> None:
        name = _shard_name(len(self.shards))
        digest, size = write_shard(self.folder / name, parts, self.settings["dtype"])
        tokens = sum(len(next(iter(part.values()))) for part in parts)
        shard = Shard(name, tokens, size, digest, end.rows, end.chunks)
        append_jsonl(self.folder / JOURNAL, sealed(asdict(shard)))
        fsync(self.folder / JOURNAL)
        self.shards.append(shard)

    def finish(self) -> None:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "n_tokens": sum(shard.tokens for shard in self.shards),
            "versions": package_versions("sae-apps", "torch", "transformers"),
            "shards": [asdict(shard) for shard in self.shards],
        }
        atomic_write_text(self.folder / MANIFEST, json.dumps(sealed(manifest), indent=1))


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _same_settings(folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    for name in dict.fromkeys([*asked, *stored]):
        if stored.get(name) != asked.get(name):
            raise UserError(
                f"{folder} holds a harvest with {name} = {stored.get(name)!r}, this one has "
                f"{name} = {asked.get(name)!r}; choose another folder."
            )


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that end in a newline; a kill may have cut the last one."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    try:
        lines = [dict(json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptFileError(
            f"{path}: expected one JSON record a line, got {reason(error)}."
        ) from error
    return [unsealed(line, f"{path} line {i}") for i, line in enumerate(lines, start=1)]


def _shards_of(path: Path, records: Iterable[Any]) -> list[Shard]:
    """Records as shards; a file name that leads out of the folder is refused."""
    try:
        shards = [Shard(**record) for record in records]
    except TypeError as error:
        raise CorruptFileError(
            f"{path}: expected records of shards, got {reason(error)}."
        ) from error
    for shard in shards:
        for name, value in asdict(shard).items():
            kind = str if name in ("file", "sha256") else int
            if type(value) is not kind:
                raise CorruptFileError(f"{path}: expected {name} of a shard, got {value!r:.80}.")
        if not re.fullmatch(r"[\w-]+\.safetensors", shard.file) or shard.tokens < 1:
            raise CorruptFileError(
                f"{path}: expected the name of a shard with tokens, got {shard.file[:80]!r} "
                f"with {shard.tokens}."
            )
    return shards


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its shards as ``Shard``."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / JOURNAL).is_file():
            raise UserError(
                f"Expected a complete harvest in {folder}, got an unfinished one: run the harvest "
                "again with the same settings to finish it."
            )
        raise UserError(f"Expected a folder of activations at {folder}, got none.")
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
        kind, version = manifest["format"], manifest["version"]
        if (kind, version) != (FORMAT, VERSION):
            raise CorruptFileError(
                f"{path}: expected {FORMAT} version {VERSION}, got {kind} version {version}."
            )
        manifest = unsealed(manifest, path)
        settings, n_tokens = dict(manifest["settings"]), int(manifest["n_tokens"])
        shards = _shards_of(path, manifest["shards"])
        points = settings["hook_points"]
        if not (isinstance(points, list) and all(isinstance(name, str) for name in points)):
            raise TypeError("no names of hook points")
        if not shards or settings["dtype"] not in DTYPES:
            raise ValueError(f"{len(shards)} shards of {settings['dtype']!r}")
    except CorruptFileError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CorruptFileError(
            f"{path}: expected a manifest in JSON, got {reason(error)}."
        ) from error
    return manifest | {"settings": settings, "n_tokens": n_tokens, "shards": shards}
