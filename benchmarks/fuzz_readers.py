"""Every reader with a good example of what it reads, small enough to be read hundreds of times."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults_process import finish, start
from benchmarks.faults_readers import targets
from benchmarks.faults_setup import DATA
from benchmarks.fuzz_corpus import places_files, text_files, without_seal
from benchmarks.fuzz_foreign import FOREIGN
from benchmarks.fuzz_monet import make_monet, read_mask, read_monet, read_result

TEXTS = ("a.jsonl", "a.jsonl.gz", "a.json", "a.txt", "a.csv", "a.tsv", "a.parquet")


@dataclass(frozen=True)
class Reader:
    """A good folder, the files in it that are changed, and what reads them."""

    name: str
    """Of the row."""
    good: Path
    """Never changed; each input is a changed copy."""
    read: Callable[[Path], Any]
    """Reads the copy and looks at what came."""
    files: tuple[str, ...] = ()
    """Endings of the files that are changed; none: all."""
    weight: int = 4
    """Inputs, relative to other readers."""

    def takes(self, name: str) -> bool:
        """Whether this file is changed."""
        return not self.files or name.endswith(self.files)


def make_readers(root: Path) -> list[Reader]:
    """All readers; their examples lie below ``root``, where ``prepare`` has left its run."""
    targets(root)  # makes root/made
    made, good = root / "made", root / "good"
    good.mkdir(exist_ok=True)
    text_files(good / "texts", root)
    places_files(good / "places")
    for name in ("config", "gguf", "labelled"):
        (good / name).mkdir(exist_ok=True)
    (good / "config" / "run.yaml").write_text(
        "model:\n  name: smollm2-135m\ntext:\n  source: demo\n  column: null\ntokens: 10k\n"
        "seed: 3\nsae:\n  kind: topk\n  d_sae: 128\n  k: 8\ntrain:\n  lr: 0.001\n  batch_size: 64\n"
    )
    whole = bytearray((DATA / "stories260k" / "stories260K.original.gguf").read_bytes())
    for key in (b"seperator_token_id", b"padding_token_id"):  # -1 there, which is refused
        place = whole.index(key) + len(key) + 4
        whole[place : place + 4] = bytes(4)
    (good / "gguf" / "model.gguf").write_bytes(whole)
    shutil.copytree(DATA / "stories260k", good / "model", dirs_exist_ok=True)
    (good / "model" / "stories260K.original.gguf").unlink(missing_ok=True)
    for name in ("labelled.jsonl", "items.jsonl"):
        lines = (root / name).read_text().splitlines()[:20]
        (good / "labelled" / name).write_text("\n".join(lines) + "\n")
    without_seal(made / "tables", good / "tables")
    shutil.copytree(made / "select" / "pool", good / "pool", dirs_exist_ok=True)
    for number in range(1, 8):
        shutil.rmtree(good / "pool" / f"shard-{number:05d}", ignore_errors=True)
    finished = json.loads((good / "pool" / "finished.json").read_text())
    (good / "pool" / "finished.json").write_text(
        json.dumps({"n_rows": 32, "n_shards": 1, "without_text": finished["without_text"]})
    )
    return [
        Reader("sae", root / "run" / "sae", _sae, weight=8),
        Reader("features", made / "features", _features, weight=8),
        Reader("shards", made / "shards", _shards, weight=6),
        Reader("checkpoint", made / "checkpoints", lambda p: _checkpoint(root, p), weight=4),
        Reader("index", made / "index", _index, weight=8),
        Reader("app", made / "app", _app, weight=6),
        Reader("pool", good / "pool", _pool, weight=4),
        Reader("tables", good / "tables", _tables, weight=4),
        Reader("run", made / "run", _run, ("run.json", "results.json"), weight=4),
        Reader("texts", good / "texts", _texts, TEXTS, weight=16),
        Reader("instructions", good / "texts", _instructions, weight=8),
        Reader("labelled", good / "labelled", _labelled, weight=4),
        Reader("places", good / "places", _load_places, weight=8),
        Reader("config", good / "config", _config, weight=8),
        Reader("gguf", good / "gguf", _gguf, weight=2),
        Reader("model", good / "model", _model, weight=2),
        *foreign_readers(good, root / "log"),
    ]


def foreign_readers(good: Path, log: Path) -> list[Reader]:
    """Readers of what other SAE libraries wrote, and of Monet; their examples go below ``good``."""

    def make() -> None:
        for name, write, *_ in FOREIGN:
            write(good / name)
        make_monet(good / "monet")

    if finish(start(make, log)):  # in a child: this process has computed nothing yet
        raise RuntimeError(log.read_text())
    monet = good / "monet"
    return [
        *(Reader(name, good / name, read, weight=weight) for name, _, read, weight in FOREIGN),
        Reader("monet", monet / "model", read_monet, weight=4),
        Reader("masks", monet / "masks", partial(read_mask, monet), weight=4),
        Reader("experts", monet / "out", partial(read_result, monet),
               (".json", ".parquet", ".safetensors"), weight=4),
    ]  # fmt: skip


def _each(folder: Path, act: Callable[[Path], Any]) -> None:
    """The first changed file: the guard's copy holds one that is new."""
    changed = (folder / ".changed").read_text()
    act(folder / changed)


