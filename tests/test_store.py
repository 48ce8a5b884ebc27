"""Folders are whole or absent: kills, full disks, flipped bits, and the round trip of features."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sae_core import disk, store
from sae_core.errors import CorruptFileError, UserError
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance
from sae_core.store import (
    append_jsonl,
    atomic_folder,
    atomic_write_text,
    disk_errors,
    load_features,
    save_features,
    verify_folder,
)

ORIGIN = Provenance("model", "main", "layers.1.out", "none", "demo", "0", "torch 2")


def write(path: Path, text: str, *, overwrite: bool = False) -> None:
    with atomic_folder(path, overwrite=overwrite) as temp:
        (temp / "sub").mkdir()
        (temp / "a.txt").write_text(text)
        (temp / "sub" / "b.bin").write_bytes(text.encode() * 3)


def dead_pid() -> int:
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


@st.composite
def features(draw: st.DrawFn) -> SparseFeatures:
    n_rows, d_sae = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    value = st.one_of(st.just(0.0), st.floats(2**-20, 2**20, width=32))
    row = st.lists(value, min_size=d_sae, max_size=d_sae)
    dense = draw(st.lists(row, min_size=n_rows, max_size=n_rows))
    ids = draw(
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n_rows, max_size=n_rows, unique=True)
    )
    texts = draw(st.lists(st.text(st.characters(codec="utf-8")), min_size=n_rows, max_size=n_rows))
    table = pa.table({"row_id": pa.array(ids, pa.int64()), "text": pa.array(texts, pa.string())})
    return SparseFeatures(sparse.csr_array(np.array(dense, dtype=np.float32)), table, ORIGIN)


def test_a_finished_folder_lists_every_file_with_its_checksum(tmp_path: Path) -> None:
    write(tmp_path / "run", "hello")
    manifest = verify_folder(tmp_path / "run")
    assert set(manifest["files"]) == {"a.txt", "sub/b.bin"}
    # sha256 of "hello", from coreutils' sha256sum
    assert manifest["files"]["a.txt"] == {
        "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        "bytes": 5,
    }
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "run", "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "run", overwrite=True) as temp:
        (temp / "a.txt").write_text("new")
        raise KeyboardInterrupt
    with pytest.raises(KeyError), atomic_folder(tmp_path / "other") as temp:
        raise KeyError
    assert sorted(os.listdir(tmp_path)) == ["run"]
    verify_folder(tmp_path / "run")
    assert (tmp_path / "run" / "a.txt").read_text() == "old"


def test_an_occupied_folder_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    write(tmp_path / "run", "old")
    with pytest.raises(UserError, match="already holds files"):
        write(tmp_path / "run", "new")
    assert (tmp_path / "run" / "a.txt").read_text() == "old"
    write(tmp_path / "run", "new", overwrite=True)
    verify_folder(tmp_path / "run")
    assert (tmp_path / "run" / "a.txt").read_text() == "new"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new")
    assert (tmp_path / "empty" / "a.txt").read_text() == "new"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="got a file"):
        write(tmp_path / "file", "new", overwrite=True)


def test_overwrite_never_deletes_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not written by this program"):
        write(tmp_path / "home", "new", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_failed_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run", "old")
    real = os.replace

    def fail_to_arrive(src: Path, dst: Path) -> None:
        if ".tmp-" in Path(src).name and Path(dst).name == "run":
            raise OSError(errno.EIO, "broken disk")
        real(src, dst)

    monkeypatch.setattr(store.os, "replace", fail_to_arrive)
    with pytest.raises(OSError, match="broken disk"):
        write(tmp_path / "run", "new", overwrite=True)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["run"]
    assert (tmp_path / "run" / "a.txt").read_text() == "old"


# Forks a writer for each folder given; the writer of folder n is killed before its n-th call.
KILLED = """
import os, signal, sys
from sae_core import store

def count(real):
    def call(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*args, **kwargs)
    return call

