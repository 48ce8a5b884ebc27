"""What a user installs: the wheel and its names, the extras, the pinned versions, the Makefile."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from sae_core.errors import MissingExtraError
from sae_core.extras import faiss_conflict, require

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INSTALLED_FOLDERS = {"sae_core": "sae_core", "sae_apps": "sae_apps", "tasks": "sae_apps/tasks"}
GENERIC_NAMES = ("tasks", "benchmarks", "tests")
# What a Makefile under test installs, in place of the pinned packages: about a second.
INSTALL_SECONDS = 1.0


def bare_environment() -> dict[str, str]:
    """This process's environment without what could put the checkout on the path."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source") / "project"
    copy.mkdir()
    for folder in (*INSTALLED_FOLDERS, *GENERIC_NAMES):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored, dirs_exist_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(copy)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the wheel alone, without its dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    return python


@pytest.fixture(scope="module")
def python_with_dependencies(clean_python: Path, wheel: Path) -> Path:
    """The same interpreter, which also sees this one's packages, but not its editable install.

    A folder named in a .pth file joins the path, while the .pth files inside it (the editable
    install is one of them) are not read.
    """
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = clean_python.parents[1] / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return clean_python


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def metadata_of(wheel: Path, file: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{file}"))
        return archive.read(name).decode()


def test_the_wheel_holds_every_file_of_its_packages_and_nothing_else(wheel: Path):
    expected = {
        f"{target}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, target in INSTALLED_FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    names = names_in(wheel)
    assert expected - names == set(), "not in the wheel: add to [tool.setuptools] in pyproject.toml"
    assert names - expected == set(), "in the wheel without being in the packages"
    assert {name.split("/")[0] for name in names} == {"sae_core", "sae_apps"}
    assert metadata_of(wheel, "top_level.txt").split() == ["sae_apps", "sae_core"]


def test_the_metadata_names_the_extras_the_licence_and_the_command(wheel: Path):
    headers = Parser().parsestr(metadata_of(wheel, "METADATA"))
    extras = set(headers.get_all("Provides-Extra", []))
    assert extras == {"cpu", "gpu", "geo", "report", "plots", "ray", "rivals", "dev"}
    assert headers["Name"] == "sae-apps"
    assert headers["Requires-Python"] == ">=3.11"
    assert headers["License-Expression"] == "MIT"
    assert "sae-apps = sae_apps.tasks.main:main" in metadata_of(wheel, "entry_points.txt")
    needed = [Requirement(line) for line in headers.get_all("Requires-Dist", [])]
    without_extra = {r.name for r in needed if r.marker is None}
    assert {"torch", "transformers", "datasets", "scikit-learn"} <= without_extra
    assert not {name for name in without_extra if name.startswith("faiss")}, "cpu or gpu brings it"


@pytest.mark.parametrize("name", GENERIC_NAMES)
def test_no_generic_name_is_installed(clean_python: Path, tmp_path: Path, name: str):
    def attempt(module: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(clean_python), "-c", f"import {module}"],
            cwd=tmp_path, env=bare_environment(), capture_output=True, text=True,
        )  # fmt: skip

    assert attempt("sae_apps").returncode == 0, "control: the wheel is there"
    run = attempt(name)
    assert run.returncode == 1
    assert f"ModuleNotFoundError: No module named '{name}'" in run.stderr


def test_the_installed_command_runs_from_the_wheel(python_with_dependencies: Path, tmp_path: Path):
    environment = python_with_dependencies.parents[1]
    run = subprocess.run(
        [str(environment / "bin" / "sae-apps"), "--help"],
        cwd=tmp_path, env=bare_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "train" in run.stdout and "example" in run.stdout
    code = "import sae_core, sae_apps.tasks.main as m; print(sae_core.__file__, m.__file__)"
    run = subprocess.run(
        [str(python_with_dependencies), "-c", code],
        cwd=tmp_path, env=bare_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(Path(file).is_relative_to(environment) for file in run.stdout.split())


# ---- extras ----


def test_a_missing_extra_is_named():
    with pytest.raises(MissingExtraError) as caught:
        require("faiss_does_not_exist", "cpu")
    assert str(caught.value) == (
        "The module 'faiss_does_not_exist' is not installed; it comes with the extra 'cpu': "
        'pip install "sae-apps[cpu]".'
    )


def test_a_module_that_is_there_is_imported():
    assert require("json.decoder", "cpu") is sys.modules["json.decoder"]


def test_a_broken_module_is_not_taken_for_a_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "half_installed.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        require("half_installed", "cpu")


@pytest.mark.parametrize(
    ("installed", "conflict"),
    [
        ((), False),
        (("faiss-cpu",), False),
        (("faiss-gpu",), False),
        (("faiss-cpu", "faiss-gpu"), True),
        (("faiss-cpu", "faiss-gpu-cu12"), True),
        (("faiss-gpu", "faiss-gpu-cu12"), True),
    ],
)
def test_two_builds_of_faiss_are_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], conflict: bool
):
    for name in installed:
        folder = tmp_path / f"{name.replace('-', '_')}-1.14.3.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.14.3\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    message = faiss_conflict()
    assert (message is not None) == conflict
    if message:
        assert all(f"{name} 1.14.3" in message for name in installed)
        assert f"pip uninstall {' '.join(installed)}`" in message


# ---- pinned versions ----


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in entries}


