"""The tables of docs/trust.md, from results/faults.json and results/fuzz.json."""

from typing import Any

from benchmarks.common import table

Result = dict[str, Any]


def faults(result: Result, part: str) -> str:
    """The rows of one part: kill, flip or disk."""
    rows = [row for row in result["rows"] if row["name"].startswith(f"{part} ")]
    return table([row | {"name": row["name"].removeprefix(f"{part} ")} for row in rows])


def faults_kill(result: Result) -> str:
    """A row for each command that was killed."""
    return faults(result, "kill")


def faults_flip(result: Result) -> str:
    """A row for each kind of file that was damaged."""
    return faults(result, "flip")


def faults_disk(result: Result) -> str:
    """A row for each kind of trouble, over all commands."""
    kinds = dict.fromkeys(
        row["name"].split()[1] for row in result["rows"] if row["name"].startswith("disk ")
    )
    found = []
    for kind in kinds:
        rows = [row for row in result["rows"] if row["name"].startswith(f"disk {kind} ")]
        names = [name for name in rows[0] if name != "name"]
        found.append(
            {"trouble": kind, "commands": len(rows)}
            | {name: sum(row[name] for row in rows) for name in names}
        )
    return table(found)


def fuzz(result: Result) -> str:
    """A row for each reader and command."""
    return table([row | {"name": row["name"].removeprefix("fuzz ")} for row in result["rows"]])
