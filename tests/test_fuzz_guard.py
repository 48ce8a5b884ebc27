"""The fuzzer itself: its guard sees what it must, and a short seeded run of it finds nothing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fuzz_mutate import mutate_json, mutate_npy, mutate_safetensors, mutator

ROOT = Path(__file__).resolve().parents[1]

GUARD = """
import json, os, pickle, subprocess, sys, time
from pathlib import Path
import numpy as np
from benchmarks.fuzz_guard import Watch, judged, limit_memory
from benchmarks import fuzz_guard
from sae_core.errors import UserError

root = Path(sys.argv[1])
(root / "in").mkdir()
fuzz_guard.CPU_S = 0.3
fuzz_guard.limit_time.__wrapped__.__defaults__ = (0.3, 30.0)
watch = Watch(str((root / "in").resolve()))
watch.install()
limit_memory()

def refuse(): raise UserError("Expected a, got b.")
def babble(): raise UserError("a\\nb")
def spin():
    while True: pass
def escape(): (root / "in" / ".." / "outside").write_text("x")
def remove(): os.remove(root / "victim")
def run(): subprocess.run(["true"])
def unpickle(): pickle.loads(pickle.dumps(np.float32))
def inside(): (root / "in" / "fine").write_text("x")
(root / "victim").write_text("x")
acts = {"accepted": inside, "refused": refuse, "unclear": babble, "traceback": lambda: {}["x"],
        "memory": lambda: np.zeros(1 << 40), "hung": spin}
found = {name: judged(act, watch)[0] for name, act in acts.items()}
found |= {f"outside {act.__name__}": judged(act, watch)[0] for act in
          (escape, remove, run, unpickle)}
print(json.dumps(found))
"""

SHORT = """
import json, sys
from functools import partial
from pathlib import Path
import numpy as np, pyarrow as pa
from scipy import sparse
from benchmarks import fuzz, fuzz_corpus, fuzz_readers
from benchmarks.fuzz_readers import Reader
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance
from sae_core.sae import SAE, SAEConfig, save_sae
from sae_core.store import save_features

root = Path(sys.argv[1])
(root / "work").mkdir()
save_sae(root / "sae", SAE(SAEConfig(d_in=4, d_sae=8, k=2, kind="topk")), {"hook_point": "x"})
acts = sparse.csr_array(np.array([[0, 1, 2], [3, 0, 0]], dtype=np.float32))
table = pa.table({"row_id": [7, 3], "text": ["a", "b"]})
origin = Provenance("m", "r", "layers.0.out", "s", "d", "0", "v")
save_features(root / "features", SparseFeatures(acts, table, origin))
lines = [json.dumps({"prompt": f"p{i}", "response": "r"}) + "\\n" for i in range(6)]
(root / "pool.jsonl").write_text("".join(lines))
fuzz_corpus.text_files(root / "texts", root)
readers = [
    Reader("sae", root / "sae", fuzz_readers._sae),
    Reader("features", root / "features", fuzz_readers._features),
    Reader("texts", root / "texts", fuzz_readers._texts, fuzz_readers.TEXTS),
]
for number, reader in enumerate(readers):
    make = partial(fuzz.file_inputs, reader, number)
    print(json.dumps(fuzz.run_inputs(root, reader.name, int(sys.argv[2]), make)))
"""


def script(code: str, *args: object) -> list[dict]:
    """Run code in a process of its own: limits, hooks and forks do not stay in this one."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_guard_sees_each_kind_of_harm(tmp_path: Path) -> None:
    (found,) = script(GUARD, tmp_path)
    assert {name: name.split()[0] for name in found} == found


def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    for counts in script(SHORT, tmp_path, 60):
        assert sum(counts.values()) == 60
        assert set(counts) == {"accepted", "refused"}, counts
        assert counts["refused"] > 10 and counts["accepted"] > 1


def test_mutations_are_seeded_and_change_something() -> None:
    good = json.dumps({"a": [1, {"b": "x"}], "c": None}).encode()
    runs = [
        [mutator("x.json")(good, np.random.default_rng([seed, i])) for i in range(40)]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert sum(one != good for one in runs[0]) >= 36
    value = {"a": [1, {"b": "x"}]}
    for i in range(50):
        mutate_json(value, np.random.default_rng(i))
    assert value == {"a": [1, {"b": "x"}]}  # the example itself is never touched


@pytest.mark.parametrize("change", [mutate_safetensors, mutate_npy])
def test_mutated_headers_keep_their_form_often_enough(change, tmp_path: Path) -> None:
    from safetensors.numpy import save

    np.save(tmp_path / "a.npy", np.arange(6))
    good = save({"x": np.arange(6)}) if change is mutate_safetensors else None
    good = good or (tmp_path / "a.npy").read_bytes()
    found = [change(good, np.random.default_rng(i)) for i in range(60)]
    assert len(set(found)) > 20
    if change is mutate_npy:
        assert sum(b"1152921504606846976" in one for one in found) >= 3
