"""The Ray engine: a real local cluster of two workers gives the bits of the local engine."""

import gzip
import json
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sae_apps.selection.cluster import EncoderSpec, _write, write_pool_ray
from sae_apps.selection.embed import EmbedConfig
from sae_apps.selection.instructions import open_instructions
from sae_apps.selection.pool import open_pool, write_pool
from sae_apps.tasks.main import main
from sae_core import workers
from sae_core.errors import MissingExtraError, UserError
from sae_core.workers import MAX_TRIES, ShardJob
from tests.ray_script import run_with_ray

SHARD_ROWS, N_ROWS = 8, 44  # six shards, the last one of four rows
ARRAYS = ("features.safetensors", "rows.parquet")


@pytest.fixture(scope="module")
def made(shared_data: Path, stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a pool.jsonl, a target.jsonl and the pool's features, made locally."""
    folder = tmp_path_factory.mktemp("cluster")
    with gzip.open(shared_data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(next(lines)) for _ in range(N_ROWS + 4)]
    for name, part in (("pool", records[:N_ROWS]), ("target", records[N_ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    argv = ["train", "--model", str(stories260k), "--text", str(folder / "pool.jsonl")]
    argv += ["--column", "question", "--tokens", "1k", "--d-sae", "128", "--k", "8", "--quiet"]
    argv += ["--batch-size", "256", "--context-size", "64", "--eval-tokens", "100"]
    argv += ["--loss-tokens", "50", "--text.held_out_frac", "0.2"]
    assert main([*argv, "--out", str(folder / "run")]) == 0
    spec = EncoderSpec(str(folder / "run"), config=EmbedConfig(max_len=64))
    source = open_instructions(folder / "pool.jsonl")
    write_pool(spec.load(), source, folder / "local", shard_rows=SHARD_ROWS)
    return folder


def arrays(folder: Path) -> list[bytes]:
    """The files of all shards of a finished pool."""
    shards = open_pool(folder).shards
    return [(shard / name).read_bytes() for shard in shards for name in ARRAYS]


def job_of(made: Path, folder: Path, run: str | Path | None = None) -> workers._Told:
    tries = folder.with_name("tries")
    tries.mkdir(exist_ok=True)
    spec = EncoderSpec(str(run or made / "run"), config=EmbedConfig(max_len=64))
    source = open_instructions(made / "pool.jsonl")
    write = partial(_write, folder, source.id)
    threads = torch.get_num_threads()
    return workers._Told(ShardJob(spec.load, write, source, SHARD_ROWS, folder, threads), tries)


def call(worker: workers._ShardWriter, number: int) -> tuple[int, str]:
    found = worker({"item": np.array([number])})
    return int(found["n_rows"][0]), str(found["error"][0])


# ---- one worker, without Ray ----


def test_a_worker_makes_shards_in_any_order(made: Path, tmp_path: Path) -> None:
    told = job_of(made, tmp_path / "pool")
    job = told.job
    encoder = job.load()
    write_pool(encoder, job.source, job.folder, shard_rows=SHARD_ROWS, only=())
    worker = workers._ShardWriter(told)
    asked = [1, 2, 5, 0, 4, 3, 3]  # forwards, back, and one that is there already
    sizes = [8, 8, 4, 8, 8, 8, 8]
    assert [call(worker, number) for number in asked] == [(n, "") for n in sizes]
    assert list(told.tries.iterdir()) == []
    write_pool(encoder, job.source, job.folder, shard_rows=SHARD_ROWS)
    assert arrays(job.folder) == arrays(made / "local")


def test_a_worker_hands_errors_on_in_one_sentence(made: Path, tmp_path: Path) -> None:
    lost = job_of(made, tmp_path / "pool", run="./nowhere")
    n_rows, error = call(workers._ShardWriter(lost), 0)
    assert n_rows == 0 and error.startswith("Expected a finished run") and "nowhere" in error
    (tmp_path / "pool").write_text("a file where a folder should be")
    n_rows, error = call(workers._ShardWriter(job_of(made, tmp_path / "pool")), 2)
    assert n_rows == 0 and "\n" not in error
    assert "failed on shard 2 with FileExistsError: " in error and "continues" in error


def test_a_shard_on_which_workers_die_is_given_up(made: Path, tmp_path: Path) -> None:
    told = job_of(made, tmp_path / "pool")
    for number in range(MAX_TRIES):
        (told.tries / f"4.{number}").touch()
    _, error = call(workers._ShardWriter(told), 4)
    assert f"got {MAX_TRIES} that died" in error and "shard 4" in error
    assert not told.job.folder.exists()


def test_room_of_a_cluster() -> None:
    class Ray:
        @staticmethod
        def cluster_resources() -> dict[str, float]:
            return {"CPU": 8.0, "GPU": 2.0}

    assert workers._room(Ray, None, 1, 100, False) == 8
    assert workers._room(Ray, None, 3, 100, False) == 2
    assert workers._room(Ray, 5, 1, 3, False) == 3  # no more than there are shards
    assert workers._room(Ray, None, 1, 100, True) == 2
    with pytest.raises(UserError, match="room for 3 workers of 3 threads each.* 8 processors"):
        workers._room(Ray, 3, 3, 100, False)
    with pytest.raises(UserError, match="room for 3 workers .*a GPU each.* 2 GPUs"):
        workers._room(Ray, 3, 1, 100, True)
    with pytest.raises(UserError, match="at least 1 worker, got 0"):
        workers._room(Ray, 0, 1, 100, False)


def test_without_ray_the_extra_is_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    source = open_instructions(made / "pool.jsonl")
    with pytest.raises(MissingExtraError, match=r"sae-apps\[ray\]"):
        write_pool_ray(EncoderSpec(str(made / "run")), source, tmp_path / "pool")
    assert list(tmp_path.iterdir()) == []


# ---- a cluster ----

SCRIPT = """
import signal, time
from sae_core import workers
from sae_apps.selection.cluster import EncoderSpec, write_pool_ray
from sae_apps.selection.embed import EmbedConfig
from sae_apps.selection.instructions import InstructionSource, RowReader, open_instructions
from sae_apps.selection.pool import FINISHED
from sae_apps.tasks.main import main
from sae_apps.tasks.progress import Progress


# A worker dies in the midst of shard 3, once; the others and its successor do the rest.
source = open_instructions(made / "pool.jsonl")
def deadly():
    for number, row in enumerate(source):
        if number == 26 and os.getpid() != driver and not (out / "died").exists():
            (out / "died").touch()
            os._exit(1)
        if os.getpid() != driver:
            (out / f"pid-{os.getpid()}").touch()
        yield row

spec = EncoderSpec(str(made / "run"), config=EmbedConfig(max_len=64))
done = []
pool = InstructionSource(source.id, lambda: RowReader(deadly()))
write_pool_ray(
    spec, pool, out / "died_once", shard_rows=8, num_workers=2, progress=done.append
)
found["progress"] = done
found["workers"] = len(list(out.glob("pid-*")))

# The command: stopped after its first finished shard, and again. The last shard waits for that,
# so that however fast the workers are, something is left to do.
class Held(workers._ShardWriter):
    def __call__(self, batch):
        until = time.monotonic() + 60
        while int(batch["item"][0]) == 5 and not (out / "go").exists():
            if time.monotonic() > until:
                raise TimeoutError("nobody stopped the command")
            time.sleep(0.01)
        return super().__call__(batch)

workers._ShardWriter = Held
argv = ["select", "--pool", str(made / "pool.jsonl"), "--target", str(made / "target.jsonl")]
argv += ["--run", str(made / "run"), "--budget", "25%", "--max-len", "64", "--shard-rows", "8"]
argv += ["--features", str(out / "stopped"), "--engine", "ray", "--out", str(out / "picks.jsonl")]
update = Progress.update
def stop(self, n=1):
    update(self, n)
    os.kill(driver, signal.SIGTERM)
Progress.update = stop
found["stopped"] = main([*argv, "--quiet"])
found["left"] = sorted(p.name for p in (out / "stopped").iterdir())
kept = next((out / "stopped").glob("shard-*")) / "manifest.json"  # whichever was first
found["stamp"] = [kept.stat().st_mtime_ns]
(out / "go").touch()
Progress.update = update
found["too_many"] = main([*argv, "--quiet", "--workers", "3"])
found["resumed"] = main([*argv, "--quiet"])
found["stamp"] += [kept.stat().st_mtime_ns]
ray.shutdown()
print("RESULT " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def clustered(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """The folder of what the cluster made, what the script found, and its stderr."""
    out = tmp_path_factory.mktemp("ray")
    return out, *run_with_ray(SCRIPT, made, out)


def test_two_workers_one_of_which_dies_write_the_same_bits(
    clustered: tuple[Path, dict, str], made: Path
) -> None:
    out, found, _ = clustered
    assert found["address"] == "127.0.0.1"
    assert (out / "died").exists() and found["workers"] >= 2
    assert arrays(out / "died_once") == arrays(made / "local")
    assert sorted(found["progress"]) == [4, 8, 8, 8, 8, 8]
    assert not list(out.glob(".died_once*"))  # nothing is left of the attempts


def test_the_command_is_stopped_and_resumed(clustered: tuple[Path, dict, str], made: Path) -> None:
    out, found, _ = clustered
    assert found["stopped"] == 143 and found["resumed"] == 0
    assert "pool.json" in found["left"] and "finished.json" not in found["left"]
    assert 1 <= sum(name.startswith("shard-") for name in found["left"]) < 6
    assert found["stamp"][0] == found["stamp"][1]  # a finished shard was kept
    assert arrays(out / "stopped") == arrays(made / "local")
    argv = ["select", "--pool", str(made / "pool.jsonl"), "--target", str(made / "target.jsonl")]
    argv += ["--run", str(made / "run"), "--budget", "25%", "--max-len", "64", "--quiet"]
    argv += ["--features", str(made / "local"), "--shard-rows", "8"]
    assert main([*argv, "--out", str(out / "local.jsonl")]) == 0
    assert (out / "local.jsonl").read_bytes() == (out / "picks.jsonl").read_bytes()
    assert len((out / "picks.jsonl").read_text().splitlines()) == 11


def test_the_command_refuses_too_many_workers_in_one_sentence(
    clustered: tuple[Path, dict, str],
) -> None:
    _, found, errors = clustered
    assert found["too_many"] == 2
    said = [line for line in errors.splitlines() if line.startswith("sae-apps: error:")]
    assert len(said) == 1 and "room for 3 workers" in said[0] and "2 processors" in said[0]


def test_the_cluster_is_ended_and_the_handler_of_sigterm_kept() -> None:
    class Ray:
        data = SimpleNamespace(DataContext=SimpleNamespace(get_current=lambda: context))
        is_initialized = staticmethod(lambda: False)
        shutdown = staticmethod(lambda: calls.append("shutdown"))

        @staticmethod
        def init(**_: object) -> None:  # as Ray does: with this the process would end by itself
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
            calls.append("init")

    calls: list[str] = []
    context = SimpleNamespace(enable_progress_bars=True)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), workers._cluster(Ray, None):
        assert signal.getsignal(signal.SIGTERM) is before and not context.enable_progress_bars
        raise ZeroDivisionError
    assert calls == ["init", "shutdown"] and context.enable_progress_bars
    Ray.is_initialized = staticmethod(lambda: True)  # of the caller: left as it is
    with workers._cluster(Ray, None):
        pass
    assert calls == ["init", "shutdown"]


def test_a_cluster_that_is_not_there() -> None:
    class Absent:
        @staticmethod
        def init(**_: object) -> None:
            raise ConnectionError("Could not find any running Ray instance.\nmore")

    with pytest.raises(UserError, match="cluster at auto, got ConnectionError: Could not find any"):
        workers._connect(Absent, "auto")
