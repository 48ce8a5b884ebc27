"""A folder of shards while it is written and once it is complete: journal and manifest.

``progress.jsonl`` holds the settings and then one line per finished shard; a shard is renamed into
place before its line is written. ``manifest.json`` comes last.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sae_core.activations import Activations
from sae_core.disk import append_jsonl, atomic_write_text, fsync
from sae_core.errors import CorruptFileError, UserError
from sae_core.provenance import package_versions
from sae_core.shard_file import Shard, check_size, write_shard
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
        """Read what is there, refuse what belongs to another harvest; writes nothing."""
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            _same_settings(folder, manifest["settings"], settings)
            return Journal(folder, settings, manifest["shards"])
        if not (folder / JOURNAL).exists():
            ours = (f".{JOURNAL}", f".{MANIFEST}")  # the left-over of a kill at the very beginning
            if folder.exists() and any(not p.name.startswith(ours) for p in folder.iterdir()):
                raise UserError(f"Expected a new or empty folder, got {folder}, which holds files.")
            return Journal(folder, settings, [])
        lines = _whole_lines(folder / JOURNAL)
        if not lines:
            raise CorruptFileError(f"{folder / JOURNAL}: expected the settings in the first line.")
        _same_settings(folder, lines[0].get("settings", {}), settings)
        shards = _shards_of(folder / JOURNAL, lines[1:])
        for number, shard in enumerate(shards):
            if shard.file != _shard_name(number):
                raise CorruptFileError(
                    f"{folder / JOURNAL}: expected {_shard_name(number)} in line {number + 2}, got "
                    f"{shard.file}; two runs must not write to one folder."
                )
            check_size(folder, shard)
        return Journal(folder, settings, shards)

    def start(self) -> None:
        """Begin the journal, or take away the half-written end that a kill left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".shard-*"):
            stale.unlink()
        head = {"format": FORMAT, "version": VERSION, "settings": self.settings}
        lines = [head, *(asdict(shard) for shard in self.shards)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        atomic_write_text(self.folder / JOURNAL, text)

    def add(self, parts: list[dict[str, Activations]], end: Cursor) -> None:
        name = _shard_name(len(self.shards))
        digest, size = write_shard(self.folder / name, parts, self.settings["dtype"])
        tokens = sum(len(next(iter(part.values()))) for part in parts)
        shard = Shard(name, tokens, size, digest, end.rows, end.chunks)
        append_jsonl(self.folder / JOURNAL, asdict(shard))
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
        atomic_write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1))


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
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise CorruptFileError(f"{path}: expected one JSON record a line, got {error}.") from error


def _shards_of(path: Path, records: Iterable[dict[str, Any]]) -> list[Shard]:
    try:
        return [Shard(**record) for record in records]
    except TypeError as error:
        raise CorruptFileError(f"{path}: expected records of shards, got {error}.") from error


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
        manifest = json.loads(path.read_text(encoding="utf-8"))
        kind, version = manifest["format"], manifest["version"]
        settings, n_tokens = dict(manifest["settings"]), int(manifest["n_tokens"])
        shards = _shards_of(path, manifest["shards"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CorruptFileError):
            raise
        raise CorruptFileError(f"{path}: expected a manifest in JSON, got {error!r}.") from error
    if (kind, version) != (FORMAT, VERSION):
        raise CorruptFileError(
            f"{path}: expected {FORMAT} version {VERSION}, got {kind} version {version}."
        )
    return manifest | {"settings": settings, "n_tokens": n_tokens, "shards": shards}
