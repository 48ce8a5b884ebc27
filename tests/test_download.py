"""Wheels through pip: what is asked of pip, what is kept, and each failure's one sentence."""

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from sae_core.download import cache_dir, extract_member, fetch_wheel, scratch_folder, sha256_file
from sae_core.errors import CorruptFileError, UserError

NAME = "some_texts-1.0-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "index" / NAME
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_texts/__init__.py", "raise SystemExit('imported')")
        archive.writestr("some_texts/data.txt", "hello")
        archive.writestr("some_texts-1.0.dist-info/METADATA", "Name: some-texts\nVersion: 1.0\n")
    return path


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> list[list[str]]:
    """pip replaced by a copy from `wheel`; the list receives its command lines."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / NAME).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("sae_core.download.subprocess.run", run)
    return calls


def failing_pip(monkeypatch: pytest.MonkeyPatch, stderr: str) -> None:
    monkeypatch.setattr(
        "sae_core.download.subprocess.run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr),
    )


def test_cache_dir_follows_the_environment_in_its_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SAE_APPS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "sae-apps"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "sae-apps"
    monkeypatch.setenv("SAE_APPS_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    assert not cache_dir().exists()


def test_a_wheel_is_asked_for_without_dependencies_and_kept(
    tmp_path: Path, wheel: Path, pip_calls: list[list[str]]
) -> None:
    got = fetch_wheel("some-texts", "1.0", sha256_file(wheel), tmp_path / "dest")
    assert got == tmp_path / "dest" / NAME
    assert got.read_bytes() == wheel.read_bytes()
    assert os.listdir(tmp_path / "dest") == [NAME]  # no temporary folder stays
    (command,) = pip_calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "some-texts==1.0"} <= set(command)
    fetch_wheel("some-texts", "1.0", sha256_file(wheel), tmp_path / "dest")
    assert len(pip_calls) == 1  # the second time nothing is downloaded


def test_pip_really_delivers_a_wheel(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with zipfile.ZipFile(wheel, "a") as archive:  # pip wants a complete wheel
        archive.writestr("some_texts-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("some_texts-1.0.dist-info/RECORD", "")
    got = fetch_wheel("some-texts", "1.0", sha256_file(wheel), tmp_path / "dest")
    assert got.read_bytes() == wheel.read_bytes()
    with pytest.raises(UserError, match=r"Could not download absent-package==1\.0 with pip"):
        fetch_wheel("absent-package", "1.0", "0" * 64, tmp_path / "dest")


@pytest.mark.usefixtures("pip_calls")
def test_another_sha256_is_refused_and_nothing_stays(tmp_path: Path, wheel: Path) -> None:
    with pytest.raises(
        CorruptFileError, match=f"some-texts==1.0.*{'0' * 64}.*{sha256_file(wheel)}"
    ):
        fetch_wheel("some-texts", "1.0", "0" * 64, tmp_path / "dest")
    assert os.listdir(tmp_path / "dest") == []


@pytest.mark.parametrize(
    ("stderr", "sentence"),
    [
        ("python: No module named pip", "needs pip, but .* has none"),
        (
            "WARNING: x\nERROR: No matching distribution found for a==1\n",
            "No matching distribution",
        ),
        ("ERROR: Could not install: [Errno 28] No space left on device", "is full"),
        ("", "Could not download a==1 with pip"),
    ],
)
def test_a_failing_pip_gives_a_sentence_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, sentence: str
) -> None:
    failing_pip(monkeypatch, stderr)
    with pytest.raises(UserError, match=sentence) as caught:
        fetch_wheel("a", "1", "0" * 64, tmp_path)
    assert "a==1" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_members_are_copied_and_appended(tmp_path: Path, wheel: Path) -> None:
    target = tmp_path / "out"
    extract_member(wheel, "some_texts/data.txt", target)
    extract_member(wheel, "some_texts/data.txt", target, append=True)
    assert target.read_text() == "hellohello"
    with pytest.raises(CorruptFileError, match=r"some_texts/absent\.txt"):
        extract_member(wheel, "some_texts/absent.txt", target)
    wheel.write_bytes(b"no archive")
    with pytest.raises(CorruptFileError, match=NAME):
        extract_member(wheel, "some_texts/data.txt", target)


def test_scratch_folders_go_and_take_abandoned_ones_with_them(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as abandoned, scratch_folder(tmp_path) as in_use:
        long_ago = time.time() - 2 * 86_400
        os.utime(abandoned, (long_ago, long_ago))
        with pytest.raises(RuntimeError), scratch_folder(tmp_path) as temp:
            (temp / "file").touch()
            assert not abandoned.exists()
            assert in_use.exists()
            raise RuntimeError
        assert not temp.exists()
    assert os.listdir(tmp_path) == []


def test_sha256_of_several_files_is_that_of_their_bytes_in_a_row(tmp_path: Path) -> None:
    for name, data in (("a", b"12"), ("b", b"3"), ("ab", b"123")):
        (tmp_path / name).write_bytes(data)
    assert sha256_file(tmp_path / "a", tmp_path / "b") == sha256_file(tmp_path / "ab")
    # FIPS 180-4's example for "abc" shows the digest's form.
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc").startswith("ba7816bf8f01cfea")
