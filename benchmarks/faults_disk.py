"""Bad disks and clocks: full, read-only, limited; two writers at once; time that jumps."""

import logging
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults_kill import finished_pieces, unbroken
from benchmarks.faults_process import contents, finish, is_clear, kill, left_over, start
from benchmarks.faults_setup import Command, clean, commands

LOG = logging.getLogger(__name__)
FULL_SHARES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95)
NAMES = ("train", "featurize", "select", "separability", "suppress", "align", "index", "geo")
Counts = dict[str, Any]
YEAR = 365 * 86_400


def disk_rows(root: Path, seed: int, only: list[str] | None) -> list[dict[str, Any]]:
    """A row for each command and trouble."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, one in commands(root).items():
        if only and name not in only:
            continue
        reference, seconds, _ = unbroken(root, one)
        size = sum((root / file).stat().st_size for file in reference)
        troubles: dict[str, Callable[[], Counts]] = {
            "limit": lambda one=one, ref=reference, size=size: limited(root, one, ref, size),
            "writers": lambda one=one, ref=reference, s=seconds: writers(root, one, ref, s, rng),
            "clock": lambda one=one, ref=reference, s=seconds: clock(root, one, ref, s, rng),
        }
        if name != "geo":  # its cache lies in the run, beside what must stay
            troubles["full"] = lambda one=one, ref=reference, size=size: full(root, one, ref, size)
            troubles["read-only"] = lambda one=one, ref=reference: read_only(root, one, ref)
        for trouble, attempt in troubles.items():
            clean(root, one.states)
            found = attempt()
            notes = found.pop("notes", [])
            rows.append({"name": f"disk {trouble} {name}"} | found)
            LOG.info("%s", rows[-1])
            for note in notes:
                LOG.warning("%s %s: %s", trouble, name, note)
        clean(root, one.states)
    return rows


def new_counts() -> Counts:
    """All zero."""
    names = ("attempts", "refused", "same result", "silently wrong", "unclear", "saved but gone")
    return dict.fromkeys(names, 0) | {"notes": []}


def judge(
    root: Path, one: Command, reference: dict[str, str], code: int, counts: Counts
) -> None:
    """Count what an attempt gave: a result must be whole, a refusal one sentence with code 2."""
    counts["attempts"] += 1
    if code == 0:
        is_same = contents(root, one.states) == reference
        counts["same result" if is_same else "silently wrong"] += 1
        if not is_same:
            found = contents(root, one.states)
            differ = {k for k in found | reference if found.get(k) != reference.get(k)}
            counts["notes"].append(f"differs in {sorted(differ)[:5]}")
        return
    told = (root / "log").read_text()
    counts["refused"] += 1
    if code != 2 or not is_clear(told):
        counts["unclear"] += 1
        counts["notes"].append(f"exit {code}: {told[-600:]}")


def tmpfs(place: Path, options: str) -> bool:
    """Mount a small disk; False where that is not permitted."""
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
                          capture_output=True)  # fmt: skip
    return done.returncode == 0


def remount(place: Path, options: str) -> None:
    """Change a mounted disk."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def unmount(place: Path) -> None:
    """Take the disk away."""
    subprocess.run(["umount", "--lazy", str(place)], check=True)
    place.rmdir()


def on_disk(root: Path, one: Command) -> Command:
    """The same command with its result on the disk at ``root/disk``, reached by a link.

    A link, so that the paths within the result are those of the reference.
    """
    (root / "disk" / "out").mkdir()
    (root / "out").symlink_to(root / "disk" / "out")
    return one


