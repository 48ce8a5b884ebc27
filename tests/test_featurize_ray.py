"""Featurising by the workers of a real local cluster: the bytes of the local engine."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from sae_apps.tasks.main import main
from sae_core.errors import MissingExtraError, UserError
from sae_core.feature_shards import FeaturePlan
from sae_core.feature_workers import FeaturizerSpec, featurize_ray
from sae_core.text import read_text_file
from tests.command import refusal, train_small
from tests.ray_script import run_with_ray

SHARD_ROWS, N_ROWS = 8, 44  # six shards, the last one of four rows
FILES = ("features.safetensors", "rows.parquet", "provenance.json")


@pytest.fixture(scope="module")
def made(shared_data: Path, stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a text.jsonl and its features, made by the local engine."""
    folder = tmp_path_factory.mktemp("featurize")
    with gzip.open(shared_data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(next(lines)) for _ in range(N_ROWS)]
    text = folder / "text.jsonl"
    rows = [{"text": r["question"], "n": i} for i, r in enumerate(records)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_small(stories260k, text, folder / "run")
    assert main([*arguments(folder), "--out", str(folder / "local"), "--quiet"]) == 0
    return folder


def arguments(made: Path) -> list[str]:
    argv = ["featurize", "--run", str(made / "run"), "--text", str(made / "text.jsonl")]
    return [*argv, "--shard-rows", str(SHARD_ROWS)]


def stored(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def test_bad_options_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad(*flags: str) -> str:
        message = refusal(capsys, *arguments(made), "--out", str(tmp_path / "f"), "--quiet", *flags)
        assert list(tmp_path.iterdir()) == []
        return message

    assert "--workers must be at least 1, got 0" in bad("--engine", "ray", "--workers", "0")
    assert "--engine ray, got local with workers 2" in bad("--workers", "2")
    assert "engine" in bad("--engine", "spark")
    assert "--shard-rows must be at least 1" in bad("--shard-rows", "0")
    assert "expected --engine local" in bad("--engine", "ray", "--stored")


def test_without_ray_the_extra_is_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    spec = FeaturizerSpec(str(made / "run" / "sae"), "stories260k")
    rows = read_text_file(made / "text.jsonl")
    with pytest.raises(MissingExtraError, match=r"sae-apps\[ray\]"):
        featurize_ray(tmp_path / "f", spec, rows, FeaturePlan("layers.2.out", rows.id))
    assert list(tmp_path.iterdir()) == []


def test_rows_that_can_be_read_once_are_refused(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra 'ray'.")
    spec = FeaturizerSpec(str(made / "run" / "sae"), "stories260k")
    rows = iter(read_text_file(made / "text.jsonl"))
    with pytest.raises(UserError, match="every worker can read again .* of type generator"):
        featurize_ray(tmp_path / "f", spec, rows, FeaturePlan("layers.2.out", "rows"))


SCRIPT = """
import sae_apps.tasks.featurize as task
from sae_apps.tasks.main import main
from sae_core.feature_shards import FeaturePlan, featurize_to, partial_folder
from sae_core.models import load_model
from sae_core.text import TextSource, read_text_file

run = task.open_run(str(made / "run"))
model, source = run.settings.model.name, read_text_file(made / "text.jsonl")
plan = FeaturePlan(run.hook_point, f"{source.id}[pooling max]", "max", run.settings.harvest, 0, 8)

# The local engine begins.
out_of = out / "features"
def stop(n):
    if len(list(partial_folder(out_of).glob("shard-*"))) == 2:
        raise InterruptedError
try:
    featurize_to(out_of, load_model(model), run.sae, source, plan, progress=stop)
except InterruptedError:
    found["began"] = sorted(p.name for p in partial_folder(out_of).glob("shard-*"))

# A worker dies in the midst of shard 3, once; the other and its successor do the rest.
def deadly():
    for number, row in enumerate(source):
        if number == 26 and os.getpid() != driver and not (out / "died").exists():
            (out / "died").touch()
            os._exit(1)
        if os.getpid() != driver:
            (out / f"pid-{os.getpid()}").touch()
        yield row

task.limited = lambda text, rows: TextSource(source.id, deadly)
argv = ["featurize", "--run", str(made / "run"), "--text", str(made / "text.jsonl"), "--quiet"]
argv += ["--shard-rows", "8", "--engine", "ray", "--out", str(out_of)]
found["too_many"] = main([*argv, "--workers", "3"])
found["ended"] = main([*argv, "--workers", "2"])
found["again"] = main([*argv, "--workers", "2"])  # nothing to do
found["workers"] = len(list(out.glob("pid-*")))
ray.shutdown()
print("RESULT " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def clustered(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """The folder of what the cluster made, what the script found, and its stderr."""
    out = tmp_path_factory.mktemp("ray")
    return out, *run_with_ray(SCRIPT, made, out)


def test_what_one_engine_began_workers_end_with_the_same_bytes_though_one_dies(
    clustered: tuple[Path, dict, str], made: Path
) -> None:
    out, found, _ = clustered
    assert found["address"] == "127.0.0.1"
    assert found["began"] == ["shard-00000", "shard-00001"]
    assert (out / "died").exists() and found["workers"] >= 2
    assert found["ended"] == found["again"] == 0
    assert stored(out / "features") == stored(made / "local")
    assert not list(out.glob("*.partial")) and not list(out.glob(".*"))


def test_too_many_workers_are_refused_in_one_sentence(clustered: tuple[Path, dict, str]) -> None:
    _, found, errors = clustered
    assert found["too_many"] == 2
    said = [line for line in errors.splitlines() if line.startswith("sae-apps: error:")]
    assert len(said) == 1 and "room for 3 workers" in said[0] and "2 processors" in said[0]
