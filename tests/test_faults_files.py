"""Damage at any place of what stands alone (journal, run.json, tables), limits, two writers."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.faults_flip import KINDS, REGIONS, damaged, draw
from benchmarks.faults_process import is_clear, left_over
from sae_core.activations import Activations
from sae_core.disk import disk_errors, only_writer
from sae_core.errors import CorruptFileError, UserError
from sae_core.shard_folder import Journal, read_manifest
from sae_core.tokens import Cursor

POINT = "layers.0.out"
SETTINGS = {"hook_points": [POINT], "dtype": "float32", "model_id": "m"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished harvest of two shards, made without a model."""
    journal = Journal.open(tmp_path / "h", SETTINGS)
    journal.start()
    for number in range(2):
        x = torch.arange(12.0).reshape(6, 2) + number
        part = Activations(x, torch.arange(6) + 6 * number, torch.zeros(6, dtype=torch.int32))
        journal.add([{POINT: part}], Cursor(6 * (number + 1), 0))
    journal.finish()
    return tmp_path / "h"


def flipped(file: Path, place: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.unlink()
    file.write_bytes(content)


def test_any_flipped_bit_of_a_stored_shard_stops_the_run_that_continues(folder: Path) -> None:
    """Training maps shards without reading them first: what the disk changed must not be fed."""
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    assert Journal.open(folder, SETTINGS).shards == read_manifest(folder)["shards"]
    size = (folder / "shard-00001.safetensors").stat().st_size
    for is_finished in (True, False):
        if not is_finished:
            (folder / "manifest.json").unlink()
        for place in range(0, size, 7):
            flipped(folder / "shard-00001.safetensors", place, place % 8)
            with pytest.raises(CorruptFileError, match=r"shard-00001.safetensors was altered"):
                Journal.open(folder, SETTINGS)
            shutil.copy(whole / "shard-00001.safetensors", folder)


def test_any_flipped_bit_of_the_journal_is_refused_or_changes_nothing(folder: Path) -> None:
    """A digit of `rows` is where a resumed harvest goes on reading."""
    (folder / "manifest.json").unlink()
    file = folder / "progress.jsonl"
    content = file.read_bytes()
    expected = Journal.open(folder, SETTINGS).shards
    n_refused = 0
    for place in range(len(content) - 1):
        flipped(file, place, place % 7)
        try:
            found = Journal.open(folder, SETTINGS).shards
        except UserError as error:
            n_refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600
        else:
            assert found == expected[: len(found)], place  # the end may look cut: it is made anew
        file.write_bytes(content)
    assert n_refused > 0.9 * len(content)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../shard-00000.safetensors"},
        {"file": "/etc/passwd"},
        {"file": ".."},
        {"tokens": -1},
        {"tokens": "6"},
        {"bytes": 1.5},
        {"rows": None},
        {"more": 1},
    ],
)
def test_a_manifest_by_somebody_else(folder: Path, change: dict) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["seal"]
    manifest["shards"][0] |= change
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match="manifest.json: expected"):
        read_manifest(folder)


@pytest.mark.parametrize("points", [[], "layers.0.out", [["a"]], [1], None])
def test_a_manifest_without_hook_points(folder: Path, points: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["seal"]
    manifest["settings"]["hook_points"] = points
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if points == []:
        assert read_manifest(folder)["settings"]["hook_points"] == []
        return
    with pytest.raises(CorruptFileError, match="manifest.json: expected a manifest"):
        read_manifest(folder)


# --- limits and locks ---------------------------------------------------------------------------


def test_the_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    told = r"the limit on the size of files.*ulimit -f"
    with pytest.raises(UserError, match=told), disk_errors(tmp_path / "a"):
        raise OSError(errno.EFBIG, "File too large")
    with pytest.raises(UserError, match=told), disk_errors(tmp_path / "a"):
        raise OSError("300 requested and 12 written")  # numpy's, without a code
    with pytest.raises(UserError, match=told), disk_errors(tmp_path / "a"):
        raise RuntimeError("I/O error: File too large (os error 27)")  # safetensors'
    with pytest.raises(OSError, match="300 requested"), disk_errors(tmp_path / "a"):
        raise OSError("300 requested")


def test_one_writer_at_a_time_and_a_kill_frees_the_folder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sae_core.disk import only_writer\n"
        "with only_writer(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)\n"
    )
    place = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        told = "got another process at work there"
        with pytest.raises(UserError, match=told), only_writer(place):
            raise AssertionError
        other.kill()
    with only_writer(place):
        assert os.listdir(place) == []  # the lock leaves nothing behind
    with only_writer(place):
        pass


# --- the suite's own parts ----------------------------------------------------------------------


def test_damages_are_what_their_names_say(tmp_path: Path) -> None:
    content = bytes(range(1, 201)) * 20
    assert sum(a != b for a, b in zip(content, damaged(content, "flip", 9, 3), strict=True)) == 1
    assert damaged(content, "flip", 9, 3)[9] == content[9] ^ 8
    assert damaged(content, "cut", 9, 3) == content[:9]
    assert damaged(content, "grown", 9, 3)[: len(content)] == content
    zeroed = damaged(content, "zeros", 100, 0)
    assert len(zeroed) == len(content) and zeroed.count(0) == 512
    (tmp_path / "a").write_bytes(content)
    drawn = draw([tmp_path / "a"], tmp_path, 400, np.random.default_rng(0))
    assert {kind for _, kind, *_ in drawn} == set(KINDS) and {r for *_, r, _, _ in drawn} == set(
        REGIONS
    )
    assert all(place >= len(content) - 256 for _, _, region, place, _ in drawn if region == "tail")
    assert all(place < 64 for _, _, region, place, _ in drawn if region == "head")


def test_what_counts_as_a_clear_message_and_as_left_over(tmp_path: Path) -> None:
    assert is_clear("some progress\nsae-apps: error: Expected a, got b.\n")
    assert not is_clear("sae-apps: error: a\nTraceback (most recent call last):\n")
    assert not is_clear("sae-apps: error: a\nsae-apps: error: b\n") and not is_clear("")
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.tmp-12-0123456789abcdef").mkdir()
    (tmp_path / "out" / ".shard-00000.safetensors.tmp").touch()
    assert len(left_over(tmp_path, ["out"])) == 2
