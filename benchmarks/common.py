"""What every suite shares: measuring the machine it runs on and writing its result file."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sae_core.provenance import package_versions
from sae_core.store import atomic_write_text

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Goal:
    """One promise of a suite and whether this run kept it."""

    name: str
    """What is promised."""
    value: float
    """Measured."""
    goal: str
    """Bound, as text: "<= 0.05"."""
    met: bool
    """Whether the measurement keeps the bound."""
    note: str = ""
    """What a reader must know beside the number."""


def machine() -> str:
    """Processor, cores and accelerator in one line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"


def commit() -> str:
    """Short hash of the code that ran, with + where files differ from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True
    )
    return run.stdout.strip() or "unknown"


def joined(old: str, new: str, separator: str) -> str:
    """A list in text with one more entry, unless that is in it already."""
    return separator.join(dict.fromkeys([*old.split(separator), new]))


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A result with further rows: those of the same name replaced, both commands named."""
    names = {row["name"] for row in new["rows"]}
    kept = [row for row in old["rows"] if row["name"] not in names]
    return new | {
        "command": joined(old["command"], new["command"], "; "),
        "commit": joined(old["commit"], new["commit"], ", "),
        "seconds": round(old["seconds"] + new["seconds"], 1),
        "rows": kept + new["rows"],
    }


def read_cells(path: Path) -> dict[str, dict[str, Any]]:
    """Finished cells by key; a line that a crash of the machine cut short is passed over."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[record["key"]] = record
    return found


def write_result(
    name: str,
    rows: Sequence[dict[str, Any]],
    goals: Callable[[list[dict[str, Any]]], list[Goal]],
    started: float,
    *,
    merge: bool = False,
) -> Path:
    """Write results/<name>.json and print it as a table.

    Args:
        rows: flat records.
        goals: what the rows promise, merged ones included.
        started: `time.time()` at the beginning of the suite.
        merge: add to the rows of the last result, replacing those of the same name.
    """
    path = RESULTS / f"{name}.json"
    module = sys.modules["__main__"].__spec__
    command = f"python -m {module.name if module else name} {shlex.join(sys.argv[1:])}"
    result = {
        "name": name,
        "command": command.strip(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": package_versions("torch", "transformers", "numpy", "scipy"),
        "seconds": round(time.time() - started, 1),
        "rows": list(rows),
    }
    if merge and path.exists():
        result = merged(json.loads(path.read_text()), result)
    found = goals(result["rows"])
    result["goals"] = [asdict(goal) for goal in found]
    RESULTS.mkdir(exist_ok=True)
    atomic_write_text(path, json.dumps(result, indent=1) + "\n")
    print(table(result["rows"]))
    for goal in found:
        print(f"{'met    ' if goal.met else 'NOT MET'} {goal.name}: {goal.value:.4g} ({goal.goal})")
    return path


def cell(value: Any) -> str:
    """A number with four significant digits, a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order of the first row."""
    if not rows:
        return "(no rows)"
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([cell(row.get(n)) for n in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
