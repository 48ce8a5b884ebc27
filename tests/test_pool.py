"""A pool on disk: killed anywhere it goes on to the same bits; it is never mixed with another."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_embed import HOOK_POINT, perfect_sae, with_template

from sae_apps.selection.embed import EmbedConfig, Encoder, encode
from sae_apps.selection.instructions import InstructionRow, InstructionSource, source_from_rows
from sae_apps.selection.pool import (
    PoolFeatures,
    is_pool,
    open_pool,
    write_pool,
    write_shard,
)
from sae_core.errors import CorruptFileError, UserError
from sae_core.sae import save_sae

ROOT = Path(__file__).resolve().parents[1]
ANIMALS = ("dog", "cat", "bird", "frog", "cow")


def animal_rows(n: int) -> list[InstructionRow]:
    return [
        InstructionRow(
            10 * i,
            f"Tell me about a {ANIMALS[i % 5]}.",
            f"Once there was a {ANIMALS[i % 5]}. " * (1 + i % 3),
            ANIMALS[i % 5],
        )
        for i in range(n)
    ]


ROWS = animal_rows(11)
SOURCE = source_from_rows("animals", ROWS)


class Killed(BaseException):
    """As a signal ends a program: nothing catches it."""


@pytest.fixture(scope="module")
def encoder(tiny_lm) -> Encoder:
    return Encoder(with_template(tiny_lm), perfect_sae(), HOOK_POINT, EmbedConfig(window_rows=2))


def digests(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def whole(encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "pool"
    write_pool(encoder, SOURCE, folder, shard_rows=4)
    return folder


def test_a_pool_is_its_rows_in_shards(encoder, whole) -> None:
    pool = open_pool(whole)
    at_once = encode(encoder, ROWS)
    assert [shard.n_rows for shard in pool] == pool.sizes() == [4, 4, 3]
    assert pool.rows()["row_id"].to_pylist() == [row.row_id for row in ROWS]
    assert pool.rows()["n_tokens"].to_pylist() == at_once.rows["length"].to_pylist()
    dense = np.concatenate([shard.acts.toarray() for shard in pool])
    np.testing.assert_allclose(dense, at_once.acts.toarray(), atol=1e-4)
    assert [g for shard in pool for g in shard.rows["group"].to_pylist()] == [r.group for r in ROWS]
    facts = pool.manifest
    assert facts["identity"] == encoder.identity() and facts["source"] == pool.source == "animals"
    assert facts["fvu"] == pytest.approx(0, abs=1e-6)
    assert (facts["n_rows"], facts["n_shards"], facts["without_text"]) == (11, 3, 0)
    assert pool.d_sae == 128 and pool.provenance.sae_hash == encoder.sae.hash()


@pytest.mark.parametrize("windows_done", [0, 1, 2, 3, 5])
def test_a_pool_killed_within_or_between_shards_ends_the_same(
    encoder, whole, tmp_path, windows_done: int
) -> None:
    left = [windows_done]

    def kill(n_rows: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    with pytest.raises(Killed):
        write_pool(encoder, SOURCE, tmp_path / "pool", shard_rows=4, progress=kill)
    n_shards = len(list((tmp_path / "pool").glob("shard-*")))
    assert n_shards == windows_done // 2, "two windows a shard; the shard at work is lost"
    with pytest.raises(UserError, match=f"finished pool at .*, got one with {n_shards} shards"):
        open_pool(tmp_path / "pool")
    counts: list[int] = []
    got = write_pool(encoder, SOURCE, tmp_path / "pool", shard_rows=4, progress=counts.append)
    assert counts == [4] * n_shards + [2, 2, 2, 2, 2, 1][2 * n_shards :], "kept ones at once"
    assert digests(tmp_path / "pool") == digests(whole)
    assert got.manifest == open_pool(whole).manifest


KILL_AT_ONCE = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[3], sys.argv[3] + "/tests"]
from sae_core import store
from sae_apps.selection.embed import EmbedConfig, load_encoder
from sae_apps.selection.pool import write_pool
from test_pool import SOURCE
from test_embed import with_template
from dataclasses import replace

encoder = load_encoder(sys.argv[1], config=EmbedConfig(window_rows=2))
encoder = replace(encoder, lm=with_template(encoder.lm))
rename = os.replace
def killed(source, target):
    if "shard-00001" in str(target):  # all is written but the name
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
store.os.replace = killed
write_pool(encoder, SOURCE, sys.argv[2], shard_rows=4)
"""


