"""Progress with rate and remaining time: a bar on a terminal, plain occasional lines elsewhere.

Nothing is shown for work that ends within ``SHOW_AFTER_S`` seconds. Output goes to stderr, so that
stdout stays free for results.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SHOW_AFTER_S = 2.0
LINE_EVERY_S = 5.0


def duration(seconds: float) -> str:
    """Seconds in words: ``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(n: float) -> str:
    """A count with thousands separators; numbers below ten keep one decimal."""
    return f"{n:,.0f}" if n >= 10 or n == int(n) else f"{n:.1f}"


class Progress:
    """Counts finished units; a context manager.

    Args:
        what: the stage, e.g. ``harvest``.
        total: units expected in all, or None where it is not known.
        unit: name of one unit in the plural, e.g. ``tokens``.
        initial: units finished by an earlier run; they do not count towards the rate.
        enabled: False shows nothing.
        stream: where to write (default: the present stderr).
        clock: seconds from any origin; tests pass their own.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        *,
        initial: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._initial = self._done = initial
        self._enabled, self._clock = enabled, clock
        self._stream = sys.stderr if stream is None else stream
        self._start = self._last_line = clock()
        self._shown, self._shown_done = False, -1
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                desc=what,
                total=total,
                unit=f" {unit}",
                initial=initial,
                unit_scale=True,
                delay=SHOW_AFTER_S,
                file=self._stream,
                dynamic_ncols=True,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Add ``n`` finished units."""
        self.update_to(self._done + n)

    def update_to(self, done: int) -> None:
        """Set the number of finished units, those of an earlier run included."""
        step, self._done = done - self._done, done
        if self._bar is not None:
            self._bar.update(step)
            return
        now = self._clock()
        wait = LINE_EVERY_S if self._shown else SHOW_AFTER_S
        if self._enabled and now - self._last_line >= wait:
            self._line(now)

    def _line(self, now: float) -> None:
        elapsed = max(now - self._start, 1e-9)
        rate = (self._done - self._initial) / elapsed
        text = f"{self._what}: {self._done:,}"
        if self._total is not None:
            text += f" of {self._total:,} {self._unit}"
            if self._total:
                text += f" ({100 * self._done / self._total:.0f}%)"
        else:
            text += f" {self._unit}"
        text += f", {count(rate)} {self._unit}/s"
        if self._total is not None and rate > 0 and self._done < self._total:
            text += f", {duration((self._total - self._done) / rate)} left"
        print(text, file=self._stream, flush=True)
        self._last_line, self._shown, self._shown_done = now, True, self._done

    def close(self) -> None:
        """End the display; a stage that was shown ends with its totals."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._shown and self._done != self._shown_done:
            self._line(self._clock())
        self._enabled = False


def progress(
    items: Iterable[Item], what: str, total: int | None, unit: str, *, enabled: bool = True
) -> Iterator[Item]:
    """Yield ``items``, one unit each, and show how far they are."""
    with Progress(what, total, unit, enabled=enabled) as shown:
        for item in items:
            yield item
            shown.update()
