"""Activations on disk: the same bytes after any kill, damage found and named, random access."""

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sae_core.activations import HarvestConfig, replace_activations, stream_activations
from sae_core.buffer import batches
from sae_core.errors import CorruptFileError, UserError
from sae_core.harvest import harvest_shards
from sae_core.models import LanguageModel
from sae_core.shards import ShardedActivations
from sae_core.text import TextSource, rows_from_texts

POINTS = ["layers.2.out", "layers.1.mlp.in"]
CONFIG = HarvestConfig(context_size=32, batch_tokens=128, window_rows=4)
SHARD_TOKENS = 200
# one row is longer than a window, so that shards also end inside a row
ROWS = rows_from_texts(
    [f"Once there was a dog {'and a cat ' * (n % 7)}in house {n}." for n in range(20)]
    + ["They were happy. " * 90]
    + [f"The end of {n}." for n in range(6)]
)

# Harvests into argv[1:], one folder a kill point; each run is a process of its own that really gets
# SIGKILL, before or after the n-th time that it syncs, renames or reports, or in half a line.
KILLER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_shards import CONFIG, POINTS, ROWS, SHARD_TOKENS, harvest_shards
from sae_core.models import load_model

lm = load_model({model!r})

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def deadly(name, n, after):
    real, calls = getattr(os, name), []
    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == n and not after:
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            die()
        result = real(*args, **kwargs)
        if len(calls) == n:
            die()
        return result
    setattr(os, name, call)

