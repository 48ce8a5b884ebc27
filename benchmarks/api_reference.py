"""Write docs/api.md: every public name with its signature and the first sentence of its docstring.

    python -m benchmarks.api_reference [--check]

Public are the names of ``sae_core``, those that the packages of ``sae_apps`` export, and the
modules of ``sae_core.monet`` and ``sae_core.interop``. The docstrings themselves (shapes, units,
errors, the equation and its source) are in the code, at the file named.
"""

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.common import ROOT
from sae_core.store import atomic_write_text

PAGE = ROOT / "docs" / "api.md"
PACKAGES = (
    "sae_core", "sae_core.interop", "sae_core.monet.model", "sae_core.monet.routing",
    "sae_core.monet.masks", "sae_apps.selection", "sae_apps.geospatial", "sae_apps.suppression",
    "sae_apps.alignment", "sae_apps.experts", "sae_apps.report",
)  # fmt: skip
HEAD = """# API

Every public name, its signature and what it does. Written by `python -m benchmarks.api_reference`
from the docstrings, which say more: shapes, units, errors, the equation and its source, in the file
named. How the parts fit together: [pipelines](pipelines.md).
"""


def main() -> None:
    """Rewrite or check the page."""
    parser = argparse.ArgumentParser(description="Write docs/api.md from the docstrings.")
    parser.add_argument("--check", action="store_true")
    text = page()
    if not parser.parse_args().check:
        atomic_write_text(PAGE, text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit("docs/api.md is not what the docstrings say")


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_section(name) for name in PACKAGES)


def _section(package: str) -> str:
    module = importlib.import_module(package)
    lines = [f"\n## {package}\n", f"{_sentence(module)}\n"]
    for name, value in _public(package, module):
        lines.append(f"- **`{name}{_signature(value)}`** ({_file(value)})  \n  {_sentence(value)}")
    return "\n".join(lines) + "\n"


def _public(package: str, module: Any) -> Iterator[tuple[str, Any]]:
    """Functions and classes, by name; of a module without a list, those that it defines."""
    listed = getattr(module, "__all__", None)
    names = listed or [
        name for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == package
    ]  # fmt: skip
    for name in sorted(names, key=str.lower):
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name, value


def _signature(value: Any) -> str:
    """Names of the parameters with their defaults; types are in the code."""
    try:
        found = inspect.signature(value)
    except (ValueError, TypeError):
        return "(...)"
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()]
    shown = [_shortened(one) for one in bare]
    text = str(found.replace(parameters=shown, return_annotation=inspect.Signature.empty))
    return text if len(text) < 160 else "(...)"


def _shortened(parameter: inspect.Parameter) -> inspect.Parameter:
    """A default that is an object is named by its class: its text holds addresses or much."""
    default = parameter.default
    plain = (str, int, float, bool, tuple, type(None))
    if default is inspect.Parameter.empty or isinstance(default, plain):
        return parameter
    return parameter.replace(default=_Named(type(default).__name__))


class _Named:
    """Shown as it is called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"{self.name}()"


def _sentence(value: Any) -> str:
    """The first paragraph of a docstring, as one line."""
    text = inspect.getdoc(value) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")


def _file(value: Any) -> str:
    path = inspect.getmodule(value).__name__.replace(".", "/") + ".py"  # type: ignore[union-attr]
    return f"[{path.rpartition('/')[2]}](../{path})"


if __name__ == "__main__":
    main()
