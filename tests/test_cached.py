"""What an estimate takes for being on this machine, and what it says of the rest."""

import json
import shutil
from pathlib import Path

import pytest

from sae_apps.tasks import cached
from sae_apps.tasks.main import main
from sae_core.errors import UserError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub with one commit of ``owner/name``; returns the commit's folder."""
    from huggingface_hub import constants

    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    repo = root / "models--owner--name"
    commit = repo / "snapshots" / ("a" * 40)
    commit.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    return commit


def test_a_lone_configuration_is_no_model(hub: Path) -> None:
    said = ["the model owner/name is not on this machine yet"]
    assert cached.absent_model("owner/name") == said
    (hub / "config.json").write_text("{}")
    assert cached.absent_model("owner/name") == said  # as after a download that was stopped
    (hub / "tokenizer.json").write_text("{}")
    assert cached.absent_model("owner/name") == said
    (hub / "model.safetensors").touch()
    assert cached.absent_model("owner/name") == []
    (hub / "tokenizer.json").unlink()
    assert cached.absent_model("owner/name") == said


def test_every_shard_of_the_weights_counts(hub: Path) -> None:
    for name in ("config.json", "tokenizer.json", "a.safetensors"):
        (hub / name).write_text("{}")
    index = hub / "model.safetensors.index.json"
    for damaged in ("", "[]", '{"weight_map": 1}'):
        index.write_text(damaged)
        assert not cached.is_model_cached("owner/name")
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert not cached.is_model_cached("owner/name")
    (hub / "b.safetensors").touch()
    assert cached.is_model_cached("owner/name")


def test_the_whole_model_in_the_cache_of_the_hub_is_loaded(hub: Path, stories260k: Path) -> None:
    from sae_core.models import load_model

    for file in stories260k.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, hub)
    assert cached.absent_model("owner/name") == []
    assert load_model("owner/name").revision == "a" * 40


@pytest.mark.parametrize(
    "name, said",
    [
        ("nosuch.gguf", "File not found: expected a model folder or .gguf at nosuch.gguf"),
        ("nosuch.safetensors", "File not found"),
        ("models/sub/nosuch", "File not found"),
        ("./nosuch", "File not found"),
        ("~/nosuch", "File not found"),
        ("smolm2-135m", "Unknown model 'smolm2-135m': did you mean smollm2-135m"),
    ],
)
def test_a_name_under_which_nothing_can_be_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        cached.absent_model(name)


def test_a_gguf_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_core.download import sha256_file

    monkeypatch.setattr("sae_core.download.cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr("sae_core.weights.check_gguf", lambda _: None)
    path = tmp_path / "a[1].gguf"
    path.write_bytes(b"one")
    said = [f"the model {path} is not converted yet"]
    assert cached.absent_model(str(path)) == said
    sha256 = sha256_file(path)
    made = tmp_path / "cache" / "models" / f"a[1]-{sha256[:8]}"
    made.mkdir(parents=True)
    (made / "converted.json").write_text(json.dumps({"sha256": sha256, "files": {}}))
    assert cached.absent_model(str(path)) == []
    path.write_bytes(b"two")  # another file of the same name
    assert cached.absent_model(str(path)) == said


def test_a_file_that_is_no_gguf_is_refused_in_an_estimate(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="not a whole .gguf"):
        cached.absent_model(str(path))


@pytest.mark.parametrize("command", ["train", "sweep"])
@pytest.mark.parametrize("flag", ["--model", "--text"])
def test_an_estimate_says_that_a_file_is_not_there(
    command: str,
    flag: str,
    stories260k: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("Tom has 2 dogs.\n" * 50)
    flags = {"--model": str(stories260k), "--text": "text.txt"}
    flags[flag] = {"--model": "nosuch.gguf", "--text": "nosuch.parquet"}[flag]
    argv = [command, "--dry-run", "--out", "x", *(part for pair in flags.items() for part in pair)]
    argv += ["--hooks", "layers.1.out"] if command == "sweep" else []
    assert main(argv) == 2
    assert f"File not found: {'expected a model folder' if flag == '--model' else ''}" in (
        capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]