def test_every_dependency_that_make_installs_is_pinned_inside_its_range():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"]]
    for extra in ("cpu", "geo", "report", "dev"):
        wanted += extras[extra]
    pinned = pins()
    for requirement in map(Requirement, wanted):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but {version}"
    assert not [version for version in pinned.values() if "+" in version], "a local build"
    assert not set(pinned) & {"faiss-gpu", "sae-apps"}


def refuses(requires_python: str | None, version: str) -> bool:
    return requires_python is not None and version not in SpecifierSet(requires_python)


def test_the_pinned_versions_install_on_the_oldest_python_that_is_promised():
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=") + ".0"
    pinned = pins()
    read = {}
    for distribution in distributions():
        name = canonicalize_name(distribution.name)
        if pinned.get(name) == distribution.version.partition("+")[0]:
            read[name] = distribution.metadata.get("Requires-Python")
    assert len(read) > len(pinned) / 2, "control: the pinned versions are those installed here"
    assert [name for name, bounds in read.items() if refuses(bounds, oldest)] == []


def test_a_python_that_is_too_old_for_a_package_is_found():
    assert refuses(">=3.11.5", "3.11.0")
    assert not refuses(">=3.9", "3.11.0")
    assert not refuses(None, "3.11.0")


# ---- the Makefile ----

FAKE_PYTHON = r"""#!/usr/bin/env bash
# `-m venv --clear DIR` makes an environment whose `python -m pip` only waits; the rest is real.
if [ "$1" = -m ] && [ "$2" = venv ]; then
    echo venv >> calls
    rm -rf "$4" && mkdir -p "$4/bin"
    printf '#!/usr/bin/env bash\necho pip >> calls; sleep "$SECONDS_OF_PIP"\n' > "$4/bin/python"
    chmod +x "$4/bin/python"
else
    exec "$REAL_PYTHON" "$@"
fi
"""


@pytest.fixture
def make_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command `make install` in a folder with the real Makefile and an instant pip."""
    if not shutil.which("make"):
        pytest.skip("make is not installed.")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))
    fake = tmp_path / "fakepython"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REAL_PYTHON", sys.executable)
    monkeypatch.setenv("SECONDS_OF_PIP", str(INSTALL_SECONDS))
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    return ["make", "install", f"PYTHON={fake}"]


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().split()


def test_a_second_make_installs_nothing_until_the_pins_change(
    make_install: list[str], tmp_path: Path
):
    subprocess.run(make_install, check=True)
    subprocess.run(make_install, check=True)
    assert calls(tmp_path) == ["venv", "pip"]
    os.utime(tmp_path / "constraints.txt")
    subprocess.run(make_install, check=True)
    assert calls(tmp_path) == ["venv", "pip", "pip"]


def test_two_makes_at_once_install_once(make_install: list[str], tmp_path: Path):
    both = [subprocess.Popen(make_install) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert calls(tmp_path) == ["venv", "pip"]


def test_an_interrupted_installation_starts_afresh(
    make_install: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SECONDS_OF_PIP", "60")
    process = subprocess.Popen(make_install, start_new_session=True)
    while not (tmp_path / "calls").exists() or "pip" not in calls(tmp_path):
        assert process.poll() is None
    os.killpg(process.pid, 9)
    process.wait()
    (tmp_path / ".venv" / "half").touch()
    monkeypatch.setenv("SECONDS_OF_PIP", "0")
    subprocess.run(make_install, check=True)
    assert calls(tmp_path) == ["venv", "pip", "venv", "pip"]
    assert not (tmp_path / ".venv" / "half").exists()
    assert (tmp_path / ".venv" / ".installed").exists()


def test_an_old_or_absent_python_is_refused_in_a_sentence(make_install: list[str], tmp_path: Path):
    old = tmp_path / "oldpython"
    old.write_text(
        '#!/usr/bin/env bash\nexec "$REAL_PYTHON" -c '
        '"import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    for name, sentence in (
        (str(old), "sae-apps needs Python >= 3.11, got 3.9"),
        ("no-such-python", "sae-apps needs Python >= 3.11, and no-such-python is not a command"),
    ):
        command = ["make", "install", f"PYTHON={name}"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode != 0
        assert sentence in run.stderr
    assert not (tmp_path / "calls").exists()
