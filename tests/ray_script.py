"""Run a script that uses a Ray cluster of its own, and read what it found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run_with_ray(script: str, *paths: Path) -> tuple[dict, str]:
    """What the script printed as JSON behind ``RESULT``, and its stderr.

    A process of its own, because Ray warns of its own settings and starts threads that outlive it.
    """
    pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra 'ray'.")
    argv = [sys.executable, "-W", "error", "-c", script, *map(str, paths)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and results, done.stdout + done.stderr
    return json.loads(results[0].removeprefix("RESULT ")), done.stderr