for moment, path in enumerate(sys.argv[1:]):
    if os.fork() == 0:
        left = moment
        for module, name in ((store.os, "replace"), (store.os, "fsync"), (store.shutil, "rmtree")):
            setattr(module, name, count(getattr(module, name)))
        with store.atomic_folder(path, overwrite=True) as temp:
            (temp / "a.txt").write_text("new")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new(tmp_path: Path) -> None:
    paths = [tmp_path / f"{moment}" / "run" for moment in range(12)]
    for path in paths:
        write(path, "old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    codes = [int(line) for line in done.stdout.split()]
    kills = codes.count(-signal.SIGKILL)
    assert codes == [-signal.SIGKILL] * kills + [0] * (len(paths) - kills)
    assert 5 < kills < len(paths), "every moment is tried, and then one that is not killed"
    seen = []
    for path in paths:
        verify_folder(path)
        seen.append((path / "a.txt").read_text())
        write(path, "next", overwrite=True)
        assert os.listdir(path.parent) == ["run"], "left-overs of the killed writer"
    assert seen == sorted(seen, key=["old", "new"].index)
    assert seen.count("old") > 3 and seen[kills - 1] == "new"


def test_a_failed_write_after_a_kill_still_has_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "run", "old")
    # as a writer leaves it that is killed between its two renames
    aside = tmp_path / f".run.old-{dead_pid()}-{disk._host()}00000000"
    (tmp_path / "run").rename(aside)
    with pytest.raises(KeyError), atomic_folder(tmp_path / "run", overwrite=True):
        raise KeyError
    assert os.listdir(tmp_path) == ["run"]
    assert (tmp_path / "run" / "a.txt").read_text() == "old"


def test_what_is_being_deleted_is_never_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run", "old")
    monkeypatch.setattr(store.shutil, "rmtree", lambda path, **options: None)  # a kill, in effect
    write(tmp_path / "run", "new", overwrite=True)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run")  # the user deletes the result
    with pytest.raises(UserError, match="got nothing"):
        verify_folder(tmp_path / "run")


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="already holds files"),
        atomic_folder(tmp_path / "run") as temp,
    ):
        (temp / "a.txt").write_text("slow")
        write(tmp_path / "run", "fast")
    assert (tmp_path / "run" / "a.txt").read_text() == "fast"
    assert os.listdir(tmp_path) == ["run"]


def test_a_live_writer_is_left_alone(tmp_path: Path) -> None:
    live = tmp_path / f".run.tmp-{os.getpid()}-{disk._host()}00000000"
    dead = tmp_path / f".run.tmp-{dead_pid()}-{disk._host()}00000000"
    elsewhere = tmp_path / f".run.tmp-{dead_pid()}-{'0' * 16}"
    for folder in (live, dead, elsewhere):
        folder.mkdir()
    write(tmp_path / "run", "x")
    assert live.exists() and elsewhere.exists() and not dead.exists()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "expected a manifest in JSON"),
        (lambda p: (p / "manifest.json").write_text("[]"), "expected a manifest in JSON"),
        (lambda p: (p / "sub" / "b.bin").unlink(), "b.bin is missing: expected 15 bytes"),
        (lambda p: (p / "a.txt").write_text("hell"), "a.txt: expected 5 bytes, got 4"),
        (lambda p: (p / "a.txt").write_text("hallo"), "a.txt was altered: expected sha256 2cf24"),
    ],
)
def test_damage_is_named(tmp_path: Path, harm, message: str) -> None:
    write(tmp_path / "run", "hello")
    harm(tmp_path / "run")
    with pytest.raises(CorruptFileError, match=message):
        verify_folder(tmp_path / "run")


def test_a_manifest_of_another_version_or_with_outside_names_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "run", "hello")
    file = tmp_path / "run" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(CorruptFileError, match="version 1, got sae-apps-folder version 2"):
        verify_folder(tmp_path / "run")
    entry = manifest["files"]["a.txt"]
    file.write_text(json.dumps(manifest | {"files": {"../a.txt": entry}}))
    with pytest.raises(CorruptFileError, match="names inside the folder"):
        verify_folder(tmp_path / "run")
    with pytest.raises(UserError, match="got nothing"):
        verify_folder(tmp_path / "absent")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write(tmp_path / "run", "old")

    def full(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store.os, "fsync", full)
    for action in (
        lambda: write(tmp_path / "run", "new", overwrite=True),
        lambda: atomic_write_text(tmp_path / "text", "new"),
    ):
        with pytest.raises(UserError, match="^The disk that holds .* is full"):
            action()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["run"]
    verify_folder(tmp_path / "run")


