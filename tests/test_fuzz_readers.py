"""What fuzzing found in the readers of indexes, suppressions, runs and settings, kept as tests."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as torch_save
from scipy import sparse

from benchmarks.fuzz_corpus import reseal
from sae_apps.selection.codes import IndexConfig
from sae_apps.selection.index import SparseIndex
from sae_apps.suppression.app import App, load_app, save_app
from sae_apps.suppression.reader import LatentReader
from sae_apps.suppression.units import Units
from sae_apps.tasks.common import read_json, to_json
from sae_apps.tasks.featurize import open_run
from sae_apps.tasks.settings import TrainSettings
from sae_core.errors import CorruptFileError, UserError
from sae_core.sae import SAE, SAEConfig, save_sae
from sae_core.sealed import sealed

HUGE = 1 << 60


@pytest.fixture
def index(tmp_path: Path) -> Path:
    pytest.importorskip("faiss")
    pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    rows = sparse.random_array((40, 30), density=0.2, rng=rng, format="csr", dtype=np.float32)
    config = IndexConfig(method="random", dims=8, factory="Flat")
    SparseIndex.build(sparse.csr_array(rows), config, folder=tmp_path / "i")
    return tmp_path / "i"


def head(change: dict) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(found | change))

    return apply


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        np.save(folder / name, change(np.load(folder / name)))

    return apply


def encoder(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / "encoder.safetensors")["matrix"]
        save_file({"matrix": change(found)}, folder / "encoder.safetensors")

    return apply


def cut_codes(folder: Path) -> None:
    file = folder / "codes.faiss"
    file.write_bytes(file.read_bytes()[:-40])


HOSTILE = {
    "more latents than there can be": head({"d_sae": HUGE}),
    "no latents": head({"d_sae": 0}),
    "more parts than files": head({"n_parts": HUGE}),
    "settings of another type": head({"config": {"dims": "x"}}),
    "unknown settings": head({"config": {"colour": 1}}),
    "another number of rows": head({"n_rows": 39}),
    "latents out of range": array("part-00000-indices.npy", lambda a: a + 1000),
    "latents below zero": array("part-00000-indices.npy", lambda a: a - 100),
    "pointers beyond the values": array("part-00000-indptr.npy", lambda a: a * 1000),
    "values that are no numbers": array("part-00000-data.npy", lambda a: a * np.nan),
    "one value less": array("part-00000-data.npy", lambda a: a[:-1]),
    "a number for an array": array("part-00000-indptr.npy", lambda a: np.array(3)),
    "a pickle": array("row_ids.npy", lambda a: a.astype(object)),
    "ids in a square": array("row_ids.npy", lambda a: a.reshape(8, 5)),
    "ids as text": array("row_ids.npy", lambda a: a.astype(str)),
    "another projection": encoder(lambda m: m[:, :4].copy()),
    "a projection in doubles": encoder(lambda m: m.astype(np.float64)),
    "codes that end early": cut_codes,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_index_is_refused_before_a_compiled_loop_sees_it(index: Path, what: str) -> None:
    SparseIndex.load(index)
    HOSTILE[what](index)
    reseal(index)
    with pytest.raises(CorruptFileError) as raised:
        SparseIndex.load(index)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weights", torch.zeros(2, 3)),
        ("evidence", torch.zeros(2, 3)),
        ("neutral", torch.zeros(1, dtype=torch.bool)),
        ("edges", torch.zeros(1, 1).to(torch.float8_e4m3fn)),
        ("index", torch.zeros(1)),
        ("reader.encoder", torch.zeros(5, 2)),
        ("reader.chosen", torch.zeros(1)),
        ("reader.offset", torch.zeros(1, 2)),
    ],
)
def test_a_suppression_whose_tensors_do_not_fit(tmp_path: Path, name: str, tensor) -> None:
    two, one = torch.zeros(2), torch.zeros(1, 4)
    chosen = torch.tensor([1])
    reader = LatentReader(torch.zeros(4, 2), two, two.clone(), two.clone(), chosen, one, True, 1)
    units = Units("latents", "layers.0.out", 1, 4, "m", "r", index=torch.tensor([3]), reader=reader)
    table = torch.zeros(1, 3)
    app = App(units, torch.zeros(1, 1), table, table.clone(), torch.zeros(1), 0.5, ("x",))
    save_app(tmp_path / "app", app)
    assert load_app(tmp_path / "app").apply(torch.ones(2, 4)).shape == (2, 4)
    file = tmp_path / "app" / "app.safetensors"
    torch_save(load_torch(file) | {name: tensor}, file)
    reseal(tmp_path / "app")
    with pytest.raises(CorruptFileError, match=f"expected an App, got ValueError.*{name} of shape"):
        load_app(tmp_path / "app")


def test_a_suppression_that_is_not_ranked_reads_its_units_alone(tmp_path: Path) -> None:
    units = Units("latents", "layers.0.out", 1, 4, "m", "r", index=torch.tensor([3]))
    two, one = torch.zeros(2), torch.zeros(1, 4)
    reader = LatentReader(torch.zeros(4, 2), two, two + 1, two + 2, torch.tensor([1]), one, True, 0)
    app = App(
        replace(units, reader=reader), torch.zeros(1, 1), torch.zeros(1, 3), torch.zeros(1, 3),
        torch.zeros(1), 0.5, ("x",),
    )  # fmt: skip
    save_app(tmp_path / "app", app)
    with pytest.raises(CorruptFileError, match="reader.encoder of shape"):
        load_app(tmp_path / "app")


@pytest.mark.parametrize("place", [HUGE, 4, -1])
def test_a_suppression_of_units_that_are_not_there(tmp_path: Path, place: int) -> None:
    units = Units("residual", "layers.0.out", 1, 4, "m", "r", index=torch.tensor([3]))
    table = torch.zeros(1, 3)
    app = App(units, torch.zeros(1, 1), table, table.clone(), torch.zeros(1), 0.5, ("x",))
    save_app(tmp_path / "app", app)
    assert load_app(tmp_path / "app").units.index is not None
    tensors = load_file(tmp_path / "app" / "app.safetensors")
    save_file(tensors | {"index": np.array([place])}, tmp_path / "app" / "app.safetensors")
    reseal(tmp_path / "app")
    with pytest.raises(CorruptFileError, match=f"units {place} to {place} of 4"):
        load_app(tmp_path / "app")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run as far as its small files go."""
    content = {"format": "sae-apps-run", "version": 1, "config": TrainSettings().identity(),
               "provenance": {"model_id": "m"}}  # fmt: skip
    (tmp_path / "run.json").write_text(to_json(sealed(json.loads(to_json(content)))))
    (tmp_path / "results.json").write_text(to_json(sealed({"fvu": 0.25})))
    sae = SAE(SAEConfig(d_in=4, d_sae=8, k=2, kind="topk"))
    save_sae(tmp_path / "sae", sae, {"hook_point": "x"})
    return tmp_path