for folder in map(Path, sys.argv[1:]):
    name, n, after = folder.name.split("-")
    child = os.fork()
    if child == 0:
        seen = []
        def progress(tokens):
            seen.append(tokens)
            if name == "progress" and len(seen) == int(n):
                die()
        if name != "progress":
            deadly(name, int(n), after == "after")
        harvest_shards(lm, ROWS, POINTS, folder, CONFIG, shard_tokens=SHARD_TOKENS,
                       data_id="rows", progress=progress)
        os._exit(0)
    print(folder.name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLS = [
    "fsync-1-before",  # the journal is not there yet
    "replace-1-after",  # the journal has its settings, no shard
    "progress-2-x",  # in the middle of the first shard
    "replace-2-before",  # the first shard has no name yet
    "replace-2-after",  # the first shard is there, its line is not
    "write-1-before",  # half a line
    "write-1-after",
    "progress-12-x",  # within a later shard
    "replace-5-after",
    "write-5-before",
]


def harvest(lm: LanguageModel, folder: Path, **options) -> dict[str, ShardedActivations]:
    settings = {"shard_tokens": SHARD_TOKENS, "data_id": "rows", "config": CONFIG, **options}
    rows, points = settings.pop("rows", ROWS), settings.pop("points", POINTS)
    return harvest_shards(lm, rows, points, folder, settings.pop("config"), **settings)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.fixture(scope="module")
def whole(tiny_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harvest") / "whole"
    harvest(tiny_lm, folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# --- what is written ----------------------------------------------------------------------------


def test_the_files_hold_the_stream(tiny_lm: LanguageModel, whole: Path) -> None:
    """safetensors' own reader is the oracle of the format."""
    parts = list(stream_activations(tiny_lm, ROWS, POINTS, CONFIG))
    files = sorted(whole.glob("*.safetensors"))
    assert len(files) > 3
    read: dict[str, list[torch.Tensor]] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - no mapping
                read.setdefault(key, []).append(shard.get_tensor(key))
    assert set(read) == {*POINTS, "row_id", "position"}
    for name in POINTS:
        assert torch.equal(torch.cat(read[name]), torch.cat([p[name].x for p in parts]))
    for key in ("row_id", "position"):
        want = torch.cat([getattr(p[POINTS[0]], key) for p in parts])
        assert torch.equal(torch.cat(read[key]), want) and read[key][0].dtype == want.dtype


def test_the_manifest_describes_them(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert {s["file"]: s["sha256"] for s in manifest["shards"]} == {
        name: digest for name, digest in digests(whole).items() if name.endswith(".safetensors")
    }
    assert manifest["n_tokens"] == sum(s["tokens"] for s in manifest["shards"])
    assert all(s["tokens"] >= SHARD_TOKENS for s in manifest["shards"][:-1])
    assert manifest["settings"]["hook_points"] == POINTS
    assert any(s["chunks"] for s in manifest["shards"]), "no shard ends inside the long row"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_are_rounded_once(
    tiny_lm: LanguageModel, whole: Path, tmp_path: Path, dtype: str
) -> None:
    full = ShardedActivations.open(whole, POINTS[0])
    narrow = harvest(tiny_lm, tmp_path / "narrow", dtype=dtype)[POINTS[0]]
    everything = torch.arange(full.n_tokens)
    assert narrow.dtype == getattr(torch, dtype)
    assert torch.equal(narrow.gather(everything).x, full.gather(everything).x.to(narrow.dtype))


def test_max_tokens_is_exact(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    for n in (1, 450):
        got = harvest(tiny_lm, tmp_path / str(n), config=replace(CONFIG, max_tokens=n))
        assert got[POINTS[0]].n_tokens == n


def test_progress_counts_tokens(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    seen: list[int] = []
    got = harvest(tiny_lm, tmp_path / "x", progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == got[POINTS[0]].n_tokens


# --- killed and resumed -------------------------------------------------------------------------


def test_a_killed_run_ends_with_the_same_bytes(
    tiny_lm: LanguageModel, whole: Path, stories260k: Path, tmp_path: Path
) -> None:
    script = KILLER.format(tests=str(Path(__file__).parent), model=str(stories260k))
    folders = [tmp_path / kill for kill in KILLS]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    want = [f"{kill} {-signal.SIGKILL}" for kill in KILLS]
    assert done.stdout.split("\n")[:-1] == want, done.stderr
    finished = []
    for folder in folders:
        assert not (folder / "manifest.json").exists()
        finished.append(len(list(folder.glob("shard-*"))))
        harvest(tiny_lm, folder)
        assert digests(folder) == digests(whole), folder.name
    # the kills hit different stages: nothing yet, one shard, several
    assert finished[:5] == [0, 0, 0, 0, 1] and max(finished) >= 4


def test_resuming_runs_the_model_only_on_what_is_missing(
    tiny_lm: LanguageModel, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    lines = (whole / "progress.jsonl").read_text().splitlines(keepends=True)
    kept = json.loads((whole / "manifest.json").read_text())["shards"][:-1]
    (folder / "progress.jsonl").write_text("".join(lines[:-1]))
    for shard in kept:
        shutil.copy(whole / shard["file"], folder)
    before = {shard["file"]: (folder / shard["file"]).stat().st_mtime_ns for shard in kept}
    seen: list[int] = []
    harvest(tiny_lm, folder, progress=seen.append)
    assert min(seen) > sum(shard["tokens"] for shard in kept)
    assert {f: (folder / f).stat().st_mtime_ns for f in before} == before
    assert digests(folder) == digests(whole)


def test_max_tokens_counts_over_a_resume(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    config = replace(CONFIG, max_tokens=700)
    harvest(tiny_lm, tmp_path / "a", config=config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    lines = (tmp_path / "b" / "progress.jsonl").read_text().splitlines(keepends=True)
    for keep in (1, 2, len(lines)):
        (tmp_path / "b" / "manifest.json").unlink()
        (tmp_path / "b" / "progress.jsonl").write_text("".join(lines[:keep]))
        got = harvest(tiny_lm, tmp_path / "b", config=config)
        assert got[POINTS[0]].n_tokens == 700
        assert digests(tmp_path / "b") == digests(tmp_path / "a")


def test_a_complete_folder_is_returned_without_the_model(
    tiny_lm: LanguageModel, copy: Path
) -> None:
    def never(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model ran")

    before = digests(copy)
    with replace_activations(tiny_lm, "layers.0.in", never):
        harvest(tiny_lm, copy)
    assert digests(copy) == before


# --- folders that belong to something else ------------------------------------------------------


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": ["layers.1.out"]}, "hook_points = .*layers.2.out.*layers.1.out"),
        ({"dtype": "bfloat16"}, "dtype = 'float32', this one has dtype = 'bfloat16'"),
        ({"data_id": "other"}, "data_id = 'rows', this one has data_id = 'other'"),
        ({"shard_tokens": 100}, "shard_tokens = 200.*100"),
        ({"config": replace(CONFIG, context_size=16)}, "context_size = 32.*16"),
        ({"config": replace(CONFIG, max_tokens=9)}, "max_tokens = None.*9"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(
    tiny_lm: LanguageModel, copy: Path, change: dict, message: str, complete: bool
) -> None:
    if not complete:
        (copy / "manifest.json").unlink()
    before = digests(copy)
    with pytest.raises(UserError, match=message):
        harvest(tiny_lm, copy, **change)
    assert digests(copy) == before


def test_another_revision_is_refused(tiny_lm: LanguageModel, copy: Path) -> None:
    with pytest.raises(UserError, match="revision = .*this one has revision = 'abc'"):
        harvest(replace(tiny_lm, revision="abc"), copy)


def test_a_folder_with_other_files_is_refused(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="new or empty folder"):
        harvest(tiny_lm, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_input_writes_nothing(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    n = 10**6
    cases: list[tuple[dict, str]] = [
        ({"config": replace(CONFIG, max_tokens=n)}, f"asked for {n} tokens, the text has only"),
        ({"points": ["layers.9.out"]}, r"layer must be in 0\.\.4, got 9"),
        ({"points": []}, "at least one hook point"),
        ({"dtype": "int8"}, "float32, bfloat16, float16, got 'int8'"),
        ({"shard_tokens": 0}, "at least 1, got 0"),
        ({"rows": iter(list(ROWS))}, "read again.*iterator"),
        ({"rows": list(ROWS), "data_id": None}, "needs data_id"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            harvest(tiny_lm, tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()


def test_a_text_without_tokens(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'rows' has no token"):
        harvest(tiny_lm, tmp_path / "new", rows=rows_from_texts(["", ""]))
    assert not (tmp_path / "new").exists()


def test_nan_names_the_row_and_keeps_the_finished_shards(
    tiny_lm: LanguageModel, whole: Path, tmp_path: Path
) -> None:
    broken = TextSource("rows", lambda: (row for row in ROWS))
    n_passes = 0

    def spoil(x: torch.Tensor) -> torch.Tensor:
        nonlocal n_passes
        n_passes += 1
        return torch.full_like(x, torch.nan) if n_passes == 12 else x

    with (
        replace_activations(tiny_lm, "layers.1.out", spoil),
        pytest.raises(UserError, match=r"nan .* in row_id \d+ at token position \d+"),
    ):
        harvest(tiny_lm, tmp_path / "x", rows=broken)
    assert list((tmp_path / "x").glob("shard-*"))
    harvest(tiny_lm, tmp_path / "x")
    assert digests(tmp_path / "x") == digests(whole)


def test_a_full_disk_is_one_sentence_and_can_be_resumed(
    tiny_lm: LanguageModel, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_core import disk

    calls = 0

    def full(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", full)
        with pytest.raises(UserError, match="disk that holds .* is full"):
            harvest(tiny_lm, tmp_path / "x")
    assert not list((tmp_path / "x").glob("*.tmp")) + list((tmp_path / "x").glob(".*.tmp"))
    harvest(tiny_lm, tmp_path / "x")
    assert digests(tmp_path / "x") == digests(whole)


# --- damage -------------------------------------------------------------------------------------


def test_a_truncated_or_missing_shard_is_named(tiny_lm: LanguageModel, copy: Path) -> None:
    victim = copy / "shard-00001.safetensors"
    whole_bytes = victim.read_bytes()
    others = {k: v for k, v in digests(copy).items() if k != victim.name}
    for damage in (lambda: victim.write_bytes(whole_bytes[:-1]), victim.unlink):
        damage()
        for act in (
            lambda: ShardedActivations.open(copy, POINTS[0]),
            lambda: harvest(tiny_lm, copy),
        ):
            with pytest.raises(CorruptFileError, match="shard-00001.safetensors"):
                act()
    assert digests(copy) == others
    victim.write_bytes(whole_bytes)
    ShardedActivations.open(copy, POINTS[0], verify=True)


def test_a_changed_bit_is_found_by_verify(copy: Path) -> None:
    victim = copy / "shard-00002.safetensors"
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    ShardedActivations.open(copy, POINTS[0])  # the size alone is right
    with pytest.raises(CorruptFileError, match="shard-00002.safetensors was altered"):
        ShardedActivations.open(copy, POINTS[0], verify=True)


def test_a_spoilt_header_is_named(copy: Path) -> None:
    victim = copy / "shard-00000.safetensors"
    data = bytearray(victim.read_bytes())
    for spoilt in (b"\xff" * 8 + bytes(data[8:]), bytes(data[:8]) + b"x" * 40 + bytes(data[48:])):
        victim.write_bytes(spoilt)
        with pytest.raises(CorruptFileError, match="shard-00000.safetensors"):
            ShardedActivations.open(copy, POINTS[0])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("manifest.json", "{"),
        ("manifest.json", "[]"),
        ("manifest.json", '{"format": "other", "version": 1, "settings": {}, "n_tokens": 1}'),
        ("progress.jsonl", "{}x\n{}\n"),
        ("progress.jsonl", "\n"),
    ],
)
def test_a_spoilt_manifest_or_journal_is_named(
    tiny_lm: LanguageModel, copy: Path, file: str, text: str
) -> None:
    if file != "manifest.json":
        (copy / "manifest.json").unlink()
    (copy / file).write_text(text)
    with pytest.raises(CorruptFileError, match=file):
        harvest(tiny_lm, copy)


def test_two_writers_in_one_folder_are_noticed(tiny_lm: LanguageModel, copy: Path) -> None:
    (copy / "manifest.json").unlink()
    journal = copy / "progress.jsonl"
    journal.write_text(journal.read_text() + journal.read_text().splitlines()[-1] + "\n")
    with pytest.raises(CorruptFileError, match="two runs"):
        harvest(tiny_lm, copy)


def test_opening_what_is_not_there(whole: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds the hook points layers.2.out, .*'layers.3.out'"):
        ShardedActivations.open(whole, "layers.3.out")
    with pytest.raises(UserError, match="none"):
        ShardedActivations.open(tmp_path / "nowhere", POINTS[0])
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        ShardedActivations.open(copy, POINTS[0])


# --- reading ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(whole: Path) -> ShardedActivations:
    return ShardedActivations.open(whole, POINTS[1])


@pytest.fixture(scope="module")
def everything(tiny_lm: LanguageModel) -> dict[str, torch.Tensor]:
    parts = [v[POINTS[1]] for v in stream_activations(tiny_lm, ROWS, POINTS, CONFIG)]
    return {k: torch.cat([getattr(p, k) for p in parts]) for k in ("x", "row_id", "position")}


@pytest.mark.parametrize(
    "choose",
    [
        lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(0)),
        lambda n: torch.tensor([n - 1, 0, n // 2, 0, n - 1]),
        lambda n: torch.tensor([3]),
        lambda n: torch.zeros(0, dtype=torch.int64),
    ],
)
def test_gather_is_indexing(
    stored: ShardedActivations,
    everything: dict[str, torch.Tensor],
    choose: Callable[[int], torch.Tensor],
) -> None:
    index = choose(stored.n_tokens)
    got = stored.gather(index)
    for key, want in everything.items():
        assert torch.equal(getattr(got, key), want[index])


def test_indices_out_of_range(stored: ShardedActivations) -> None:
    for bad in (-1, stored.n_tokens):
        with pytest.raises(UserError, match=rf"0\.\.{stored.n_tokens - 1}, got .*{bad}"):
            stored.gather(torch.tensor([0, bad]))


def test_sequential_reading(
    stored: ShardedActivations, everything: dict[str, torch.Tensor]
) -> None:
    parts = list(stored.iter_sequential(150))
    assert [len(p) for p in parts[:-1]] == [150] * (len(parts) - 1)
    assert torch.equal(torch.cat([p.x for p in parts]), everything["x"])
    with pytest.raises(UserError, match="at least 1, got 0"):
        next(stored.iter_sequential(0))


def test_reading_is_by_map_and_results_do_not_share_it(stored: ShardedActivations) -> None:
    assert all(isinstance(m, np.memmap) and m.mode == "r" for maps in stored.maps for m in maps)
    first = stored.gather(torch.arange(5)).x
    first += 1  # a result may be changed: the file may not
    assert not torch.equal(first, stored.gather(torch.arange(5)).x)


def test_batches_shuffle_the_shards(
    stored: ShardedActivations, everything: dict[str, torch.Tensor]
) -> None:
    n = stored.n_tokens
    got = list(batches(stored, n // 3, seed=0, epochs=3))
    assert len(got) == 3 * n // (n // 3)
    seen = torch.cat([torch.stack([b.row_id, b.position.long()], 1) for b in got])[:n]
    want = torch.stack([everything["row_id"], everything["position"].long()], 1)
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, want.tolist()))
    assert not torch.equal(seen, want)
