"""``sae-apps select`` through ``main([...])`` and as installed: picks, resuming, refusals."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae_apps.selection import inputs, pool
from sae_apps.selection.config import SelectConfig
from sae_apps.selection.embed import EmbedConfig
from sae_apps.selection.select import select
from sae_apps.tasks.common import Interrupted
from sae_apps.tasks.main import main
from sae_apps.tasks.progress import Progress
from tests.command import installed, refusal, run_json, train_small

N_EACH = 40  # rows of each of the two kinds in the pool
# quick, and enough for this model to tell problems from programs
HOW = ("--max-len", "64", "--metric", "cosine", "--weights", "idf")
COMMON = (*HOW, "--shard-rows", "16", "--quiet")


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def data(
    shared_data: Path, stories260k: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """A run, a pool of word problems and programs in turns, and targets of both kinds."""
    folder = tmp_path_factory.mktemp("select")
    rows = {}
    for name, file, prompt, response in (
        ("math", "gsm8k/train.jsonl.gz", "question", "answer"),
        ("code", "mbpp/mbpp.jsonl.gz", "text", "code"),
    ):
        with gzip.open(shared_data / file, "rt", encoding="utf-8") as lines:
            records = [json.loads(next(lines)) for _ in range(N_EACH + 10)]
        rows[name] = [{"prompt": r[prompt], "response": r[response], "kind": name} for r in records]
    made = {
        "pool": write(
            folder / "pool.jsonl",
            [rows[("math", "code")[i % 2]][i // 2] for i in range(2 * N_EACH)],
        ),
        "math": write(folder / "math.jsonl", rows["math"][N_EACH:]),
        "code": write(folder / "code.jsonl", rows["code"][N_EACH:]),
        "both": write(folder / "both.jsonl", rows["math"][N_EACH:] + rows["code"][N_EACH:]),
        "seen": write(folder / "seen.jsonl", rows["math"][:5]),
    }
    text = write(
        folder / "text.jsonl", [{"text": r["prompt"]} for r in rows["math"] + rows["code"]]
    )
    run = train_small(stories260k, text, folder / "run")
    return made | {"run": run}


@pytest.fixture(scope="module")
def encoded(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool's features, made by a whole command; tests leave them as they are."""
    folder = tmp_path_factory.mktemp("encoded")
    out = str(folder / "picks.jsonl")
    argv = arguments(data, "math", out, "--scores", str(folder / "all.parquet"))
    assert main([*argv, "--features", str(folder / "features")]) == 0
    return folder


def arguments(data: dict[str, str], target: str, out: object, *more: str) -> list[str]:
    argv = ["select", "--pool", data["pool"], "--target", data[target], "--run", data["run"]]
    return [*argv, "--budget", "10%", "--out", str(out), *COMMON, *more]


def chosen(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def reusing(encoded: Path) -> tuple[str, str]:
    return "--features", str(encoded / "features")


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the pool may not be encoded."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the pool was encoded")

    monkeypatch.setattr(pool, "encode", refuse)


# ---- what it writes ----


def test_picks_are_the_original_records_of_the_best_rows(
    data: dict[str, str], encoded: Path
) -> None:
    records = chosen(Path(data["pool"]))
    picks = chosen(encoded / "picks.jsonl")
    own = [pick.pop("_sae_apps") for pick in picks]
    assert len(picks) == 8 and [one["rank"] for one in own] == list(range(8))
    assert picks == [records[one["row_id"]] for one in own]
    scores = pq.read_table(encoded / "all.parquet")
    assert scores["row_id"].to_pylist() == list(range(2 * N_EACH))
    best = np.argsort(-scores["score"].to_numpy(), kind="stable")[:8]
    assert [one["row_id"] for one in own] == best.tolist()
    assert [one["score"] for one in own] == scores["score"].to_numpy()[best].tolist()
    for one in own:
        shares = [reason["share"] for reason in one["reasons"]]
        assert 0 < sum(shares) <= 1 + 1e-6 and shares == sorted(shares, reverse=True)
        assert len(shares) == 5 and all(reason["tokens"] for reason in one["reasons"])
    kinds = [pick["kind"] for pick in picks]
    assert kinds.count("math") >= 7  # of 8; half of the pool's rows are


