"""Damage every kind of file that is read back; each damage must be refused or change nothing."""

import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults_process import add, finish, start
from benchmarks.faults_readers import Target, targets

LOG = logging.getLogger(__name__)
KINDS = ("flip", "flip", "flip", "flip", "cut", "zeros", "grown")
REGIONS = ("head", "header", "inside", "tail")
LIMIT_S = 30
Damage = tuple[str, str, str, int, int]  # file, kind, region, place, bit


@dataclass(frozen=True)
class Outcome:
    """What reading a damaged file gave."""

    damage: Damage
    what: str
    """refused, same, wrong, unclear (more than one sentence), crashed or hung."""
    told: str
    """The message."""


def draw(files: list[Path], top: Path, n: int, rng: np.random.Generator) -> list[Damage]:
    """Damages spread over the files, and in each over its regions."""
    found: list[Damage] = []
    for i in range(n):
        file = files[i % len(files)]
        size = max(1, file.stat().st_size)
        region = REGIONS[int(rng.integers(len(REGIONS)))]
        spans = {
            "head": (0, 64), "header": (0, 2048), "inside": (0, size), "tail": (size - 256, size),
        }  # fmt: skip
        low, high = spans[region]
        place = int(rng.integers(max(0, low), min(size, high)))
        kind = KINDS[int(rng.integers(len(KINDS)))]
        name = file.relative_to(top).as_posix()
        found.append((name, kind, region, place, int(rng.integers(8))))
    return found


def damaged(content: bytes, kind: str, place: int, bit: int) -> bytes:
    """The bytes after one damage."""
    if kind == "cut":
        return content[:place]
    if kind == "grown":
        return content + bytes([bit + 1]) * (1 + place % 512)
    found = bytearray(content)
    if kind == "zeros":
        found[place : place + 512] = bytes(len(found[place : place + 512]))
    elif place < len(found):
        found[place] ^= 1 << bit
    return bytes(found)


def flip_rows(root: Path, n: int, seed: int, only: list[str] | None) -> list[dict[str, Any]]:
    """A row for each kind of file."""
    rows = []
    for number, target in enumerate(targets(root)):
        if only and target.name not in only:
            continue
        rng = np.random.default_rng([seed, number])
        files = sorted(p for p in target.folder.rglob("*") if p.is_file() and target.takes(p.name))
        outcomes = try_all(root, target, draw(files, target.folder, n, rng))
        counts: dict[str, int] = {}
        for one in outcomes:
            add(counts, one.what)
            if one.what not in ("refused", "same"):
                LOG.warning("%s %s: %s: %s", target.name, one.what, one.damage, one.told[-300:])
        rows.append(
            {"name": f"flip {target.name}", "files": len(files), "damages": len(outcomes),
             "refused": counts.get("refused", 0), "same result": counts.get("same", 0),
             "silently wrong": counts.get("wrong", 0), "unclear": counts.get("unclear", 0),
             "crashed": counts.get("crashed", 0) + counts.get("hung", 0)}
        )  # fmt: skip
        LOG.info("%s", rows[-1])
    return rows


def try_all(root: Path, target: Target, damages: list[Damage]) -> list[Outcome]:
    """One child after the other works through the damages; one that dies is replaced."""
    results = root / f"flips-{target.name}.jsonl"
    results.unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    done = 0
    while done < len(damages):
        rest = damages[done:]
        code = finish(start(partial(_work, root, target, rest, results), root / "log"), 3600)
        lines = results.read_text().splitlines() if results.exists() else []
        outcomes = [Outcome(tuple(d), what, told) for d, what, told in map(json.loads, lines)]
        done = len(outcomes)
        if code and done < len(damages):
            what = "hung" if code == -signal.SIGALRM else "crashed"
            told = f"exit {code}: {(root / 'log').read_text()[-300:]}"
            _note(results, damages[done], what, told)
            done += 1
            outcomes.append(Outcome(damages[done - 1], what, told))
    return outcomes


def _note(results: Path, damage: Damage, what: str, told: str) -> None:
    with open(results, "a", encoding="utf-8") as out:
        out.write(json.dumps([damage, what, told]) + "\n")


def _work(root: Path, target: Target, damages: list[Damage], results: Path) -> None:
    whole, place = root / f"whole-{target.name}", target.folder
    if not whole.exists():
        shutil.copytree(place, whole)
    restore(whole, place)
    read = target.open()
    expected = digest_of(read)
    for damage in damages:
        name, kind, _, where, bit = damage
        restore(whole, place)
        content = (place / name).read_bytes()
        bad = damaged(content, kind, where, bit)
        os.unlink(place / name)  # never in place: a mapped file would change under its reader
        (place / name).write_bytes(bad)
        signal.alarm(LIMIT_S)
        what, told = _outcome(read, expected)
        signal.alarm(0)
        _note(results, damage, what, told)
    restore(whole, place)


def _outcome(read: Callable[[], Any], expected: str) -> tuple[str, str]:
    from sae_core.errors import UserError

    try:
        found = digest_of(read)
    except UserError as error:
        told = str(error)
        one = "\n" not in told and len(told) < 600 and "Traceback" not in told
        return ("refused" if one else "unclear"), told
    except Exception as error:  # a defect: what a user would see is a traceback
        return "crashed", f"{type(error).__name__}: {error}"
    return ("same" if found == expected else "wrong"), ""


def digest_of(read: Callable[[], Any]) -> str:
    """sha256 of what a reader gives."""
    digest = hashlib.sha256()
    for part in read():
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"|")
    return digest.hexdigest()


def restore(whole: Path, place: Path) -> None:
    """Make ``place`` equal ``whole`` again."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place)