def test_a_forbidden_folder_is_named_and_other_errors_pass(tmp_path: Path) -> None:
    for code in (errno.EACCES, errno.EROFS):
        with pytest.raises(UserError, match=f"in the folder {tmp_path}"), disk_errors(tmp_path):
            raise OSError(code, os.strerror(code), str(tmp_path / "x"))
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "absent").read_text()


@pytest.fixture
def tiny_disk(tmp_path: Path):
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command: a really full disk cannot be made here")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # a failed test holds files


def test_a_really_full_disk_leaves_the_old_folder(tiny_disk: Path) -> None:
    write(tiny_disk / "run", "old")
    big = np.arange(200_000, dtype=np.float32)
    table = pa.table({"row_id": np.arange(1), "text": ["x"]})
    wide = SparseFeatures(sparse.csr_array(big[None] + 1), table, ORIGIN)
    writers = [
        lambda temp: (temp / "x").write_bytes(big.tobytes()),
        lambda temp: torch.save(torch.from_numpy(big), temp / "x.pt"),
        lambda temp: np.save(temp / "x.npy", big),
    ]
    for writer in writers:
        with (
            pytest.raises(UserError, match="^The disk that holds .* is full"),
            atomic_folder(tiny_disk / "run", overwrite=True) as temp,
        ):
            writer(temp)
    with pytest.raises(UserError, match="^The disk that holds .* is full"):
        save_features(tiny_disk / "features", wide)
    log = tiny_disk / "log.jsonl"
    with pytest.raises(UserError, match="^The disk that holds .* is full"):
        for step in range(100):
            append_jsonl(log, {"step": step, "text": "x" * 9_000})
    assert all(json.loads(line) for line in log.read_text().splitlines())
    assert sorted(os.listdir(tiny_disk)) == ["log.jsonl", "run"]
    verify_folder(tiny_disk / "run")


def test_a_text_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "results.json"
    atomic_write_text(path, "één\r\n")
    assert path.read_bytes() == "één\r\n".encode()

    def interrupt(src: Path, dst: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_text(path, "two")
    assert os.listdir(path.parent) == ["results.json"] and path.read_text()[0] == "é"


def test_jsonl_grows_line_by_line_and_refuses_nan(tmp_path: Path) -> None:
    for step in range(3):
        append_jsonl(tmp_path / "log.jsonl", {"step": step, "note": "a\nb"})
    with pytest.raises(ValueError, match="JSON"):
        append_jsonl(tmp_path / "log.jsonl", {"fvu": float("nan")})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": i, "note": "a\nb"} for i in range(3)]


@settings(max_examples=25)
@given(features())
def test_features_come_back_equal(tmp_path_factory: pytest.TempPathFactory, saved) -> None:
    folder = tmp_path_factory.mktemp("round") / "features"
    save_features(folder, saved)
    loaded = load_features(folder)
    assert loaded.acts.shape == saved.acts.shape and loaded.acts.dtype == np.float32
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(loaded.acts, name), getattr(saved.acts, name))
    assert loaded.rows.equals(saved.rows) and loaded.provenance == saved.provenance


def small() -> SparseFeatures:
    table = pa.table({"row_id": [7, 3], "text": ["a", "b"]})
    acts = sparse.csr_array(np.array([[0, 1, 2], [3, 0, 0]], dtype=np.float32))
    return SparseFeatures(acts, table, ORIGIN)


@pytest.mark.parametrize("name", ["features.safetensors", "rows.parquet", "provenance.json"])
def test_a_flipped_bit_is_found_in_any_file(tmp_path: Path, name: str) -> None:
    save_features(tmp_path / "f", small())
    content = bytearray((tmp_path / "f" / name).read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "f" / name).write_bytes(content)
    with pytest.raises(CorruptFileError, match=f"{name} was altered"):
        load_features(tmp_path / "f")


def test_a_folder_of_something_else_holds_no_features(tmp_path: Path) -> None:
    write(tmp_path / "run", "hello")
    with pytest.raises(CorruptFileError, match="expected features.safetensors"):
        load_features(tmp_path / "run")
    save_features(tmp_path / "f", small())
    with pytest.raises(UserError, match="already holds files"):
        save_features(tmp_path / "f", small())
    save_features(tmp_path / "f", small(), overwrite=True)
