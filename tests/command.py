"""Tests of the command line: a small real run, what a command prints, and how it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_apps.tasks.main import main
from sae_core.errors import UserError

PREFIX = "sae-apps: error: "


def installed() -> Path:
    """The installed command; the test is skipped where there is none."""
    command = Path(sys.executable).with_name("sae-apps")
    if not command.exists():
        pytest.skip(f"The package is not installed in this environment: no {command.name} command.")
    return command


def train_small(model: Path, text: Path | str, out: Path) -> str:
    """Train 128 latents for a few steps through the command; the run's folder."""
    argv = ["train", "--model", str(model), "--text", str(text), "--tokens", "2k"]
    argv += ["--d-sae", "128", "--k", "8", "--batch-size", "256", "--context-size", "64"]
    argv += ["--eval-tokens", "500", "--loss-tokens", "100", "--quiet"]
    assert main([*argv, "--out", str(out)]) == 0
    return str(out)


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    """The one JSON object that a command prints."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence on stderr of a command that refuses its input."""
    capsys.readouterr()
    code = main(list(argv))
    seen = capsys.readouterr()
    assert code == 2, seen
    lines = seen.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(PREFIX), seen.err
    assert "Traceback" not in seen.err and seen.out == ""
    return lines[0].removeprefix(PREFIX)


def one_sentence(read: Callable[[], object], match: str, kind: type[Exception] = UserError) -> None:
    """Assert that reading is refused by this kind of error, in one short sentence."""
    with pytest.raises(kind, match=match) as raised:
        read()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000
