"""Code of README and docs runs, commands parse, links lead on, tables are those of the results."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {page: page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = list(dict.fromkeys(re.findall(r"^sae-apps .*(?:\\\n.*)*", TEXT, re.MULTILINE)))


def test_there_is_something_to_check():
    assert len(BLOCKS) >= 3 and len(COMMANDS) >= 3 and "<!-- table:" in TEXT
    assert len(PAGES) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", PAGES[page])
    assert links
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("block", [b for b in BLOCKS if "runs/demo" not in b])
def test_code_blocks_run(block, capsys):
    if "lm_eval" in block:
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness (lm_eval) is not installed.")
    if "smollm2" in block:
        from sae_core.errors import UserError
        from sae_core.models import load_model

        try:
            load_model("smollm2-135m")
        except UserError as error:
            pytest.skip(f"The embedded model cannot be had here: {error}")
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    last = block.strip().splitlines()[-1]
    assert "print" not in last or capsys.readouterr().out
    assert len(names) > 1, "the block defines something"


def test_the_block_on_a_finished_run(tmp_path, monkeypatch):
    import numpy as np
    import pyarrow as pa
    from scipy import sparse

    from sae_core import SAE, Provenance, SAEConfig, SparseFeatures, save_features, save_sae

    monkeypatch.chdir(tmp_path)
    dense = np.eye(16, dtype=np.float32)[:10] * 2 + np.eye(16, k=3, dtype=np.float32)[:10]
    rows = pa.table({"row_id": np.arange(10), "text": [f"text {i}" for i in range(10)]})
    provenance = Provenance("m", "r", "layers.1.out", "h", "d", "0", "v")
    acts = sparse.csr_array(dense)
    save_sae(tmp_path / "runs/demo/sae", SAE(SAEConfig(4, 16, k=2)))
    save_features(tmp_path / "runs/demo/features", SparseFeatures(acts, rows, provenance))
    (block,) = [b for b in BLOCKS if "runs/demo/features" in b]
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["rows"].tolist() == [9] and names["latents"].tolist() == [9, 12]


@pytest.mark.parametrize("mark", ["why(", "Trainer("])
def test_the_blocks_that_select(mark, stories260k, tmp_path, monkeypatch, capsys):
    from sae_apps.tasks.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Tom has 2 dogs and 3 cats. How many pets has he? 5\n" * 99)
    flags = ["--text", "text.txt", "--tokens", "2k", "--d-sae", "128", "--k", "8", "--quiet"]
    flags += ["--batch-size", "256", "--eval-tokens", "100", "--loss-tokens", "50"]
    assert main(["train", "--model", str(stories260k), *flags, "--out", "runs/demo"]) == 0
    capsys.readouterr()
    (block,) = [b for b in BLOCKS if "load_encoder" in b and mark in b]
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    said = capsys.readouterr().out
    if mark == "why(":
        assert len(names["picks"]) == 1 and "'prompt'" in said
    else:
        assert len(names["rows"]) == 8 and float(said.split()[-1]) > 0  # loss after two steps


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, capsys):
    from sae_apps.tasks.main import main

    flags = shlex.split(command.replace("\\\n", " "))[1:]
    assert _code(main, [*flags, "--print-config"]) == 0
    assert "run" in capsys.readouterr().out
    assert _code(main, [*flags, "--no-such-flag", "1"]) == 2


def _code(main, flags) -> int:
    try:
        return main(flags)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("module", ["tables", "api_reference"])
def test_written_pages_are_those_of_results_and_docstrings(module):
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--check"], cwd=ROOT, capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()