def test_the_command_is_the_function(data: dict[str, str], encoded: Path) -> None:
    result = select(
        str(encoded / "features"),
        data["math"],
        data["run"],
        "10%",
        config=SelectConfig(metric="cosine", weights="idf", embed=embed_of(encoded)),
    )
    own = [pick["_sae_apps"] for pick in chosen(encoded / "picks.jsonl")]
    assert result.picks["row_id"].to_pylist() == [one["row_id"] for one in own]
    assert result.picks["score"].to_pylist() == [one["score"] for one in own]


def embed_of(encoded: Path) -> EmbedConfig:
    held = json.loads((encoded / "features" / "pool.json").read_text())["identity"]
    named = {k.removeprefix("embed."): v for k, v in held.items() if k.startswith("embed.")}
    assert named["max_len"] == 64  # from the command line
    return EmbedConfig(**named)


def test_picks_load_as_a_dataset_with_one_schema(
    data: dict[str, str], encoded: Path, tmp_path: Path
) -> None:
    argv = arguments(data, "code", tmp_path / "l2.jsonl", *reusing(encoded), "--metric", "l2")
    assert main(argv) == 0
    assert {len(p["_sae_apps"]["reasons"]) for p in chosen(tmp_path / "l2.jsonl")} == {0}
    code = (  # in a process of its own: the library warns while it is imported
        "import sys, datasets\n"
        "one, two = (datasets.load_dataset('json', data_files=f, cache_dir=sys.argv[3],"
        " split='train') for f in sys.argv[1:3])\n"
        "print(one.features['_sae_apps'], len(one), one.column_names)\n"
        "both = datasets.concatenate_datasets([one, two.cast(one.features)])\n"
        "assert len(both) == 16"
    )
    files = [str(encoded / "picks.jsonl"), str(tmp_path / "l2.jsonl"), str(tmp_path / "cache")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("'rank': Value('int64')", "'score': Value('float64')", "'group': Value('string')"):
        assert part in done.stdout
    assert "['prompt', 'response', 'kind', '_sae_apps']" in done.stdout


def test_summary_for_people_and_as_json(
    data: dict[str, str], encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(data, "math", tmp_path / "picks.jsonl", *reusing(encoded))
    capsys.readouterr()
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "8 of 80 rows picked" in shown and "pool median" in shown and "latent " in shown
    found = run_json(capsys, *argv)
    assert found["counts"]["picked"] == 8 and found["method"].startswith("recommended")
    assert found["picked_score"]["min"] >= found["pool_score"]["q90"] - 1e-6
    scores = pq.read_table(encoded / "all.parquet")
    assert found["pool_length"]["mean"] == pytest.approx(scores["n_tokens"].to_numpy().mean())
    own = [pick["_sae_apps"]["reasons"] for pick in chosen(tmp_path / "picks.jsonl")]
    for one in found["reasons"]:
        shares = [r["share"] for reasons in own for r in reasons if r["latent"] == one["latent"]]
        assert one["share"] == pytest.approx(np.mean(shares)) and one["n_picks"] == len(shares)
        assert one["tokens"] and f"latent {one['latent']:>6}" in shown
    assert min(one["n_picks"] for one in found["reasons"]) < 8  # so that the divisor matters
    meta = json.loads((tmp_path / "picks.meta.json").read_text())
    assert meta["summary"] == found


def test_other_targets_need_no_model_pass_over_the_pool(
    data: dict[str, str],
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = arguments(data, "math", tmp_path / "a.jsonl")  # features in the run
    found = run_json(capsys, *argv)
    assert Path(found["features"]).parent == Path(data["run"]) / "pools"
    no_model(monkeypatch)
    other = run_json(capsys, *arguments(data, "code", tmp_path / "b.jsonl"))
    assert other["features"] == found["features"]
    kinds = [pick["kind"] for pick in chosen(tmp_path / "b.jsonl")]
    assert kinds.count("code") >= 7
    with pytest.raises(AssertionError, match="was encoded"):  # control: other settings need one
        main(arguments(data, "math", tmp_path / "c.jsonl", "--span", "prompt"))


def test_several_targets_are_groups_that_take_turns(
    data: dict[str, str], encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--target", data["code"], *reusing(encoded), "--prototypes")
    found = run_json(capsys, *arguments(data, "math", tmp_path / "picks.jsonl", *more, "group"))
    picks = chosen(tmp_path / "picks.jsonl")
    assert [p["_sae_apps"]["group"] for p in picks] == ["math", "code"] * 4
    assert sum(p["kind"] == p["_sae_apps"]["group"] for p in picks) >= 7
    assert found["groups"] == {"math": 4, "code": 4}
    assert "strategy=round_robin" in found["method"]
    argv = arguments(data, "both", tmp_path / "column.jsonl", *reusing(encoded))
    argv += ["--target.group", "kind", "--prototypes", "group"]  # the same groups, in one file
    assert main(argv) == 0
    column = chosen(tmp_path / "column.jsonl")
    assert [p["_sae_apps"]["row_id"] for p in column] == [p["_sae_apps"]["row_id"] for p in picks]
    assert main(arguments(data, "math", tmp_path / "one.jsonl", *more, "one")) == 0
    assert {p["_sae_apps"]["group"] for p in chosen(tmp_path / "one.jsonl")} == {"all"}
    found = run_json(capsys, *arguments(data, "math", tmp_path / "each.jsonl", *more, "each"))
    groups = [p["_sae_apps"]["group"] for p in chosen(tmp_path / "each.jsonl")]
    assert {name.split(":")[0] for name in groups} == found["groups"].keys() <= {"math", "code"}


def test_mona_is_the_published_method_and_says_what_differs(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*arguments(data, "both", tmp_path / "a.jsonl"), "--target.group", "kind"]
    start = argv.index(HOW[0])
    del argv[start : start + len(HOW)]
    found = run_json(capsys, *argv, "--method", "mona")
    assert found["method"] == "mona" and list(found["groups"]) == ["all"]
    first = json.loads((tmp_path / "a.meta.json").read_text())["identity"]
    assert first["select"]["metric"] == "jaccard" and first["encoding"]["embed.special"]
    file = tmp_path / "c.yaml"
    file.write_text("method: mona\nselect:\n  weights: idf\n")
    argv[argv.index("--out") + 1] = str(tmp_path / "b.jsonl")
    found = run_json(capsys, *argv, "--config", str(file))
    assert found["method"] == "mona with weights=idf"
    second = json.loads((tmp_path / "b.meta.json").read_text())["identity"]
    assert second["encoding"] == first["encoding"]
    assert second["select"] == first["select"] | {"weights": "idf"}


def test_rows_of_the_evaluation_set_are_not_picked(
    data: dict[str, str], encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = arguments(data, "math", tmp_path / "a.jsonl", *reusing(encoded), "--budget", "40")
    seen = {record["prompt"] for record in chosen(Path(data["seen"]))}
    run_json(capsys, *base)
    assert seen & {pick["prompt"] for pick in chosen(tmp_path / "a.jsonl")}  # control
    base[base.index("--out") + 1] = str(tmp_path / "b.jsonl")
    found = run_json(capsys, *base, "--evaluation", data["seen"])
    assert found["counts"]["contaminated"] == 5
    assert not seen & {pick["prompt"] for pick in chosen(tmp_path / "b.jsonl")}


# ---- files that are there ----


def test_the_same_command_twice_and_files_of_others(
    data: dict[str, str],
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "picks.jsonl"
    argv = arguments(data, "math", out, *reusing(encoded))
    first = run_json(capsys, *argv)
    before = out.read_bytes(), out.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "encode", None)  # nothing is computed again
        assert run_json(capsys, *argv) == first
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    message = refusal(capsys, *argv, "--budget", "20%")
    assert "10%" in message and "20%" in message and "--overwrite" in message
    out.write_bytes(before[0] + b"{}\n")
    assert "not what this command wrote" in refusal(capsys, *argv)
    assert out.read_bytes() == before[0] + b"{}\n"
    assert main([*argv, "--budget", "20%", "--overwrite"]) == 0
    assert len(chosen(out)) == 16
    (tmp_path / "mine.jsonl").write_text("{}\n")
    argv[argv.index(str(out))] = str(tmp_path / "mine.jsonl")
    assert "mine.jsonl is there already" in refusal(capsys, *argv)
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"
    assert main([*argv, "--overwrite"]) == 0 and len(chosen(tmp_path / "mine.jsonl")) == 8


def test_a_full_disk_leaves_no_half_written_file(
    data: dict[str, str],
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = arguments(data, "math", tmp_path / "picks.jsonl", *reusing(encoded))
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("sae_apps.tasks.select_files.atomic_write_text", full)
        assert "disk" in refusal(capsys, *argv) and list(tmp_path.iterdir()) == []
    assert main(argv) == 0


# ---- stopping ----


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_what_is_encoded_and_the_same_command_resumes(
    signum: int,
    code: int,
    data: dict[str, str],
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, update = tmp_path / "features", Progress.update
    argv = arguments(data, "math", tmp_path / "picks.jsonl", "--features", str(folder))

    def stop(self: Progress, n: int = 1) -> None:
        update(self, n)
        if self._done >= 48:  # the third shard is at work
            os.kill(os.getpid(), signum)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", stop)
        assert main(argv) == code
    assert [p.name for p in sorted(folder.glob("shard-*"))] == ["shard-00000", "shard-00001"]
    assert not (tmp_path / "picks.jsonl").exists()
    before = (folder / "shard-00001" / "features.safetensors").stat().st_mtime_ns
    assert main(argv) == 0
    assert (folder / "shard-00001" / "features.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "picks.jsonl").read_bytes() == (encoded / "picks.jsonl").read_bytes()
    assert not [p for p in tmp_path.rglob(".*")]


def test_a_signal_while_files_are_written(
    data: dict[str, str], encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(data, "math", tmp_path / "picks.jsonl", *reusing(encoded))

    def stop(*_: object, **__: object) -> None:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("sae_apps.tasks.select_files.atomic_write_text", stop)
        assert main(argv) == 143 and list(tmp_path.iterdir()) == []
    assert main(argv) == 0


def test_installed_command(data: dict[str, str], encoded: Path, tmp_path: Path) -> None:
    out = tmp_path / "picks.jsonl"
    argv = arguments(data, "math", out, *reusing(encoded))
    done = subprocess.run([installed(), *argv], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "8 of 80 rows" in done.stdout
    assert out.read_bytes() == (encoded / "picks.jsonl").read_bytes()


# ---- estimates and refusals ----


def test_dry_run_writes_nothing(
    data: dict[str, str], encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(data, "math", tmp_path / "picks.jsonl", "--dry-run", "--features")
    found = run_json(capsys, *argv, str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []
    assert (found["n_rows"], found["n_encoded"]) == (80, 0) and found["seconds"] > 0
    stored = sum(f.stat().st_size for f in encoded.glob("features/*/features.safetensors"))
    assert 0.5 < found["disk_bytes"] / stored < 2
    again = run_json(capsys, *argv, str(encoded / "features"))
    assert again["n_encoded"] == 80 and again["seconds"] == 0
    assert main([*argv, str(tmp_path / "new")]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert run_json(capsys, *argv, "x", "--evaluation", "who/knows")["missing"]


BAD_INPUT = {
    "no out": (["--out", ""], ["--out FILE.jsonl"]),
    "other suffix": (["--out", "picks.csv"], [".jsonl", "picks.csv"]),
    "no run": (["--run", "./nowhere"], ["nowhere"]),
    "no pool": (["--pool.source", "./nowhere.jsonl"], ["nowhere.jsonl"]),
    "two pools": (["--pool", "./b.jsonl"], ["one pool", "got 2"]),
    "no column": (["--pool.prompt", "body"], ["body", "prompt", "response"]),
    "no group": (["--target.group", "task"], ["task", "kind"]),
    "no budget": (["--budget", "much"], ["5%", "much"]),
    "budget over the pool": (["--budget", "81"], ["80", "81"]),
    "unknown method": (["--method", "monna"], ["mona"]),
    "unknown metric": (["--metric", "dot"], ["jaccard", "dot"]),
    "unknown option": (["--budgt", "5%"], ["--budget"]),
    "topk of groups": (
        ["--prototypes", "group", "--strategy", "topk"],
        ["'one'", "'group'", "topk"],
    ),
    "no evaluation set": (["--evaluation", "./nowhere.jsonl"], ["nowhere.jsonl"]),
    "no such dataset": (["--evaluation", "who/knows"], ["no existing file", "who/knows"]),
    "same target twice": (["--target", "MATH"], ["different names", "math"]),
    "no shard": (["--shard-rows", "0"], ["at least 1", "0"]),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_refuses(
    what: str, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, words = BAD_INPUT[what]
    flags = [data["math"] if flag == "MATH" else flag for flag in flags]
    message = refusal(capsys, *arguments(data, "math", tmp_path / "picks.jsonl"), *flags)
    for word in words:
        assert word in message, message
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_is_wrong_with_rows(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {
        "blank": write(tmp_path / "blank.jsonl", [{"prompt": " ", "response": ""}]),
        "empty": write(tmp_path / "empty.jsonl", []),
        "picked": write(tmp_path / "picked.jsonl", [{"text": "One two.", "_sae_apps": {}}]),
        "twice": write(tmp_path / "twice.jsonl", [{"text": "One two.", "id": 3}] * 2),
    }
    made = data | bad
    assert "target without text" in refusal(capsys, *arguments(made, "blank", tmp_path / "x.jsonl"))
    for name, words, more in (
        ("empty", "empty", []),
        ("picked", "'_sae_apps'", []),
        ("twice", "unique ids", ["--pool.id", "id"]),
    ):
        argv = arguments(made | {"pool": bad[name]}, "math", tmp_path / "x.jsonl", *more)
        assert words in refusal(capsys, *argv)
    assert {path.stem for path in tmp_path.iterdir()} == set(bad)


def test_refuses_another_model(
    data: dict[str, str], stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stories260k, tmp_path / "model")
    weights = next((tmp_path / "model").glob("*.safetensors"))
    from safetensors.numpy import load_file, save_file

    tensors = load_file(weights)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] * 2}, weights, {"format": "pt"})
    argv = arguments(data, "math", tmp_path / "x.jsonl", "--model", str(tmp_path / "model"))
    assert "model that the SAE" in refusal(capsys, *argv)


def test_pools_of_other_shapes_give_the_same_picks(
    data: dict[str, str], encoded: Path, tmp_path: Path
) -> None:
    records = chosen(Path(data["pool"]))
    chats = [
        {
            "talk": [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["response"]},
            ]
        }
        for r in records
    ]
    csv = "\n".join(
        ["q,a", *(",".join(map(quoted, (r["prompt"], r["response"]))) for r in records)]
    )
    (tmp_path / "pool.csv").write_text(csv)
    (tmp_path / "pool.csv.gz").write_bytes(gzip.compress(csv.encode()))
    shapes = {
        write(tmp_path / "chat.jsonl", chats): (["--pool.messages", "talk"], 7),
        str(tmp_path / "pool.csv"): (["--pool.template", "{q}\n{response}{a}"], 7),
        str(tmp_path / "pool.csv.gz"): (["--pool.prompt", "q", "--pool.response", "a"], 8),
    }
    # of 8: what joins prompt and response differs between messages, templates and pairs
    expected = {p["_sae_apps"]["row_id"] for p in chosen(encoded / "picks.jsonl")}
    for number, (file, (flags, least)) in enumerate(shapes.items()):
        out = tmp_path / f"{number}.jsonl"
        assert main([*arguments(data | {"pool": file}, "math", out), *flags]) == 0
        picks = chosen(out)
        assert len(expected & {p["_sae_apps"]["row_id"] for p in picks}) >= least
        names = {"talk"} if number == 0 else {"q", "a"}
        assert all(pick.keys() == {*names, "_sae_apps"} for pick in picks)
        row = picks[0]["_sae_apps"]["row_id"]
        assert number or picks[0]["talk"] == chats[row]["talk"]  # lists and objects stay whole


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def test_a_dataset_of_the_hub_is_read_at_a_fixed_commit(
    data: dict[str, str],
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import datasets
    import huggingface_hub

    asked = []

    class Hub:
        def dataset_info(self, name: str) -> SimpleNamespace:
            asked.append(name)
            return SimpleNamespace(sha="0123456789abcdef")

    def load(name: str, configuration: str | None, **more: str) -> datasets.Dataset:
        asked.append((name, configuration, more))
        return datasets.Dataset.from_list(chosen(Path(data["pool"])))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load)
    argv = arguments(data | {"pool": "who/knows:part"}, "math", tmp_path / "x.jsonl")
    found = run_json(capsys, *argv, "--pool.split", "test")
    more = {"split": "test", "revision": "0123456789abcdef"}
    assert asked == ["who/knows", ("who/knows", "part", more)]
    assert "who/knows:part/test@0123456789ab" in found["provenance"]["data_id"]
    assert (tmp_path / "x.jsonl").read_bytes() == (encoded / "picks.jsonl").read_bytes()
