"""Hostile values for every option of every command, as a user or a script might pass them."""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults_process import is_clear
from benchmarks.faults_setup import commands
from benchmarks.fuzz_monet import monet_arguments
from benchmarks.fuzz_mutate import TOKENS, VALUES, pick

# Values that look right and are not, beside those of `fuzz_mutate`.
WORDS = (
    "0", "-1", "1", "2", "1e400", "nan", "inf", "-inf", "1152921504606846976", "0.5", "1.0", "null",
    "true", "all", "auto", "none", "[1,2", "{a: b}", "5%", "-5%", "nan%", "1000000%", "1k", "1e3k",
    "k", "a,b", ",", ",,", "0,0", "1,0", "IT", "US:XX", "world", "layers.99.out", "layers.-1.out",
    "layers.1.mlp.in", "cpu", "cuda:99", "tpu", "float64", "{}", "{}{}", "{} {x}", "{prompt",
    "{0.__class__}", "{response}", "--", "-", "=", "\\", "http://x.invalid/a", "owner/name", "é",
    "a\nb", "../../x", "/dev/null", "/proc/self/mem", "/", ".", "x.parquet", "x.jsonl", "*.json",
)  # fmt: skip
FREE = {"--help", "-h", "--print_config", "--config", "--json", "--verbose", "--quiet"}
QUICK = {"doctor", "demo"}
BASE = ("train", "sweep", "featurize", "select", "geo", "separability", "suppress", "align")
# Commands of a second or less, which often run to their end.
WHOLE = ("convert", "monet")
OUT = "out"  # where they write, in the folder of the child


def option_names() -> list[str]:
    """The commands whose options are fuzzed."""
    from sae_apps.tasks.main import COMMANDS

    return [name for name in COMMANDS if name not in QUICK]


def flags_of(name: str) -> list[str]:
    """Every option of a command, the short forms included."""
    out = io.StringIO()
    from sae_apps.tasks.main import main

    with redirect_stdout(out):
        main([name, "--help"])
    words = out.getvalue().replace(",", " ").split()
    found = {word for word in words if word.startswith("--") and len(word) > 2}
    return sorted(word for word in found if word not in FREE and "=" not in word)


def base_arguments(root: Path, name: str) -> list[str]:
    """A good command line that only estimates."""
    if name in BASE:
        argv = list(commands(root)[name].argv)
        argv = [arg.replace(str(root / "out"), OUT) for arg in argv]
    elif name == "convert":
        argv = [name, str(root / "run"), "--to", "sae_lens", "--out", OUT]
    elif name == "monet":
        argv = monet_arguments(root / "good" / "monet", OUT)
    else:
        argv = [name, *["--run"] * (name != "identify"), str(root / "run")]
    return [*argv, "--dry-run"]


def option_inputs(
    root: Path, name: str, seed: int, work: Path
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Command lines with one to three hostile options, without end; the first is the good one."""
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    flags, base = flags_of(name), base_arguments(root, name)
    yield "nothing", partial(run_command, base)
    while True:
        argv, is_elsewhere = list(base), False
        for _ in range(int(rng.integers(1, 4))):
            flag, value = pick(rng, flags), _value(rng)
            if flag in ("--dry-run", "--dry_run"):
                continue
            is_elsewhere |= flag == "--out"
            argv += [f"{flag}={value}"] if rng.random() < 0.5 else [flag, value]
            if rng.random() < 0.05:
                argv.append(value)
        if rng.random() < 0.03:
            argv[0] = pick(rng, WORDS)
        told = repr(argv[len(base) :])[:300]
        if name in WHOLE and not is_elsewhere and rng.random() < 0.5:
            argv.remove("--dry-run")
            shutil.rmtree(work.parent / OUT, ignore_errors=True)
            told = f"whole: {told}"
        yield told, partial(run_command, argv)


def _value(rng: np.random.Generator) -> str:
    what = rng.random()
    if what < 0.7:
        return str(pick(rng, WORDS))
    if what < 0.9:
        return str(pick(rng, VALUES)).replace("\ud800", "?")
    return pick(rng, TOKENS).decode("latin-1")


def run_command(argv: list[str]) -> None:
    """One command; its message comes back as a UserError."""
    from sae_apps.tasks.main import main
    from sae_core.errors import UserError

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(argv)
    if code:
        text = err.getvalue()
        if code != 2 or not is_clear(text):
            raise RuntimeError(f"exit {code}: {text[-300:]}")
        raise UserError(text.strip().splitlines()[-1])