def test_a_flipped_digit_of_a_run_or_its_results_is_noticed(run: Path) -> None:
    """Both stand alone: without their seal another context size would be believed."""
    assert open_run(str(run)).settings.harvest.context_size == 128
    text = (run / "run.json").read_text()
    assert '"context_size": 128' in text
    (run / "run.json").write_text(text.replace('"context_size": 128', '"context_size": 129'))
    with pytest.raises(CorruptFileError, match="run.json was altered"):
        open_run(str(run))
    assert read_json(run / "results.json") == {"fvu": 0.25}
    (run / "results.json").write_text((run / "results.json").read_text().replace("0.25", "0.24"))
    with pytest.raises(CorruptFileError, match="results.json was altered"):
        read_json(run / "results.json")


@pytest.mark.parametrize("change", [{"config": None}, {"config": [1]}, {"provenance": "x"}])
def test_a_run_without_its_parts(run: Path, change: dict) -> None:
    found = json.loads((run / "run.json").read_text()) | change
    del found["seal"]
    (run / "run.json").write_text(json.dumps(found))
    with pytest.raises(CorruptFileError, match="run.json: expected an object"):
        open_run(str(run))


@pytest.mark.parametrize("device", ["2026-01-01", "true", "cuda:99", [1]])
def test_a_device_that_torch_does_not_know(run: Path, device: object) -> None:
    with pytest.raises(UserError, match="Expected a device that torch can use here"):
        open_run(str(run), device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [None, "x", [2]])
def test_a_sparsity_that_is_no_number(k: object) -> None:
    with pytest.raises(UserError, match=r"sae.k must be a whole number"):
        TrainSettings(sae={"k": k})


@pytest.mark.parametrize("value", ["xyz", [1, 2], 5])
def test_settings_that_are_no_object(value: object) -> None:
    identity = json.loads(to_json(TrainSettings().identity())) | {"train": value}
    with pytest.raises(UserError, match="Expected the fields of TrainConfig, got"):
        TrainSettings.of_identity(identity)


def test_more_latents_than_there_are_bytes() -> None:
    with pytest.raises(UserError, match=f"d_sae must be at most 67108864, got {HUGE}"):
        TrainSettings(sae={"d_sae": HUGE})


def test_settings_of_another_type_are_of_another_version() -> None:
    identity = json.loads(to_json(TrainSettings().identity()))
    identity["train"]["gba"] = 5
    with pytest.raises(UserError, match="Expected the settings of a run of this version"):
        TrainSettings.of_identity(identity)


def test_a_null_in_a_configuration_where_a_number_is_needed(tmp_path: Path) -> None:
    from sae_apps.tasks.train import parse

    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nepochs: null\n")
    with pytest.raises(UserError, match="A value for --epochs is needed, got null"):
        parse(["--config", str(file)])
    file.write_text("seed: 3\ntrain:\n  lr: null\n")  # null is one of its values
    assert parse(["--config", str(file)])[0].train.lr is None