def full(root: Path, one: Command, reference: dict[str, str], size: int) -> Counts:
    """Disks of growing size; after each refusal the disk grows and the command is run again."""
    counts = new_counts()
    for share in FULL_SHARES:
        if not tmpfs(root / "disk", f"size={max(16, int(share * size) >> 10)}k"):
            counts["notes"].append("no permission to mount a disk")
            return counts
        try:
            on_disk(root, one)
            code = finish(start(one.action, root / "log"))
            judge(root, one, reference, code, counts)
            pieces = finished_pieces(root, one)
            remount(root / "disk", f"size={4 * size + (4 << 20)}")
            code = finish(start(one.action, root / "log"))
            judge(root, one, reference, code, counts)
            now = finished_pieces(root, one)
            counts["saved but gone"] += sum(now.get(k) != v for k, v in pieces.items())
            if left := left_over(root, ("disk/out",)):
                counts["notes"].append(f"left over: {left}")
        finally:
            (root / "out").unlink(missing_ok=True)
            unmount(root / "disk")
    return counts


def read_only(root: Path, one: Command, reference: dict[str, str]) -> Counts:
    """A disk that becomes read-only before the command, and half-way through it."""
    counts = new_counts()
    if not tmpfs(root / "disk", "size=64m"):
        counts["notes"].append("no permission to mount a disk")
        return counts
    try:
        on_disk(root, one)
        remount(root / "disk", "ro")
        judge(root, one, reference, finish(start(one.action, root / "log")), counts)
        remount(root / "disk", "rw")
        judge(root, one, reference, finish(start(one.action, root / "log")), counts)
        remount(root / "disk", "ro")  # a finished result may be looked at where nothing can change
        judge(root, one, reference, finish(start(one.action, root / "log")), counts)
        remount(root / "disk", "rw")
    finally:
        (root / "out").unlink(missing_ok=True)
        unmount(root / "disk")
    return counts


def limited(root: Path, one: Command, reference: dict[str, str], size: int) -> Counts:
    """A limit on the size of files (``ulimit -f``): the largest file does not fit."""
    counts = new_counts()
    largest = max((root / file).stat().st_size for file in reference) if not size else max(
        4096, size // 8
    )  # fmt: skip
    for bound in (largest // 4, largest):

        def action(bound: int = bound) -> int | None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (bound, resource.RLIM_INFINITY))
            return one.action()

        judge(root, one, reference, finish(start(action, root / "log")), counts)
        judge(root, one, reference, finish(start(one.action, root / "log")), counts)
        clean(root, one.states)
    return counts


def writers(
    root: Path, one: Command, reference: dict[str, str], seconds: float, rng: np.random.Generator
) -> Counts:
    """Two processes with one folder, the second a random time later, and once more to the end."""
    counts = new_counts()
    for _ in range(4):
        clean(root, one.states)
        first = start(one.action, root / "log-1")
        time.sleep(float(rng.uniform(0, 0.6 * seconds)))
        second = start(one.action, root / "log-2")
        codes = finish(first), finish(second)
        for number, code in enumerate(codes, start=1):
            shutil.copy(root / f"log-{number}", root / "log")
            judge(root, one, reference, code, counts)
        if 0 not in codes:
            counts["notes"].append("neither of two writers came to an end")
        judge(root, one, reference, finish(start(one.action, root / "log")), counts)
    return counts


def clock(
    root: Path, one: Command, reference: dict[str, str], seconds: float, rng: np.random.Generator
) -> Counts:
    """Time stamps of everything written moved by years, and a clock that goes back while it runs.

    A run is killed, its files get random times, and it is resumed under a clock that jumps at every
    look by up to ten years.
    """
    counts = new_counts()
    for _ in range(4):
        clean(root, one.states)
        child = start(one.action, root / "log")
        time.sleep(float(rng.uniform(0.2, 0.9) * seconds))
        kill(child)
        for state in one.states:
            top = root / state
            for path in (*top.rglob("*"), *top.parent.glob(f".{top.name}.*")):
                stamp = time.time() + float(rng.uniform(-20, 20)) * YEAR
                os.utime(path, (stamp, stamp), follow_symlinks=False)
        jumps = np.random.default_rng(int(rng.integers(1 << 31)))

        def action(jumps: np.random.Generator = jumps) -> int | None:
            real = time.time
            time.time = lambda: real() + float(jumps.uniform(-10, 10)) * YEAR
            return one.action()

        judge(root, one, reference, finish(start(action, root / "log")), counts)
    return counts