def _drain(rows: Iterable[Any]) -> None:
    for _ in rows:
        pass


def _sae(folder: Path) -> None:
    import torch

    from sae_core.sae import load_sae

    sae, _ = load_sae(folder)
    sae.encode_sparse(torch.zeros(2, sae.d_in))


def _features(folder: Path) -> None:
    from sae_core.store import load_features

    found = load_features(folder)
    _ = found.freq.sum(), found.top_rows(0, 3), found.rows.to_pylist()


def _shards(folder: Path) -> None:
    from sae_core.shards import ShardedActivations

    found = ShardedActivations.open(folder, "layers.2.out", verify=True)
    _drain(found.iter_sequential(4096))


def _checkpoint(root: Path, folder: Path) -> None:
    from benchmarks.faults_readers import _settings
    from sae_apps.tasks.train import training_config
    from sae_core.checkpoint import load_checkpoint

    load_checkpoint(folder, training_config(_settings(root), 20_000))


def _index(folder: Path) -> None:
    from scipy import sparse

    from sae_apps.selection.index import SparseIndex

    index = SparseIndex.load(folder)
    query = sparse.random_array((2, index.d_sae), density=0.05, rng=0, format="csr", dtype="f4")
    index.query(sparse.csr_array(query), 1)


def _app(folder: Path) -> None:
    import torch

    from sae_apps.suppression.app import load_app

    app = load_app(folder)
    app.apply(torch.zeros(3, app.units.d_in))


def _pool(folder: Path) -> None:
    from sae_apps.selection.pool import open_pool

    pool = open_pool(folder)
    pool.rows()
    _drain(pool)


def _tables(folder: Path) -> None:
    from sae_apps.geospatial.moran_table import load_moran
    from sae_apps.suppression.separability_table import load_separability

    load_moran(folder / "moran.parquet").top(3)
    load_separability(folder / "latents.parquet").top(3)


def _run(folder: Path) -> None:
    from sae_apps.tasks.common import read_json
    from sae_apps.tasks.featurize import open_run

    run = open_run(str(folder))
    _ = run.settings.identity(), run.hook_point, read_json(run.folder.results_file)


def _texts(folder: Path) -> None:
    from sae_core.text import read_text_file

    def read(path: Path) -> None:
        _drain(read_text_file(path, column=None if path.suffix == ".txt" else "prompt"))

    _each(folder, read)


def _instructions(folder: Path) -> None:
    from sae_apps.selection.instructions import open_instructions

    _each(folder, lambda path: _drain(open_instructions(path)))


def _labelled(folder: Path) -> None:
    from sae_apps.tasks.align_run import _number, _value
    from sae_apps.tasks.separability import ConceptOptions
    from sae_apps.tasks.separability_run import read_labelled
    from sae_core.records import read_records

    def read(path: Path) -> None:
        if path.name == "labelled.jsonl":
            read_labelled(ConceptOptions(data=str(path))).balanced(None, 0)
            return
        for place, record in read_records(path):
            _ = _value(record, "text", place), _number(record, "lat", place)

    _each(folder, read)


def _load_places(folder: Path) -> None:
    from sae_apps.geospatial.places import load_places

    _each(folder, lambda path: load_places(str(path)))


def _config(folder: Path) -> None:
    from sae_apps.tasks.train import parse

    parse(["--config", str(folder / "run.yaml")])


def _gguf(folder: Path) -> None:
    from sae_core.weights import check_gguf

    check_gguf(folder / "model.gguf")


def _model(folder: Path) -> None:
    from sae_core.models import load_model

    load_model(str(folder))