def test_a_pool_killed_by_a_signal_ends_the_same(encoder, whole, tmp_path) -> None:
    lm = encoder.lm
    facts = {"hook_point": HOOK_POINT, "model_id": lm.model_id, "model_revision": lm.revision}
    save_sae(tmp_path / "sae", encoder.sae, facts)
    folder = tmp_path / "pool"
    command = [sys.executable, "-c", KILL_AT_ONCE, str(tmp_path / "sae"), str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(p.name for p in folder.glob("shard-*")) == ["shard-00000"]
    assert len(list(folder.glob(".shard-00001.*"))) == 1, "control: unfinished work was left"
    write_pool(encoder, SOURCE, folder, shard_rows=4)
    assert digests(folder) == digests(whole)


def test_workers_make_the_same_pool_shard_by_shard(encoder, whole, tmp_path) -> None:
    folder = tmp_path / "pool"
    assert write_pool(encoder, SOURCE, folder, shard_rows=4, only=()).shards == ()
    assert is_pool(folder) and [p.name for p in folder.iterdir()] == ["pool.json"]
    second = write_pool(encoder, SOURCE, folder, shard_rows=4, only={2, 9})
    assert second.sizes() == [3]
    write_shard(encoder, ROWS[4:8], folder, 1, SOURCE.id)
    assert sorted(p.name for p in folder.glob("shard-*")) == ["shard-00001", "shard-00002"]
    write_pool(encoder, SOURCE, folder, shard_rows=4)
    assert digests(folder) == digests(whole)
    assert write_pool(encoder, SOURCE, folder, shard_rows=4, only={0}).sizes() == [4]


def test_a_finished_pool_is_not_read_again(encoder, whole) -> None:
    def fail() -> None:
        raise AssertionError

    unread = InstructionSource("animals", fail)  # pyright: ignore[reportArgumentType]
    assert write_pool(encoder, unread, whole, shard_rows=4).sizes() == [4, 4, 3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sae": perfect_sae(seed=1)}, "sae_hash is '.*' there and '.*' here"),
        ({"config": EmbedConfig(window_rows=2, span="prompt")}, "embed.span is 'all' there and "),
        ({"hook_point": "layers.1.out"}, "hook_point is 'layers.2.out' there and 'layers.1.out'"),
    ],
)
def test_a_pool_of_another_encoder_is_refused(encoder, whole, change, said: str) -> None:
    before = digests(whole)
    with pytest.raises(UserError, match=f"already holds another pool: {said}"):
        write_pool(replace(encoder, **change), SOURCE, whole, shard_rows=4)
    assert digests(whole) == before


def test_a_pool_of_other_rows_or_shards_is_refused(encoder, whole) -> None:
    with pytest.raises(UserError, match="source is 'animals' there and 'plants' here"):
        write_pool(encoder, source_from_rows("plants", ROWS), whole, shard_rows=4)
    with pytest.raises(UserError, match="shard_rows is 4 there and 5 here"):
        write_pool(encoder, SOURCE, whole, shard_rows=5)


def test_bad_pools_are_refused(encoder, tmp_path) -> None:
    with pytest.raises(UserError, match="at least one row in the pool nothing, got none"):
        write_pool(encoder, source_from_rows("nothing", []), tmp_path / "empty")
    assert not (tmp_path / "empty").exists(), "nothing is left behind"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="got a folder with other files"):
        write_pool(encoder, SOURCE, tmp_path / "full")
    with pytest.raises(UserError, match="shard_rows of at least 1, got 0"):
        write_pool(encoder, SOURCE, tmp_path / "none", shard_rows=0)
    with pytest.raises(UserError, match=r"Expected a pool with a pool.json at .*, got nothing"):
        open_pool(tmp_path / "none")
    wrong = perfect_sae()
    with torch.no_grad():
        wrong.W_dec.neg_()
    with pytest.raises(UserError, match="Expected an SAE trained on layers.2.out .*FVU below 1"):
        write_pool(replace(encoder, sae=wrong), SOURCE, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="at least one row, got none"):
        PoolFeatures.of()


def test_ids_that_stand_in_two_shards_are_refused(encoder, tmp_path) -> None:
    double = source_from_rows("double", [*ROWS, ROWS[0]])
    with pytest.raises(UserError, match="every row_id once, got 0 2 times"):
        write_pool(encoder, double, tmp_path / "pool", shard_rows=4)
    assert not (tmp_path / "pool" / "finished.json").exists()


def test_a_damaged_pool_is_noticed(encoder, tmp_path) -> None:
    folder = tmp_path / "pool"
    pool = write_pool(encoder, SOURCE, folder, shard_rows=8)
    file = folder / "shard-00001" / "features.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CorruptFileError, match="features.safetensors was altered"):
        list(pool)
    rows = pq.read_table(folder / "shard-00000" / "rows.parquet")
    pq.write_table(rows.drop(["row_id"]), folder / "shard-00000" / "rows.parquet")
    with pytest.raises(CorruptFileError, match="rows.parquet: expected a table of rows, got KeyE"):
        pool.rows()
    (folder / "shard-00001").rename(tmp_path / "away")
    with pytest.raises(CorruptFileError, match="shard-00001 is missing: expected 2 shards"):
        open_pool(folder)
    (folder / "finished.json").write_text("[1")
    with pytest.raises(CorruptFileError, match=r"finished.json: expected a JSON object"):
        open_pool(folder)
    manifest = json.loads((folder / "pool.json").read_text())
    (folder / "pool.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(UserError, match="sae-apps-pool version 1, got sae-apps-pool version 99"):
        open_pool(folder)


def test_records_without_text_are_counted(encoder, tmp_path) -> None:
    from sae_apps.selection.instructions import open_instructions

    records = [{"prompt": "The dog ran.", "response": "Yes."}, {"prompt": " ", "response": ""}]
    pool = write_pool(encoder, open_instructions(records * 3), tmp_path / "pool", shard_rows=2)
    assert pool.manifest["without_text"] == 3 and pool.sizes() == [2, 1]
    assert pool.rows()["row_id"].to_pylist() == [0, 2, 4], "ids are places in the data"


def test_features_in_memory_are_a_pool(encoder) -> None:
    pool = PoolFeatures.of(encode(encoder, ROWS[:3]), encode(encoder, ROWS[3:5]))
    assert pool.sizes() == [3, 2] and pool.rows().num_rows == 5
    with pytest.raises(UserError, match="every row_id once, got 0 2 times"):
        PoolFeatures.of(encode(encoder, ROWS[:3]), encode(encoder, ROWS[:1])).rows()
