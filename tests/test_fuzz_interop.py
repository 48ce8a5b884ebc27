"""What fuzzing found in the readers of other libraries' SAEs, kept as tests."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.fuzz_foreign import D_IN, FOREIGN
from sae_apps.tasks.convert import read_activations
from sae_core.errors import CorruptFileError, UserError
from sae_core.interop import read_foreign
from tests.command import one_sentence, refusal, run_json

MAKE = {name: make for name, make, *_ in FOREIGN}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("foreign")
    for name, make in MAKE.items():
        make(root / name)
    return root


@pytest.fixture
def lens(tmp_path: Path) -> Path:
    MAKE["saelens"](tmp_path)
    return tmp_path


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    MAKE["dictionary_learning"](tmp_path)
    return tmp_path / "MatryoshkaBatchTopKSAE"


def configure(file: Path, **change: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


# --- every good example is read: else the fuzzer looks at nothing --------------------------------


@pytest.mark.parametrize(
    "name", ["saelens", "sparsify", "dictionary_learning", "activations"]
)
def test_the_good_examples_are_read(made: Path, name: str) -> None:
    if name == "activations":
        assert [read_activations(f, D_IN).shape for f in (made / name).iterdir()] == [(16, 4)] * 2
        return
    folders = {file.parent for file in (made / name).rglob("*") if file.is_file()}
    kinds = {read_foreign(folder).sae.config.kind for folder in folders}
    wanted = {"saelens": {"relu", "topk", "jumprelu", "batch_topk"}, "sparsify": {"topk"}}
    assert kinds == wanted.get(name, wanted["saelens"])


# --- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["saelens/old/cfg.json", "sparsify/layers.5.mlp/cfg.json"])
def test_brackets_without_end(made: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "sae"
    folder.mkdir()
    for file in (made / name).parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "cfg.json").write_text("[" * 100_000)
    one_sentence(lambda: read_foreign(folder), "cfg.json is not valid JSON", CorruptFileError)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("standard", {"metadata": 3}, "metadata as dict, got 3"),
        ("standard", {"metadata": [["a", "b"]]}, "metadata as dict, got"),
        ("standard", {"metadata": {"hook_name": [1]}}, r"hook_name as str, got \[1\]"),
        ("standard", {"metadata": {"model_name": 5}}, "model_name as str, got 5"),
        ("standard", {"metadata": {"sae_apps_hook_point": {}}}, "sae_apps_hook_point as str"),
        ("old", {"hook_name": 7}, "hook_name as str, got 7"),
        ("old", {"activation_fn_kwargs": "k"}, "activation_fn_kwargs as dict, got 'k'"),
    ],
)
def test_a_saelens_configuration_of_other_types(
    lens: Path, case: str, change: dict, message: str
) -> None:
    configure(lens / case / "cfg.json", **change)
    one_sentence(lambda: read_foreign(lens / case), message)


def test_a_layer_that_is_no_layer_gives_no_hook_point(pickled: Path) -> None:
    content = json.loads((pickled / "config.json").read_text())
    for layer, wanted in ((1, "layers.1.out"), (-1, None), (True, None)):
        content["trainer"]["layer"] = layer
        (pickled / "config.json").write_text(json.dumps(content))
        assert read_foreign(pickled).facts.get("hook_point") == wanted


# --- tensors of other types ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log_threshold", "W_enc"])
def test_imaginary_parts_are_not_dropped(lens: Path, name: str) -> None:
    file = lens / "jumprelu" / "sae_weights.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] + 1j}, file)
    one_sentence(lambda: read_foreign(lens / "jumprelu"), "real numbers|must hold the tensors")


def test_eight_bit_logarithms_are_read(lens: Path) -> None:
    """torch has no exp of them."""
    file = lens / "jumprelu" / "sae_weights.safetensors"
    tensors = load_file(file)
    half = torch.full_like(tensors["log_threshold"], -0.5)
    save_file(tensors | {"log_threshold": half.to(torch.float8_e5m2)}, file)
    found = read_foreign(lens / "jumprelu").sae.threshold
    torch.testing.assert_close(found, torch.exp(half))


def test_activations_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    for array, message in ((np.ones((2, 4)) * 1j, "finite real activations .* torch.complex128"),
                           (np.ones((0, 4)), r"got torch.float64 of shape \[0, 4\]"),
                           (np.array([["a"]]), "cannot be read")):  # fmt: skip
        np.save(file, array)
        one_sentence(lambda: read_activations(file, None), message)
    claim = {"descr": "<f4", "fortran_order": False, "shape": (1 << 60, 4)}
    with open(file, "wb") as out:
        np.lib.format.write_array_header_1_0(out, claim)
    one_sentence(lambda: read_activations(file, None), "cannot be read.* in 0 bytes")


# --- pickles -------------------------------------------------------------------------------------


def store(folder: Path, **change: object) -> None:
    torch.save(torch.load(folder / "ae.pt", weights_only=True) | change, folder / "ae.pt")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(()).expand(1 << 40),
        lambda: torch.zeros(3).to_sparse(),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    ],
    ids=["strides of 0", "sparse", "meta", "quantized"],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_tensors_that_are_not_in_the_file(
    pickled: Path, make: Callable[[], torch.Tensor]
) -> None:
    """With strides of 0 four bytes would become eight TiB of float64."""
    assert read_foreign(pickled).sae.config.kind == "batch_topk"
    store(pickled, group_sizes=make())
    one_sentence(lambda: read_foreign(pickled), "Expected dense tensors in .* got 'group_sizes'")


def test_group_sizes_in_a_square(pickled: Path) -> None:
    store(pickled, group_sizes=torch.ones(2, 2))
    one_sentence(lambda: read_foreign(pickled), r"must have shape \[4\], got \[2, 2\]")
    store(pickled, group_sizes=torch.ones(1000))
    one_sentence(lambda: read_foreign(pickled), r"must have shape \[8\], got \[1000\]")


def repack(file: Path, name: str, data: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file) as old:
        parts = {part.filename: old.read(part) for part in old.infolist()}
    with zipfile.ZipFile(file, "w") as new:
        for one, content in parts.items():
            is_it = one.endswith(name)
            new.writestr(one, data if is_it else content, method if is_it else None)


def test_an_archive_that_unpacks_to_more_than_it_is(pickled: Path) -> None:
    repack(pickled / "ae.pt", "data/0", bytes(1 << 20), zipfile.ZIP_DEFLATED)
    one_sentence(lambda: read_foreign(pickled), "bytes that unpack to 10", CorruptFileError)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
        b"\x80\x02ctorch\nFloatStorage\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02a.",
        b"\x80\x02J\x00",
    ],
    ids=["deep", "a class", "a call without arguments", "an empty stack", "half a number"],
)
def test_a_pickle_that_trips_the_unpickler(pickled: Path, content: bytes) -> None:
    repack(pickled / "ae.pt", "data.pkl", content)
    one_sentence(lambda: read_foreign(pickled), "ae.pt")


class Program:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_program_in_a_pickle_is_refused_by_the_command(
    pickled: Path, is_zip: bool, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["convert", str(pickled), "--out", "out"]
    run_json(capsys, *argv, "--dry-run")
    if is_zip:
        repack(pickled / "ae.pt", "data.pkl", pickle.dumps({"b_dec": Program()}, 2))
    else:
        (pickled / "ae.pt").write_bytes(pickle.dumps({"b_dec": Program()}, 2))
    assert "got a pickle that asks for more" in refusal(capsys, *argv)
    assert not (tmp_path / "owned").exists() and not (tmp_path / "out").exists()


# --- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [("saelens/standard", "sae_weights.safetensors"), ("saelens/standard", "cfg.json"),
     ("saelens/standard", "sparsity.safetensors"), ("sparsify/layers.5.mlp", "sae.safetensors"),
     ("dictionary_learning/AutoEncoder", "ae.pt")],
)  # fmt: skip
def test_links_lead_to_whole_files_or_are_refused(
    made: Path, tmp_path: Path, name: str, file: str
) -> None:
    """The cache of the hub is made of links to files; devices, pipes and loops are no files."""
    folder, target = tmp_path / "sae", made / name / file
    folder.mkdir()
    for one in (made / name).iterdir():
        (folder / one.name).symlink_to(one)
    wanted = read_foreign(folder)
    secret = tmp_path / "secret"
    secret.write_text("hunter:0:0")
    for other in ("/dev/zero", "/nowhere", str(tmp_path), str(folder / file), str(secret)):
        (folder / file).unlink()
        (folder / file).symlink_to(other)
        if file.startswith("sparsity") and other != str(secret):  # may be absent
            assert "freq" in wanted.facts and "freq" not in read_foreign(folder).facts
            continue
        with pytest.raises(UserError) as raised:
            read_foreign(folder)
        assert file in str(raised.value) and "hunter" not in str(raised.value)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    if not file.startswith("sparsity"):
        one_sentence(lambda: read_foreign(folder), "files of one library")
    (folder / file).unlink()
    (folder / file).symlink_to(target)
    assert read_foreign(folder).sae.hash() == wanted.sae.hash()
