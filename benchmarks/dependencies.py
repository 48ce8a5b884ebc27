"""Write the table of docs/dependencies.md: every package that pip brings, its licence, why.

    python -m benchmarks.dependencies            rewrite the table
    python -m benchmarks.dependencies --check    exit 1 where a direct dependency has no row

The graph is that of the installed packages' own metadata (Requires-Dist, markers evaluated for this
platform), walked from pyproject.toml once without and once with each extra. A licence is what the
package states: License-Expression, else a License of one short line, else its classifiers.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.common import ROOT, table
from sae_core.disk import atomic_write_text

PAGE = ROOT / "docs" / "dependencies.md"
BLOCK = re.compile(r"(<!-- dependencies -->\n).*?(<!-- end -->)", re.DOTALL)
UNKNOWN, ABSENT = "unknown", "not installed here"
ALWAYS = "always"
SHORT = 60  # characters: a longer License field is the text of the licence itself
# Names of licences that ask for the source of changed files, of a library, or of everything.
COPYLEFT = re.compile(r"GPL|Mozilla|MPL|EPL|CDDL|EUPL|copyleft", re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Packages and their licences.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    if options.check:
        if missing := missing_rows(PAGE):
            sys.exit(f"Expected a row in {PAGE.name} for each direct dependency, got none of "
                     f"{', '.join(missing)}.")  # fmt: skip
        return
    found = rows()
    text = PAGE.read_text(encoding="utf-8")
    atomic_write_text(PAGE, BLOCK.sub(lambda m: f"{m[1]}{table(found)}\n{m[2]}", text))
    for row in found:
        if row["licence"] == UNKNOWN or COPYLEFT.search(row["licence"]):
            print(f"{row['package']}: {row['licence']}")


def rows() -> list[dict[str, Any]]:
    """A record for each package, by name: version, licence, extras that bring it."""
    needed: dict[str, set[str]] = {}
    for extra, wanted in direct().items():
        for name in closure(wanted):
            needed.setdefault(name, set()).add(extra)
    return [
        {"package": name, "version": version_of(name), "licence": licence_of(name),
         "needed by": ALWAYS if ALWAYS in extras else ", ".join(sorted(extras))}
        for name, extras in sorted(needed.items())
    ]  # fmt: skip


def direct() -> dict[str, list[Requirement]]:
    """What pyproject.toml asks for, by extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = {ALWAYS: project["dependencies"]} | project["optional-dependencies"]
    return {extra: [Requirement(one) for one in asked] for extra, asked in texts.items()}


def closure(wanted: Iterable[Requirement]) -> set[str]:
    """Names of the packages that these bring on this platform."""
    seen: set[tuple[str, str]] = set()
    queue = [one for requirement in wanted for one in parts(requirement)]
    while queue:
        if (one := queue.pop()) in seen:
            continue
        seen.add(one)
        queue += [part for requirement in required(*one) for part in parts(requirement)]
    return {name for name, _ in seen}


def parts(requirement: Requirement) -> list[tuple[str, str]]:
    """A package without an extra, and with each that is asked for."""
    name = canonicalize_name(requirement.name)
    return [(name, extra) for extra in ("", *sorted(requirement.extras))]


def required(name: str, extra: str) -> list[Requirement]:
    """What one package asks for on this platform; nothing where it is not installed."""
    one = installed(name)
    wanted = [Requirement(text) for text in (one.requires or ())] if one else []
    return [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": extra})]


def installed(name: str) -> Distribution | None:
    """The package's metadata; None where it is not installed."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def version_of(name: str) -> str:
    """Without the local part that names a build, as +cpu."""
    one = installed(name)
    return one.version.split("+")[0] if one else "–"


def licence_of(name: str) -> str:
    """What the package states, on one line."""
    one = installed(name)
    if one is None:
        return ABSENT
    fields: Any = one.metadata
    return stated(fields.get("License-Expression"), fields.get("License"),
                  fields.get_all("Classifier") or ())  # fmt: skip


def stated(expression: str | None, text: str | None, classifiers: Iterable[str]) -> str:
    """The first of the three fields that names a licence."""
    if expression:
        return expression
    if text and "\n" not in text.strip() and len(text) <= SHORT and text.upper() != "UNKNOWN":
        return text.strip()
    names = [one.split(" :: ")[-1] for one in classifiers if one.startswith("License :: ")]
    return ", ".join(names) or UNKNOWN


def missing_rows(page: Path) -> list[str]:
    """Direct dependencies, of every extra, that the page does not list."""
    text = page.read_text(encoding="utf-8")
    names = {canonicalize_name(one.name) for asked in direct().values() for one in asked}
    return sorted(name for name in names if f"\n| {name} | " not in text)


if __name__ == "__main__":
    main()
