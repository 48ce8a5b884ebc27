"""Small real inputs of the suites of faults and fuzz: texts, a run on stories260k, the commands."""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT
from benchmarks.faults_process import beside, command, finish, start

DATA = ROOT.parent / "shared" / "data"
WORDS = (("Lily", "Tom", "Sam", "Ben"), ("cat", "dog", "bird", "fish"))
SMALL = ("--d-sae", "128", "--k", "8", "--batch-size", "256", "--context-size", "64", "--quiet")


@dataclass(frozen=True)
class Command:
    """One long command in a folder of its own."""

    name: str
    """As in ``sae-apps NAME``, or index."""
    argv: tuple[str, ...]
    """Its arguments; none for index."""
    action: Callable[[], int]
    """What a child runs."""
    states: tuple[str, ...]
    """Everything that it writes, from the root."""
    final: str
    """The file that is written last."""


def write_lines(path: Path, records: list[dict]) -> Path:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def problems(n: int, data: Path = DATA) -> list[dict]:
    """The first word problems of gsm8k."""
    with gzip.open(data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(next(lines)) for _ in range(n)]


def write_inputs(root: Path, data: Path = DATA) -> None:
    """Texts, a pool with targets, places, labelled texts and items."""
    root.mkdir(parents=True, exist_ok=True)
    found = problems(330, data)
    write_lines(root / "text.jsonl", [{"text": r["question"]} for r in found[:300]])
    rows = [{"prompt": r["question"], "response": r["answer"]} for r in found]
    write_lines(root / "pool.jsonl", rows[:240])
    write_lines(root / "target.jsonl", rows[300:310])
    rng = np.random.default_rng(0)
    lines = ["name,lat,lon,admin"]
    for i in range(160):
        words, east = WORDS[i % 2], 15 * (i % 2)
        name = f"{words[i // 2 % 4]} {words[i // 8 % 4]}"
        lat, lon = rng.uniform(40, 50), rng.uniform(0, 5) + east
        lines.append(f"{name},{lat:.4f},{lon:.4f},{('West', 'East')[i % 2]}")
    (root / "places.csv").write_text("\n".join(lines) + "\n")
    labelled = [
        {"text": f"One day {WORDS[0][i % 4]} saw a {thing} in the park. The {thing} was big.",
         "label": label, "pair": i}
        for i in range(40) for label, thing in (("dog", "happy dog"), ("car", "red car"))
    ]  # fmt: skip
    write_lines(root / "labelled.jsonl", labelled)
    items = [
        {"text": word, "lat": float(rng.uniform(-5, 5)), "lon": 100 * k + float(rng.uniform(-5, 5))}
        for k, words in enumerate(WORDS) for word in words
    ]  # fmt: skip
    write_lines(root / "items.jsonl", items)


def train_arguments(root: Path, out: str, model: Path, tokens: str = "20k") -> list[str]:
    """A run of a second or two: three shards, a checkpoint every 10 steps."""
    argv = ["train", "--model", str(model), "--text", str(root / "text.jsonl"), "--tokens", tokens]
    argv += [*SMALL, "--eval-tokens", "500", "--loss-tokens", "100", "--checkpoint-every", "10"]
    return [*argv, "--train.log_every", "5", "--out", str(root / out)]


def sweep_arguments(root: Path, model: Path) -> list[str]:
    """Three SAEs on two hook points, of a few steps each."""
    argv = train_arguments(root, "out", model, "10k")[1:]
    argv = ["--widths" if arg == "--d-sae" else arg for arg in argv]
    return ["sweep", *argv, "--hooks", "layers.1.out", "layers.3.out", "--seeds", "0", "1"]


def prepare(root: Path, data: Path = DATA) -> None:
    """Inputs, and a finished run with features in ``root/run``."""
    write_inputs(root, data)
    model = data / "stories260k"
    for argv in (
        train_arguments(root, "run", model),
        ["featurize", "--run", str(root / "run"), "--text", str(root / "text.jsonl"), "--quiet"],
    ):
        child = start(command(argv), root / "log")
        if finish(child):
            raise RuntimeError((root / "log").read_text())


def commands(root: Path, data: Path = DATA) -> dict[str, Command]:
    """Every long command over the inputs of ``prepare``."""
    run, out = str(root / "run"), str(root / "out")
    labelled = ["--data", str(root / "labelled.jsonl"), "--group", "pair"]
    argvs = {
        "train": train_arguments(root, "out", data / "stories260k"),
        "sweep": sweep_arguments(root, data / "stories260k"),
        "featurize": ["featurize", "--run", run, "--text", str(root / "text.jsonl"), "--out", out,
                      "--quiet"],
        "select": ["select", "--run", run, "--pool", str(root / "pool.jsonl"), "--target",
                   str(root / "target.jsonl"), "--out", f"{out}/picks.jsonl", "--features",
                   f"{out}/pool", "--shard-rows", "32", "--scores", f"{out}/scores.parquet",
                   "--max-len", "64", "--quiet"],
        "geo": ["geo", "--run", run, "--places", str(root / "places.csv"), "--out", out, "--top",
                "2", "--permutations", "199", "--maps", "none", "--quiet"],
        "separability": ["separability", "--run", run, *labelled, "--out", out, "--units",
                         "latents,residual", "--quiet"],
        "suppress": ["suppress", "--run", run, *labelled, "--concept", "dog", "--out", out,
                     "--n-units", "8", "--units", "residual", "--evaluate", "--strengths", "0,1",
                     "--n-draws", "20", "--quiet"],
        "align": ["align", "--run", run, "--items", str(root / "items.jsonl"), "--out", out,
                  "--permutations", "9999", "--n-boot", "500", "--quiet"],
    }  # fmt: skip
    finals = {"train": "results.json", "sweep": "summary.json", "select": "picks.meta.json"}
    states = {"geo": ("out", "run/places")}
    made = {
        name: Command(
            name, tuple(argv), command(argv), states.get(name, ("out",)),
            f"out/{finals.get(name, 'manifest.json')}",
        )
        for name, argv in argvs.items()
    }  # fmt: skip
    return made | {"index": Command("index", (), index(root), ("out",), "out/manifest.json")}


def index(root: Path) -> Callable[[], int]:
    """Build the search index of the run's features, if it is not there whole."""

    def action() -> int:
        from sae_apps.selection.index import SparseIndex
        from sae_apps.tasks.common import run_guarded
        from sae_core.store import load_features

        def body() -> None:
            if (root / "out" / "manifest.json").exists():
                SparseIndex.load(root / "out")
                return
            SparseIndex.build([load_features(root / "run" / "features")], folder=root / "out")

        return run_guarded(body)

    return action


def clean(root: Path, states: tuple[str, ...]) -> None:
    """Remove everything that a command wrote, unfinished work beside it too."""
    for state in states:
        top = root / state
        for path in (top, *beside(top)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
