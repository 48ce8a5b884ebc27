"""Children for the suites of faults and fuzz: forked, watched, killed; their folders as digests.

A child is forked from a process that has imported everything and run nothing, so that a command
costs its work and not the start of an interpreter.
"""

import hashlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

CRASHED = 70  # exit code of a child that an exception ended
PREFIX = "sae-apps: error: "
MODULES = (
    "transformers", "transformers.models.llama.modeling_llama", "faiss", "numba", "jsonargparse",
    "sae_core.feature_shards", "sae_apps.selection", "sae_apps.selection.index_loops",
    "sae_apps.selection.cascade",
    "sae_apps.geospatial.report", "sae_apps.geospatial.local", "sae_apps.report",
    "sae_apps.suppression.separability_table", "scipy.stats", "geopandas", "gguf",
    "sae_apps.geospatial.maps", "sae_apps.geospatial.outlines", "pyarrow.parquet", "pyarrow.csv",
    *(f"sae_apps.tasks.{name}" for name in (
        "main", "train", "featurize", "featurize_run", "stored", "select_run", "geo_run",
        "geo_page", "geo_text", "separability_run", "suppress_run", "suppress_page", "align_run",
        "evaluation", "estimate", "identify", "inspect",
    )),
)  # fmt: skip
LEFT = re.compile(r"\.(tmp-|old-|.*\.tmp)|^\.shard-.*tmp")
# What says how long and where, not what: in results.json of a training run.
VARYING = ("seconds", "wall_seconds", "peak_memory_bytes", "machine", "seal")


def preload() -> None:
    """Import what the commands import late; nothing is computed, so that forks are safe."""
    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        import_module(name)


def start(action: Callable[[], int | None], log: Path) -> int:
    """Fork a child that runs ``action`` with stdout and stderr in ``log``; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(out, stream)
        code = action() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def finish(child: int, limit: float = 600.0) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it (-9 after the limit)."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.004)
    return kill(child)


def kill(child: int) -> int:
    """SIGKILL; the exit code, which is the child's own where it had ended already."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(argv: Iterable[str]) -> Callable[[], int]:
    """A command of ``sae-apps`` as the action of a child."""
    args = list(argv)

    def action() -> int:
        from sae_apps.tasks.main import main

        return main(args)

    return action


def is_clear(text: str) -> bool:
    """Whether stderr ends in one sentence of this program and holds no traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(PREFIX)]
    return "Traceback" not in text and len(errors) == 1 and lines[-1] == errors[0]


def contents(root: Path, states: Iterable[str]) -> dict[str, str]:
    """Digest of every file below ``states``, what differs between equal runs taken out."""
    found = {}
    for state in states:
        top = root / state
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        for file in files:
            if not LEFT.search(file.name) and not any(
                LEFT.search(part) for part in file.relative_to(root).parts
            ):
                found[file.relative_to(root).as_posix()] = _digest(file)
    return found


def _digest(file: Path) -> str:
    content = file.read_bytes()
    if file.name == "results.json":
        kept = {k: v for k, v in json.loads(content).items() if k not in VARYING}
        content = json.dumps(kept).encode()
    return hashlib.sha256(content).hexdigest()


def beside(top: Path) -> list[Path]:
    """Unfinished work that stands next to what it will become."""
    shards = top.with_name(f"{top.name}.partial")
    return [*top.parent.glob(f".{top.name}.*"), *([shards] if shards.exists() else [])]


def left_over(root: Path, states: Iterable[str]) -> list[str]:
    """Unfinished work that nobody owns any more, below or beside the states."""
    found: list[str] = []
    for state in states:
        top = root / state
        near = [p for p in beside(top) if LEFT.search(p.name) or not p.name.startswith(".")]
        below = [p for p in top.rglob(".*") if LEFT.search(p.name)] if top.is_dir() else []
        found += [p.relative_to(root).as_posix() for p in (*near, *below)]
    return found


def share(part: int, whole: int) -> float:
    """Part of a whole, 0 of nothing."""
    return part / whole if whole else 0.0


def add(counts: dict[str, Any], name: str, n: int = 1) -> None:
    """One more of a kind."""
    counts[name] = counts.get(name, 0) + n
