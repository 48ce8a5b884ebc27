"""The folder of a run: which run it holds, what is finished in it, its metrics, its SAE.

run.json        settings and provenance, written first
activations/    shards of the training and the held-out tokens
checkpoints/    training state
metrics.jsonl   one line a step; the same for a run that was killed and resumed
sae/            the trained SAE
results.json    evaluation on held-out text, written last
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_core.disk import atomic_write_text
from sae_core.errors import CorruptFileError, UserError
from sae_core.sealed import sealed

from .common import first_difference, plain, read_json, to_json

RUN_FORMAT, RUN_VERSION = "sae-apps-run", 1


@dataclass(frozen=True)
class RunFolder:
    """Names of the parts of a run."""

    path: Path

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    @property
    def activations(self) -> Path:
        return self.path / "activations"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def sae(self) -> Path:
        return self.path / "sae"

    @property
    def results_file(self) -> Path:
        return self.path / "results.json"

    @property
    def is_finished(self) -> bool:
        return self.results_file.exists()

    def discard_if_empty(self) -> None:
        """Take back what a failed start wrote, unless a finished shard or checkpoint is there."""
        if any(self.activations.glob("*/shard-*")) or any(self.checkpoints.glob("*")):
            return
        for folder in (self.activations, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
        self.run_file.unlink(missing_ok=True)
        self.metrics_file.unlink(missing_ok=True)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def read(self) -> dict[str, Any]:
        """``run.json``: ``{"format", "version", "config", "provenance"}``.

        Raises:
            UserError: the folder is no run; CorruptFileError: the file is damaged.
        """
        if not self.run_file.is_file():
            found = "a folder without run.json" if self.path.is_dir() else "no folder"
            raise UserError(f"Expected the folder of a run at {self.path}, got {found}.")
        run = read_json(self.run_file)
        if (run.get("format"), run.get("version")) != (RUN_FORMAT, RUN_VERSION):
            raise UserError(
                f"{self.run_file} must be {RUN_FORMAT} version {RUN_VERSION}, "
                f"got {run.get('format')} version {run.get('version')}."
            )
        for name in ("config", "provenance"):
            if not isinstance(run.get(name), dict):
                raise CorruptFileError(
                    f"{self.run_file}: expected an object as {name!r}, "
                    f"got {type(run.get(name)).__name__}."
                )
        return run


def check_free(path: Path, config: Mapping[str, Any]) -> RunFolder:
    """The run folder at ``path``, if it is empty or holds the run with this very configuration.

    Nothing is written.

    Raises:
        UserError: it holds another run (names the first differing setting) or other files.
    """
    run = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"Expected a folder at {path}, got a file.")
    left_over = f".{run.run_file.name}."  # of a kill before run.json was in its place
    if not path.is_dir() or all(one.name.startswith(left_over) for one in path.iterdir()):
        return run
    if not run.run_file.is_file():
        raise UserError(
            f"Expected a new, empty or run folder at {path}, got one that holds other files; "
            "choose another --out."
        )
    difference = first_difference(run.read()["config"], config)
    if difference:
        raise UserError(f"{path} already holds another run: {difference}; choose another --out.")
    return run


def claim(run: RunFolder, config: Mapping[str, Any], provenance: Mapping[str, str]) -> None:
    """Write ``run.json``, or check that the model and the text are still those of the run.

    Raises:
        UserError: the weights or the text behind an unchanged name have changed.
    """
    if run.run_file.exists():
        difference = first_difference(run.read()["provenance"], plain(provenance))
        if difference:
            raise UserError(f"{run.path} cannot be resumed, its input has changed: {difference}.")
        return
    content = {
        "format": RUN_FORMAT,
        "version": RUN_VERSION,
        "config": config,
        "provenance": provenance,
    }
    atomic_write_text(run.run_file, to_json(sealed(plain(content))) + "\n")


def truncate_metrics(file: Path, step: int) -> None:
    """Keep the records up to ``step``, the last one that the checkpoint contains.

    A resumed run writes the later ones again, so it ends with the file of an unbroken run. A last
    line cut by a kill is dropped with them.
    """
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    atomic_write_text(file, "".join(kept))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
