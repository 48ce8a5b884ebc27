"""Files made to hurt: each is refused in one sentence before it costs memory, time or trust."""

import gzip
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import sparse

from benchmarks.fuzz_corpus import reseal
from sae_core.described import read_described, write_described
from sae_core.errors import CorruptFileError, UserError, reason
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance
from sae_core.sae import SAE, SAEConfig, load_sae, save_sae
from sae_core.sealed import sealed, unsealed
from sae_core.shard_file import map_shard
from sae_core.store import load_features, save_features
from sae_core.text import read_text_file
from sae_core.untrusted import MAX_D_SAE, read_array, read_object, read_table

HUGE = 1 << 60
ORIGIN = Provenance("m", "r", "layers.0.out", "s", "d", "0", "v")


def header(path: Path, change: dict) -> None:
    """Change entries of a safetensors header and leave the data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = json.dumps(json.loads(content[8 : 8 + length]) | change).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.fixture
def features(tmp_path: Path) -> Path:
    acts = sparse.csr_array(np.array([[0, 1, 2], [3, 0, 0]], dtype=np.float32))
    table = pa.table({"row_id": [7, 3], "text": ["a", "b"]})
    save_features(tmp_path / "f", SparseFeatures(acts, table, ORIGIN))
    return tmp_path / "f"


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    save_sae(tmp_path / "sae", SAE(SAEConfig(d_in=4, d_sae=8, k=2)), {"hook_point": "x"})
    return tmp_path / "sae"


# --- sizes that a header claims -----------------------------------------------------------------


@pytest.mark.parametrize("d_sae", [HUGE, 1 << 34, 1 << 26])
def test_an_sae_that_claims_more_latents_than_its_file_holds(sae: Path, d_sae: int) -> None:
    config = json.loads((sae / "config.json").read_text())
    config["sae"]["d_sae"] = d_sae
    (sae / "config.json").write_text(json.dumps(config))
    reseal(sae)
    found = "W_enc \\[4, 8\\]" if d_sae == 1 << 26 else "d_sae must be at most 67108864"
    with pytest.raises(CorruptFileError, match=f"expected an SAE, got .*{found}"):
        load_sae(sae)


@pytest.mark.parametrize("shape", [[4, HUGE], [1 << 31, 1 << 31], [-1, 8], ["a"], [4]])
def test_tensors_of_another_shape(sae: Path, shape: list) -> None:
    path = sae / "sae.safetensors"
    header(path, {"W_enc": {"dtype": "F32", "shape": shape, "data_offsets": [0, 128]}})
    reseal(sae)
    with pytest.raises(CorruptFileError, match="expected an SAE"):
        load_sae(sae)


def test_features_of_more_latents_than_there_can_be(features: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = features / "features.safetensors"
    tensors = load_file(path)
    for n_rows, d_sae in ((2, HUGE), (2, MAX_D_SAE + 1), (HUGE, 3)):
        save_file(tensors | {"shape": np.array([n_rows, d_sae])}, path)
        reseal(features)
        with pytest.raises(CorruptFileError, match=f"a matrix of {n_rows} x {d_sae}"):
            load_features(features)


def test_a_shard_whose_header_is_longer_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "shard.safetensors"
    for length in (1 << 40, (1 << 63) - 1):
        file.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
        with pytest.raises(CorruptFileError, match=f"a header of {length} bytes"):
            map_shard(file, 1, "layers.0.out", "float32")


def test_an_array_that_claims_more_than_its_file_and_a_pickle(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    np.save(file, np.arange(4))
    good = file.read_bytes()
    with open(file, "wb") as out:
        claim = {"descr": "<i8", "fortran_order": False, "shape": (2 * HUGE,)}  # 2^64 = 0 bytes
        np.lib.format.write_array_header_1_0(out, claim)
        out.write(good[-32:])
    with pytest.raises(CorruptFileError, match="expected an array"):
        read_array(file)
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptFileError, match="expected an array"):
        read_array(file)
    file.write_bytes(pickle.dumps(np.arange(3)))
    with pytest.raises(CorruptFileError, match="expected an array"):
        read_array(file)
    file.write_bytes(good)
    assert read_array(file).tolist() == [0, 1, 2, 3]


def test_a_shard_whose_shape_has_no_bytes_in_64_bits(tmp_path: Path) -> None:
    """2^61 rows of 8 bytes are 0 modulo 2^64: mapped, the first read would crash the process."""
    from sae_core.activations import Activations
    from sae_core.shard_file import write_shard

    file = tmp_path / "s.safetensors"
    tokens = Activations(torch.ones(3, 2), torch.arange(3), torch.arange(3, dtype=torch.int32))
    write_shard(file, [{"layers.0.out": tokens}], "float32")
    assert len(map_shard(file, 3, "layers.0.out", "float32")[0]) == 3
    n = 1 << 61
    for name, kind, shape in (("layers.0.out", "F32", [n, 2]), ("row_id", "I64", [n])):
        content = file.read_bytes()
        header(file, {name: {"dtype": kind, "shape": shape, "data_offsets": [0, 24]}})
        with pytest.raises(CorruptFileError, match="expected a shard, got ValueError"):
            map_shard(file, n, "layers.0.out", "float32")
        file.write_bytes(content)


def test_shards_of_two_widths_and_an_offset_that_is_a_text(tmp_path: Path, tiny_lm) -> None:
    from sae_core.activations import Activations, HarvestConfig
    from sae_core.harvest import harvest_shards
    from sae_core.shard_file import write_shard
    from sae_core.shards import ShardedActivations
    from sae_core.text import rows_from_texts

    rows, point = rows_from_texts(["Once there was a dog. " * 9] * 4), "layers.0.out"
    folder = tmp_path / "stored"
    maps = harvest_shards(
        tiny_lm, rows, [point], folder, HarvestConfig(window_rows=1), shard_tokens=40
    )[point].maps
    assert len(maps) > 1
    file, n = folder / "shard-00001.safetensors", len(maps[1][0])
    keys = torch.arange(n), torch.arange(n, dtype=torch.int32)
    write_shard(file, [{point: Activations(torch.ones(n, 3), *keys)}], "float32")
    reseal(folder)
    with pytest.raises(CorruptFileError, match="shard-00001.*as in the first shard, got 3"):
        ShardedActivations.open(folder, point)
    header(file, {"row_id": {"dtype": "I64", "shape": [n], "data_offsets": ""}})
    with pytest.raises(CorruptFileError, match="expected a shard, got IndexError"):
        map_shard(file, n, point, "float32")


# --- bombs --------------------------------------------------------------------------------------


def test_a_record_without_end_in_a_small_gzip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_core.records._MAX_RECORD", 1 << 16)
    for name, start in (("a.jsonl", b'{"text": "'), ("a.txt", b""), ("a.csv", b'text\n"'),
                        ("a.json", b'[{"text": "'), ("b.json", b"[ ")):  # fmt: skip
        file = tmp_path / f"{name}.gz"
        filler = {"b.json": b" " * 64, "a.csv": b"x" * 63 + b"\n"}.get(name, b"x" * 64)
        file.write_bytes(gzip.compress(start + filler * (1 << 15), 1))
        with pytest.raises(UserError, match="expected a record of at most 65,536 bytes, got more"):
            list(read_text_file(file))
    good = tmp_path / "good.txt.gz"
    good.write_bytes(gzip.compress(b"a b c\n" * 20_000))  # the file may be longer than a record
    assert sum(1 for _ in read_text_file(good)) == 20_000


def test_a_parquet_file_that_unpacks_to_a_multiple(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_core.untrusted.BOMB_BYTES", 2 << 20)
    bomb, fine = tmp_path / "bomb.parquet", tmp_path / "fine.parquet"
    options = {"compression": "zstd", "use_dictionary": False}
    pq.write_table(pa.table({"text": ["x" * (3 << 20)]}), bomb, **options)
    assert bomb.stat().st_size < 100_000
    for read in (lambda: list(read_text_file(bomb)), lambda: read_table(bomb)):
        with pytest.raises(CorruptFileError, match="unpacks to at most 250 times"):
            read()
    pq.write_table(pa.table({"text": ["x" * (1 << 20)]}), fine, **options)
    assert [len(row.text) for row in read_text_file(fine)] == [1 << 20]


# --- text that pretends -------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[" * 100_000, '"x"', "[1]", "{", "\x00", "nan"])
def test_what_is_no_json_object(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(CorruptFileError, match="a.json: expected a JSON object"):
        read_object(file)


def test_undecodable_bytes_are_not_quoted_back(features: Path) -> None:
    manifest = features / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"bytes", b"byt\xff\xfe", 1))
    with pytest.raises(CorruptFileError) as raised:
        load_features(features)
    assert "can't decode byte 0xff" in str(raised.value) and len(str(raised.value)) < 400
    assert len(reason(ValueError("x" * 10_000))) == 200 and "\n" not in reason(ValueError("a\nb"))


# --- seals --------------------------------------------------------------------------------------


def test_a_sealed_record_says_whether_it_was_changed() -> None:
    record = {"rows": 16, "name": "é", "none": None, "list": [1.5, True]}
    kept = json.loads(json.dumps(sealed(record)))
    assert unsealed(kept, "here") == record
    assert unsealed(record, "here") == record  # as an older version wrote it
    for change in ({"rows": 17}, {"more": 1}, {"list": [1.5, 1]}, {"seal": "0" * 64}):
        with pytest.raises(CorruptFileError, match="here was altered"):
            unsealed(kept | change, "here")


def test_a_described_table_knows_its_values(tmp_path: Path) -> None:
    table = pa.table({"x": [1.0, 2.0, None], "label": ["a", "b", "c"]})
    file = write_described(tmp_path / "t.parquet", table, {"seed": 3}, b"key")
    found, how = read_described(file, b"key", "me")
    assert found.equals(table) and how == {"seed": 3}
    stored = pq.read_table(file)
    for changed in (
        stored.set_column(0, "x", pa.array([1.0, 2.5, None])),
        stored.set_column(0, "x", pa.array([1.0, 2.0, 0.0])),
        stored.rename_columns(["y", "label"]),
        stored.set_column(1, "label", pa.array(["a", "b", "d"])),
    ):
        pq.write_table(changed.replace_schema_metadata(stored.schema.metadata), file)
        with pytest.raises(CorruptFileError, match="t.parquet was altered"):
            read_described(file, b"key", "me")
    other = dict(stored.schema.metadata) | {b"key": b'{"seed": 4}'}
    pq.write_table(stored.replace_schema_metadata(other), file)
    with pytest.raises(CorruptFileError, match="was altered"):
        read_described(file, b"key", "me")
    for damage in (b"", b"PAR1", file.read_bytes()[:-9]):
        file.write_bytes(damage)
        with pytest.raises(CorruptFileError, match="expected a whole parquet file"):
            read_described(file, b"key", "me")


# --- links and paths ----------------------------------------------------------------------------


def test_a_manifest_that_climbs_and_a_link_that_leads_out(features: Path, tmp_path: Path) -> None:
    manifest = json.loads((features / "manifest.json").read_text())
    entry = manifest["files"]["rows.parquet"]
    for name in ("../../etc/passwd", "/etc/passwd", "a/../../b"):
        bad = manifest | {"files": manifest["files"] | {name: entry}}
        (features / "manifest.json").write_text(json.dumps(bad))
        with pytest.raises(CorruptFileError, match="expected names inside the folder"):
            load_features(features)
    (features / "manifest.json").write_text(json.dumps(manifest))
    (features / "rows.parquet").unlink()
    for target in ("/dev/zero", "/nowhere", str(tmp_path)):
        (features / "rows.parquet").symlink_to(target)
        with pytest.raises(CorruptFileError, match="rows.parquet is missing"):
            load_features(features)
        (features / "rows.parquet").unlink()
    os.mkfifo(features / "rows.parquet")
    with pytest.raises(CorruptFileError, match="rows.parquet is missing"):
        load_features(features)


def test_a_table_whose_texts_are_not_utf8(features: Path) -> None:
    """Arrow reads such a column; only the first look at a text would raise."""
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xd9a")]
    )
    pq.write_table(pa.table({"row_id": [7, 3], "text": bad}), features / "rows.parquet")
    reseal(features)
    with pytest.raises(CorruptFileError, match=r"rows.parquet: expected a whole parquet file"):
        load_features(features)
