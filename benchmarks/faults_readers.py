"""How the program reads back each kind of file that it writes, as parts to be digested."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults_process import finish, start
from benchmarks.faults_setup import DATA, commands, train_arguments

Read = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Target:
    """One kind of file, in a folder, and how it is read."""

    name: str
    """Of the row."""
    folder: Path
    """Everything that is restored after a damage."""
    open: Callable[[], Read]
    """Makes the reader, in the child."""
    suffixes: tuple[str, ...] = ("",)
    """Files that are damaged."""

    def takes(self, name: str) -> bool:
        """Whether this file is damaged."""
        return name.endswith(self.suffixes)


def targets(root: Path) -> list[Target]:
    """All kinds, made below ``root`` from the run that ``prepare`` left there."""
    child = start(lambda: _make(root), root / "log")
    if finish(child):
        raise RuntimeError((root / "log").read_text())
    run, made = root / "run", root / "made"
    return [
        Target("shards", made / "shards", lambda: _shards(root, made / "shards")),
        Target("journal", made / "begun", lambda: _shards(root, made / "begun"), (".jsonl",)),
        Target("checkpoint", made / "checkpoints", lambda: _checkpoint(root)),
        Target("sae", run / "sae", lambda: lambda: _sae(run)),
        Target("features", made / "features", lambda: lambda: _features(made / "features")),
        Target("index", made / "index", lambda: lambda: _index(root)),
        Target("app", made / "app", lambda: lambda: _app(made / "app")),
        Target("table", made / "tables", lambda: lambda: _tables(made / "tables"), (".parquet",)),
        Target("pool", made / "select" / "pool", lambda: lambda: _pool(made / "select" / "pool")),
        Target("run", made / "run", lambda: lambda: _run(made / "run"), (".json",)),
        Target("resumed", made / "stopped", lambda: lambda: _resumed(root), (".json",)),
        Target("result", made / "separability", lambda: lambda: _again(root, "separability")),
        Target("picks", made / "picks", lambda: lambda: _again(root, "select")),
    ]


def redirected(root: Path, name: str, out: Path) -> list[str]:
    """The arguments of a command of the suite with another folder for its result."""
    return [arg.replace(str(root / "out"), str(out)) for arg in commands(root)[name].argv]


def _make(root: Path) -> None:
    from sae_apps.selection.index import SparseIndex
    from sae_apps.suppression.app import App, load_app
    from sae_apps.tasks.main import main
    from sae_core.store import load_features

    made, run = root / "made", root / "run"
    made.mkdir(exist_ok=True)
    for name in ("select", "separability", "suppress", "geo"):
        if not (made / name).exists():
            assert main(redirected(root, name, made / name)) == 0
    for name, source in (("features", run / "features"), ("app", made / "suppress" / "app"),
                         ("shards", run / "activations" / "train"),
                         ("begun", run / "activations" / "train"),
                         ("checkpoints", run / "checkpoints")):  # fmt: skip
        shutil.copytree(source, made / name, dirs_exist_ok=True)
    for name in ("picks", "tables", "run", "stopped"):
        (made / name).mkdir(exist_ok=True)
    for file in (made / "select").glob("*.*"):
        shutil.copy(file, made / "picks")
    for file in (made / "geo" / "moran.parquet", made / "separability" / "latents.parquet"):
        shutil.copy(file, made / "tables")
    for name in ("run.json", "results.json"):
        shutil.copy(run / name, made / "run")
    shutil.copytree(run / "sae", made / "run" / "sae", dirs_exist_ok=True)
    shutil.copytree(run, made / "stopped", dirs_exist_ok=True)
    shutil.rmtree(made / "stopped" / "features")
    for name in ("stopped/results.json", "begun/manifest.json", "begun/shard-00001.safetensors"):
        (made / name).unlink()
    lines = (made / "begun" / "progress.jsonl").read_text().splitlines(keepends=True)
    (made / "begun" / "progress.jsonl").write_text("".join(lines[:2]))
    shutil.rmtree(sorted((made / "checkpoints").iterdir())[0])
    if not (made / "index").exists():
        SparseIndex.build([load_features(run / "features")], folder=made / "index")
    assert isinstance(load_app(made / "app"), App)


def _settings(root: Path) -> Any:
    from sae_apps.tasks.train import parse

    argv = train_arguments(root, "run", DATA / "stories260k")
    return parse(argv[1:])[0]


def _shards(root: Path, folder: Path) -> Read:
    """As training reads them: the harvest is asked for again, which finishes it where it can."""
    from dataclasses import replace

    from sae_apps.tasks.inputs import open_inputs
    from sae_core.harvest import harvest_shards

    settings = _settings(root)
    inputs = open_inputs(settings)

    def read() -> Iterator[Any]:
        stored = harvest_shards(
            inputs.lm, inputs.train_rows, [inputs.hook_point], folder,
            replace(settings.harvest, max_tokens=settings.max_tokens),
            dtype=settings.store_dtype(), shard_tokens=settings.shard_tokens(),
        )[inputs.hook_point]  # fmt: skip
        for batch in stored.iter_sequential(4096):
            yield batch.x.numpy().tobytes()
            yield batch.row_id.numpy().tobytes()
            yield batch.position.numpy().tobytes()

    return read


def _checkpoint(root: Path) -> Read:
    from sae_apps.tasks.train import training_config
    from sae_core.checkpoint import load_checkpoint
    from sae_core.shards import ShardedActivations

    settings = _settings(root)
    stored = ShardedActivations.open(root / "run" / "activations" / "train", "layers.2.out")
    config = training_config(settings, stored.n_tokens)

    def read() -> Iterator[Any]:
        found = load_checkpoint(root / "made" / "checkpoints", config)
        if found is None:
            yield "none"
            return
        sae, state = found
        for name, value in sorted(sae.tensors().items()):
            yield name
            yield value.numpy().tobytes()
        yield (state.step, state.tokens, state.variance, state.spread, state.l1, state.threshold)
        yield state.firing.count.numpy().tobytes()

    return read


def _sae(run: Path) -> Iterator[Any]:
    from sae_core.sae import load_sae

    sae, extra = load_sae(run / "sae")
    yield sae.hash()
    yield json.dumps(extra, sort_keys=True)


def _features(folder: Path) -> Iterator[Any]:
    from sae_core.store import load_features

    found = load_features(folder)
    for name in ("indptr", "indices", "data"):
        yield getattr(found.acts, name).tobytes()
    yield str(found.rows.to_pydict())
    yield found.provenance


def _index(root: Path) -> Iterator[Any]:
    from sae_apps.selection.index import SparseIndex
    from sae_core.store import load_features

    queries = load_features(root / "run" / "features").acts[:8]
    found = SparseIndex.load(root / "made" / "index").query(queries, 5)
    yield found.row_ids.tobytes()
    yield found.scores.tobytes()


def _app(folder: Path) -> Iterator[Any]:
    from sae_apps.suppression.app import load_app

    app = load_app(folder)
    for name in ("edges", "weights", "evidence", "neutral"):
        yield getattr(app, name).numpy().tobytes()
    yield (app.prior, app.concepts, app.mode, app.gate, app.beyond, app.strength, app.special_ids)
    yield (app.units.kind, app.units.hook_point, app.units.sae_hash, app.units.model_revision)


def _tables(folder: Path) -> Iterator[Any]:
    from sae_apps.geospatial.moran_table import load_moran
    from sae_apps.suppression.separability_table import load_separability

    moran, distances = load_moran(folder / "moran.parquet"), load_separability(
        folder / "latents.parquet"
    )  # fmt: skip
    for one in (moran, distances):
        yield str(one.table.to_pydict())
        yield json.dumps(one.how, sort_keys=True)


def _pool(folder: Path) -> Iterator[Any]:
    from sae_apps.selection.pool import open_pool

    pool = open_pool(folder)
    yield json.dumps(pool.manifest, sort_keys=True)
    yield pool.rows().num_rows
    for shard in pool:
        yield shard.acts.data.tobytes()
        yield np.asarray(shard.row_ids).tobytes()


def _run(folder: Path) -> Iterator[Any]:
    from sae_apps.tasks.common import read_json
    from sae_apps.tasks.featurize import open_run

    run = open_run(str(folder))
    yield json.dumps(run.settings.identity(), sort_keys=True, default=str)
    yield run.hook_point
    yield run.sae.hash()
    yield json.dumps(run.folder.read()["provenance"])
    yield json.dumps(read_json(run.folder.results_file))


def _printed(argv: list[str]) -> Iterator[Any]:
    """What a command prints, or its message as an error."""
    from sae_apps.tasks.main import main
    from sae_core.errors import UserError

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*argv, "--json"])
    if code:
        raise UserError(err.getvalue().strip())
    yield out.getvalue()


def _again(root: Path, name: str) -> Iterator[Any]:
    """The command once more, which finds its result whole and shows it."""
    made = root / "made"
    argv = redirected(root, name, made / name)
    if name == "select":
        argv = [arg.replace(f"{made}/select/picks", f"{made}/picks/picks") for arg in argv]
        argv = [arg.replace(f"{made}/select/scores", f"{made}/picks/scores") for arg in argv]
    return _printed(argv)


def _resumed(root: Path) -> Iterator[Any]:
    """A stopped run is trained to its end."""
    from benchmarks.faults_process import contents

    list(_printed(train_arguments(root, "made/stopped", DATA / "stories260k")))
    yield sorted(
        (name, digest) for name, digest in contents(root, ["made/stopped"]).items()
        if name.endswith(("sae.safetensors", "results.json"))
    )  # fmt: skip
