"""Run a script that uses a Ray cluster of its own, and read what it found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import json, os, sys
from pathlib import Path
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # loopback, see workers.import_ray
import ray
import torch

made, out = Path(sys.argv[1]), Path(sys.argv[2])
driver = os.getpid()
torch.set_num_threads(1)
ray.init(
    num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27,
    logging_level="ERROR",
)
found = {"address": ray.nodes()[0]["NodeManagerAddress"]}
"""
"""What each script begins with: a cluster of two processors on loopback, and two folders."""


def run_with_ray(script: str, *paths: Path) -> tuple[dict, str]:
    """What the script, behind ``START``, printed as JSON after ``RESULT``, and its stderr.

    A process of its own, because Ray warns of its own settings and starts threads that outlive it.
    """
    pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra 'ray'.")
    argv = [sys.executable, "-W", "error", "-c", START + script, *map(str, paths)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and results, done.stdout + done.stderr
    return json.loads(results[0].removeprefix("RESULT ")), done.stderr
