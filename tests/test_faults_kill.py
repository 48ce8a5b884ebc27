"""Kills at random moments and damage at every place, small: the suites run hundreds of each."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from sae_core.checkpoint import load_checkpoint, save_checkpoint
from sae_core.sae import SAE, SAEConfig
from sae_core.train import TrainConfig, TrainState, train

ROOT = Path(__file__).resolve().parents[1]


def checkpoints(folder: Path, steps: int = 30) -> TrainConfig:
    """Checkpoints at steps 10, 20 and 30 of a tiny run; the first is kept aside and put back."""
    config = TrainConfig(steps=steps, batch_size=16, log_every=10)
    start = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_in=4, d_sae=8, k=2, kind="topk"), generator=start)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(16, 4, generator=generator) for _ in range(steps)]
    state = TrainState()
    for record in train(sae, iter(batches), config, state):
        save_checkpoint(folder, sae, state, config)
        if record.step == 10:
            shutil.copytree(folder / "step-00000010", folder.parent / "first")
    return config


def test_half_an_old_checkpoint_is_cleared_away_by_the_next_load(tmp_path: Path) -> None:
    """A kill while the third is deleted leaves a part of it, and no later save may ever come."""
    config = checkpoints(tmp_path / "c")
    shutil.copytree(tmp_path / "first", tmp_path / "c" / "step-00000010")
    (tmp_path / "c" / "step-00000010" / "state.json").unlink()
    found = load_checkpoint(tmp_path / "c", config)
    assert found is not None and found[1].step == 30
    assert sorted(os.listdir(tmp_path / "c")) == ["step-00000020", "step-00000030"]


def test_an_old_checkpoint_that_is_needed_stays(tmp_path: Path) -> None:
    config = checkpoints(tmp_path / "c")
    shutil.copytree(tmp_path / "first", tmp_path / "c" / "step-00000010")
    for step in (20, 30):
        (tmp_path / "c" / f"step-{step:08d}" / "state.safetensors").write_bytes(b"")
    found = load_checkpoint(tmp_path / "c", config)
    assert found is not None and found[1].step == 10
    assert len(os.listdir(tmp_path / "c")) == 3


# --- the suite, small, on a writer that is atomic and on one that is not -------------------------

SUITE = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from benchmarks.faults_kill import kill_row, kill_trials
from benchmarks.faults_setup import Command
from sae_core.store import atomic_folder

root = Path(sys.argv[1])

def write(folder):
    for name in "abcdef":
        with open(folder / name, "wb", buffering=0) as out:
            for _ in range(4):
                out.write(os.urandom(0) + name.encode() * 1000)
                time.sleep(0.006)

def whole():
    if not (root / "out").exists():
        with atomic_folder(root / "out") as temp:
            write(temp)

def broken():
    if not (root / "out").exists():
        (root / "out").mkdir()
        write(root / "out")
        (root / "out" / "manifest.json").write_text("{}")

for name, action in (("whole", whole), ("broken", broken)):
    one = Command(name, (), action, ("out",), "out/manifest.json")
    tally = kill_trials(root, one, 8, np.random.default_rng(0))
    print(json.dumps(kill_row(name, tally)))
"""


def test_random_kills_find_the_writer_that_is_not_atomic(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUITE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    whole, broken = (json.loads(line) for line in done.stdout.splitlines())
    assert whole["kills"] >= 8 and whole["during"] >= 1
    assert whole["silently wrong"] == whole["refused"] == whole["left over"] == 0
    assert whole["same result"] == whole["trials"] > 0
    assert broken["silently wrong"] >= 1
