"""What ``longrun`` concludes from its samples: slope, growth, goals.

The slope is that of the least-squares line over all samples after the warm-up. Growth is the rise
of the line through the peaks of eight equal parts of that time: while a shard fills (64k tokens, up
to 144 MiB) memory rises and falls, and a line over a dozen such teeth rises by a twelfth of a tooth
though nothing grows. The goal, 2% over a phase, is some 20 to 30 MiB in the 1 to 1.5 GiB of the
default run: what an allocator moves by.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common import Goal
from benchmarks.longrun_memory import MIB, Memory

PARTS = 8  # whose peaks show growth
GROWTH = 0.02
STOPPED = 143  # 128 + SIGTERM


@dataclass(frozen=True)
class Sample:
    """One look at a running process."""

    seconds: float
    """Since it began."""
    phase: str
    """harvest or train; streamed, both at once."""
    tokens: int
    """Done in this phase, as far as the folder tells."""
    memory: Memory
    """Of the whole process tree."""


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line; 0 for a single sample."""
    dx = np.asarray(x) - np.mean(x)
    spread = float(dx @ dx)
    return float(dx @ np.asarray(y)) / spread if spread else 0.0


def growth(x: Sequence[float], y: Sequence[float], parts: int = PARTS) -> tuple[float, float]:
    """Rise of the line through the peaks of equal parts of x, in all; and as a share of its start.

    Args:
        x: times, ascending.
        y: levels there.
        parts: of the time; empty ones are left out.
    """
    times, levels = np.asarray(x), np.asarray(y)
    part = np.minimum((parts * (times - times[0]) / (times[-1] - times[0])).astype(int), parts - 1)
    found = np.unique(part)
    peaks = [float(levels[part == p].max()) for p in found]
    rise = slope(found.tolist(), peaks) * parts
    return rise, rise / (float(np.mean(peaks)) - rise / 2)


def phase_rows(
    route: str, model: str, samples: Sequence[Sample], warm_up: float
) -> list[dict[str, Any]]:
    """One record for each phase that outlives its warm-up (seconds)."""
    rows = []
    for phase in dict.fromkeys(s.phase for s in samples):
        of_phase = [s for s in samples if s.phase == phase]
        late = [s for s in of_phase if s.seconds - of_phase[0].seconds >= warm_up]
        if len(late) > 1:
            rows.append(phase_row(f"{route} {phase}", model, of_phase, late))
    return rows


def phase_row(
    name: str, model: str, every: Sequence[Sample], late: Sequence[Sample]
) -> dict[str, Any]:
    """One flat record; memory in MiB, anonymous where no other kind is named."""
    minutes = (every[-1].seconds - every[0].seconds) / 60
    seconds = [s.seconds for s in late]
    held = [s.memory.anonymous / MIB for s in late]
    span = seconds[-1] - seconds[0]
    rise, share = growth(seconds, held)
    pss = [s.memory.proportional for s in late]
    return {
        "name": name, "model": model, "minutes": round(minutes, 2),
        "samples": len(late), "tokens": every[-1].tokens,
        "tokens_per_s": round((late[-1].tokens - late[0].tokens) / span, 1),
        "after_warm_up_MiB": round(held[0], 1), "end_MiB": round(held[-1], 1),
        "max_MiB": round(max(held), 1), "slope_MiB_per_hour": round(3600 * slope(seconds, held), 2),
        "growth_MiB": round(rise, 2), "growth": round(share, 5),
        "rss_after_warm_up_MiB": round(late[0].memory.resident / MIB, 1),
        "rss_end_MiB": round(late[-1].memory.resident / MIB, 1),
        "rss_max_MiB": round(max(s.memory.resident for s in every) / MIB, 1),
        "pss_end_MiB": None if pss[-1] is None else round(pss[-1] / MIB, 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "exit_code": None, "seconds_to_stop": None, "checkpoint_step": None, "last_step": None,
    }  # fmt: skip


def curve_rows(route: str, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The first sample of every minute."""
    first = {int(s.seconds // 60): s for s in reversed(samples)}
    return [
        {"name": f"{route} {minute}", "route": route, "minute": minute, "phase": s.phase,
         "tokens": s.tokens, "anonymous_MiB": round(s.memory.anonymous / MIB, 1),
         "rss_MiB": round(s.memory.resident / MIB, 1)}
        for minute, s in sorted(first.items())
    ]  # fmt: skip


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """No growth in any phase; a run that was ended has its last step on disk."""
    found = []
    for row in rows:
        name, share = row["name"], row["growth"]
        note = f"{row['slope_MiB_per_hour']} MiB/h over {row['minutes']} minutes"
        found.append(Goal(f"growth, {name}", share, f"<= {GROWTH}", share <= GROWTH, note))
        if row["exit_code"] is not None:
            behind = row["last_step"] - row["checkpoint_step"]
            met = behind == 0 and row["exit_code"] == STOPPED
            note = f"exit code {row['exit_code']}, step {row['checkpoint_step']}"
            found.append(Goal(f"steps lost to SIGTERM, {name}", behind, "= 0", met, note))
    return found
