"""``sae-apps doctor``: what is installed, which devices there are, what is cached, what is free."""

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from .common import PROG, StopSignal, run_command, size
from .parsing import CommandParser

SHARED_MEMORY = Path("/dev/shm")  # where torch's workers exchange tensors on Linux
GEMM_SIZE = 1024


def main(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "doctor",
        "Show what is installed, which devices there are, what is cached and what is free. "
        "Changes nothing.",
        f"{PROG} doctor --json",
        has_settings=False,
    )
    options = parser.parse(argv)

    def work(_stop: StopSignal) -> tuple[Any, str]:
        report = examine()
        return report, as_text(report)

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)


def examine() -> dict[str, Any]:
    """Everything that ``doctor`` shows, as JSON types."""
    from sae_core.download import cache_dir
    from sae_core.extras import faiss_conflict

    problems = [text for text in (faiss_conflict(),) if text]
    packages, extras = _packages()
    missing = [name for name, entry in packages.items() if entry["version"] is None]
    if missing:
        problems.append(f"Missing: {', '.join(missing)}; run pip install {PROG}.")
    writable = {"temporary folder": _is_writable(Path(tempfile.gettempdir()))}
    if SHARED_MEMORY.exists():
        writable["shared memory"] = _is_writable(SHARED_MEMORY)
    problems += [f"The {name} cannot be written." for name, good in writable.items() if not good]
    cache = cache_dir()
    return {
        "ok": not problems,
        "problems": problems,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "sae_apps": version(PROG),
        "torch": _torch() if packages.get("torch", {}).get("version") else None,
        "packages": packages,
        "extras": extras,
        "cache": {"folder": str(cache), "entries": _cached(cache)},
        "memory": _memory(),
        "disk": {
            name: {"folder": str(folder), "free_bytes": shutil.disk_usage(folder).free}
            for name, folder in (
                ("cache", _existing(cache)),
                ("current folder", Path.cwd()),
                ("temporary folder", Path(tempfile.gettempdir())),
            )
        },
        "writable": writable,
    }


def _packages() -> tuple[dict[str, Any], dict[str, Any]]:
    """Installed versions of the dependencies, and of each extra with the command that adds it."""
    needed: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    for line in requires(PROG) or []:
        requirement, _, marker = line.partition(";")
        name = requirement.strip()
        for stop in "<>=!~[ (":
            name = name.partition(stop)[0]
        try:
            found = version(name)
        except PackageNotFoundError:
            found = None
        entry = {"version": found, "wanted": requirement.strip()[len(name) :].strip()}
        if "extra ==" not in marker:
            needed[name] = entry
            continue
        extra = marker.partition("extra ==")[2].strip().strip("\"')")
        there = extras.setdefault(
            extra, {"packages": {}, "install": f'pip install "{PROG}[{extra}]"'}
        )
        there["packages"][name] = entry
    for entry in extras.values():
        entry["installed"] = all(one["version"] for one in entry["packages"].values())
    return needed, extras


def _torch() -> dict[str, Any]:
    import torch

    devices = [
        {
            "name": torch.cuda.get_device_name(i),
            "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
        }
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_devices": devices,
        "gemm_gflops": {
            "float32": round(gemm_flops(torch.float32) / 1e9),
            "bfloat16": round(gemm_flops(torch.bfloat16) / 1e9),
        },
    }


def gemm_flops(dtype: Any, device: str = "cpu", repeats: int = 3) -> float:
    """Floating-point operations a second of a square matrix product; the best of ``repeats``."""
    import torch

    a = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device)
    best = float("inf")
    for number in range(repeats + 1):
        start = time.perf_counter()
        # Reading one element waits for an accelerator's queue.
        float((a @ a)[0, 0])
        if number:  # the first product also pays for the library's set-up
            best = min(best, time.perf_counter() - start)
    return 2 * GEMM_SIZE**3 / best


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError:
        return False
    return True


def _memory() -> dict[str, int | None]:
    """Installed and available bytes; None where the system does not say."""
    total = available = None
    names = getattr(os, "sysconf_names", {})
    if {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return {"total_bytes": total, "available_bytes": available}


def _cached(cache: Path) -> list[dict[str, Any]]:
    """The models and texts in the cache, with their sizes."""
    entries = []
    for path in sorted(cache.glob("*/*")):
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        name = path.relative_to(cache).as_posix()
        entries.append({"name": name, "bytes": sum(p.stat().st_size for p in files)})
    return entries


def as_text(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = [
        f"sae-apps {report['sae_apps']}, Python {report['python']['version']}, {report['platform']}"
    ]
    if torch := report["torch"]:
        lines.append(
            f"torch {torch['version']}: {torch['threads']} threads, {torch['cpu_capability']}, "
            f"matrix product {torch['gemm_gflops']['float32']:,} GFLOP/s in float32, "
            f"{torch['gemm_gflops']['bfloat16']:,} in bfloat16"
        )
        names = [f"{d['name']} ({size(d['memory_bytes'])})" for d in torch["cuda_devices"]]
        lines.append(f"CUDA devices: {', '.join(names) or 'none'}")
    lines.append("\npackages:")
    for name, entry in report["packages"].items():
        lines.append(f"  {name:<16} {entry['version'] or 'MISSING'}")
    lines.append("\nextras:")
    for name, extra in report["extras"].items():
        parts = ", ".join(
            f"{package} {entry['version'] or '-'}" for package, entry in extra["packages"].items()
        )
        hint = "" if extra["installed"] else f"   add with: {extra['install']}"
        lines.append(f"  {name:<8} {parts}{hint}")
    lines.append(f"\ncache {report['cache']['folder']}:")
    lines += [f"  {e['name']:<40} {size(e['bytes'])}" for e in report["cache"]["entries"]]
    if not report["cache"]["entries"]:
        lines.append("  empty")
    memory = report["memory"]
    if memory["total_bytes"]:
        free = size(memory["available_bytes"]) if memory["available_bytes"] else "an unknown amount"
        lines.append(f"\nmemory: {free} available of {size(memory['total_bytes'])}")
    for name, disk in report["disk"].items():
        lines.append(f"disk, {name}: {size(disk['free_bytes'])} free ({disk['folder']})")
    for name, good in report["writable"].items():
        lines.append(f"{name}: {'writable' if good else 'NOT writable'}")
    lines.append("\nproblems:" if report["problems"] else "\nno problems found")
    lines += [f"  {text}" for text in report["problems"]]
    return "\n".join(lines)
