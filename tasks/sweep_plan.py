"""What a sweep consists of: the runs that its lists make, and the folder that holds them.

sweep.json                        the settings that all runs share, written first
activations/HOOK/train, held_out  shards of each hook point, as ``train`` stores them
HOOK-KIND-WIDTH-seedN/            a run (see ``runs.py``), whose activations are a link to these
summary.json                      the results side by side, written last
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sae_core.disk import atomic_write_text
from sae_core.errors import UserError
from sae_core.sealed import sealed

from .common import first_difference, nearest, plain, read_json, to_json
from .runs import RunFolder, check_free

if TYPE_CHECKING:
    from .settings import TrainSettings

SWEEP_FORMAT, SWEEP_VERSION = "sae-apps-sweep", 1
SWEEP_FILE, SUMMARY_FILE = "sweep.json", "summary.json"


@dataclass(frozen=True)
class Lists:
    """What varies; every combination is a run."""

    hooks: Sequence[str]
    kinds: Sequence[str] = ("gba",)
    widths: Sequence[int | None] = (None,)
    seeds: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        from sae_core.sae import Kind

        if not self.hooks:
            raise UserError(
                "Expected at least one hook point, got none: add --hooks layers.15.out, or several."
            )
        for field in fields(self):
            values = list(getattr(self, field.name))
            if not values:
                raise UserError(f"Expected at least one of --{field.name}, got an empty list.")
            twice = [value for i, value in enumerate(values) if value in values[:i]]
            if twice:
                raise UserError(f"Expected each of --{field.name} once, got {twice[0]!r} twice.")
        known = get_args(Kind)
        for kind in self.kinds:
            if kind not in known:
                near = "".join(f"; the nearest is {one!r}" for one in nearest(kind, known))
                raise UserError(f"--kinds must be of {', '.join(known)}, got {kind!r}{near}.")
        for width in self.widths:
            if width is not None and width < 1:
                raise UserError(f"--widths must be at least 1, got {width}.")


@dataclass(frozen=True)
class SweepPlan:
    """The runs of a sweep and where they go."""

    out: Path
    runs: tuple["TrainSettings", ...]
    """Hook points outermost, so that the activations of one are read in a row."""

    @property
    def hooks(self) -> list[str]:
        return list(dict.fromkeys(str(one.run.hook) for one in self.runs))

    def activations(self, hook: str) -> Path:
        """Folder of the stored activations of a hook point."""
        return self.out / "activations" / hook

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that do not vary, plainly with the seed of the held-out rows."""
        identity = self.runs[0].identity()
        for name in ("hook", "seed"):
            del identity[name]
        sae = {k: v for k, v in identity["sae"].items() if k not in ("kind", "d_sae")}
        text = identity["text"] | {"split_seed": self.runs[0].split_seed}
        return plain(identity | {"sae": sae, "text": text})


def make_plan(
    lists: Lists, out: Path, groups: Mapping[str, Any], sae: Mapping[str, Any]
) -> SweepPlan:
    """The product of the lists.

    Args:
        groups: the fields of TrainSettings without ``sae``, shared by all runs.
        sae: fields of SAEConfig that all runs share.
    Raises:
        UserError: settings of a run that do not fit each other.
    """
    from .settings import TrainSettings

    runs = []
    for hook, kind, width, seed in product(lists.hooks, lists.kinds, lists.widths, lists.seeds):
        name = "-".join([hook, kind, *([str(width)] if width is not None else []), f"seed{seed}"])
        run = replace(groups["run"], out=str(out / name), hook=hook, seed=seed)
        shape = {"kind": kind, **sae, "d_sae": width}  # in the order of train's own options
        runs.append(TrainSettings(**{**groups, "run": run, "sae": shape}))
    return SweepPlan(out, tuple(runs))


def check_sweep(plan: SweepPlan) -> None:
    """Check that the folder is new or holds this sweep, or a part of it; nothing is written.

    Raises:
        UserError: it holds something else (names the first differing setting).
    """
    file = plan.out / SWEEP_FILE
    if plan.out.exists() and not plan.out.is_dir():
        raise UserError(f"Expected a folder at {plan.out}, got a file.")
    if file.is_file():
        found = read_json(file)
        if (found.get("format"), found.get("version")) != (SWEEP_FORMAT, SWEEP_VERSION):
            raise UserError(
                f"{file} must be {SWEEP_FORMAT} version {SWEEP_VERSION}, "
                f"got {found.get('format')} version {found.get('version')}."
            )
        if difference := first_difference(dict(found.get("config") or {}), plan.shared):
            raise UserError(
                f"{plan.out} already holds another sweep: {difference}; choose another --out."
            )
    elif plan.out.is_dir() and any(not _is_left_over(path) for path in plan.out.iterdir()):
        raise UserError(
            f"Expected a new, empty or sweep folder at {plan.out}, got one that holds other files; "
            "choose another --out."
        )
    for one in plan.runs:
        check_free(Path(str(one.run.out)), one.identity())


def _is_left_over(path: Path) -> bool:
    """What a kill leaves before sweep.json is in its place."""
    return path.name.startswith(f".{SWEEP_FILE}.")


def claim_sweep(plan: SweepPlan) -> None:
    """Write ``sweep.json``, unless it is there."""
    if not (plan.out / SWEEP_FILE).is_file():
        head = {"format": SWEEP_FORMAT, "version": SWEEP_VERSION, "config": plan.shared}
        atomic_write_text(plan.out / SWEEP_FILE, to_json(sealed(head)) + "\n")


def discard_if_empty(plan: SweepPlan) -> None:
    """Take back what a failed start wrote, unless a finished shard or a run is there."""
    folder = plan.out / "activations"
    if any(folder.glob("*/*/shard-*")) or any(plan.out.glob("*/run.json")):
        return
    shutil.rmtree(folder, ignore_errors=True)
    (plan.out / SWEEP_FILE).unlink(missing_ok=True)
    if not any(plan.out.iterdir()):
        plan.out.rmdir()


def link_activations(plan: SweepPlan, run: RunFolder, hook: str) -> None:
    """Let the run's activations be those of the sweep; relative, so that the sweep can be moved."""
    if not (run.activations.is_symlink() or run.activations.exists()):
        run.activations.symlink_to(Path("..") / "activations" / hook, target_is_directory=True)
