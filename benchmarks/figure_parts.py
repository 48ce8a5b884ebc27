"""What the figures share: style, panels, spreads over seeds, axes, saving."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_core.extras import require
from sae_core.store import atomic_write_text

Rows = Sequence[dict[str, Any]]
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":", "-", "--", "-.")
WIDTH, DPI = 8.0, 200  # inches: at 800 px an 11 pt letter is 15 px high

# Okabe and Ito 2008, "Color Universal Design"; grey is kept for chance.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NAMES = {
    "gba": "GBA", "topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU",
    "relu": "ReLU + L1",
}  # fmt: skip
GREY = "#767676"
STYLE = {
    "font.size": 11.0, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "lines.linewidth": 1.8, "lines.markersize": 5.0,
}  # fmt: skip


def style_of(kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash of each kind; the five of the comparison always have the same."""
    order = [*NAMES, *sorted(set(kinds) - set(NAMES))]
    return {
        kind: {
            "color": PALETTE[i % len(PALETTE)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i % len(DASHES)],
            "label": NAMES.get(kind, kind),
        }
        for i, kind in enumerate(order)
        if kind in kinds
    }


def panels(n: int, height: float, *, columns: int | None = None, **shared: Any) -> tuple[Any, Any]:
    """A figure of n panels and its axes, flat; nothing of matplotlib's global state is touched."""
    matplotlib = require("matplotlib", "plots")
    figure_module = require("matplotlib.figure", "plots")
    with matplotlib.rc_context(STYLE):
        figure = figure_module.Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        columns = columns or n
        grid = figure.subplots(-(-n // columns), columns, squeeze=False, **shared)
    return figure, grid.ravel()


def save(figure: Any, out: Path, points: Rows) -> None:
    """Write the PNG and, beside it, the points drawn; the same points give the same bytes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with require("matplotlib", "plots").rc_context(STYLE):
        figure.savefig(out, format="png", metadata={"Software": None})
    atomic_write_text(out.with_suffix(".json"), json.dumps(list(points), indent=1) + "\n")


def grouped(rows: Rows, *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows by the values of these keys, in the order of first appearance."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return dict(found)


def spread(rows: Rows, *keys: str, of: str) -> list[dict[str, Any]]:
    """Mean, least and largest of a column by the values of `keys`."""
    return [
        dict(zip(keys, at, strict=True))
        | {
            "of": of,
            "mean": float(np.mean([row[of] for row in same])),
            "low": float(min(row[of] for row in same)),
            "high": float(max(row[of] for row in same)),
            "n": len(same),
        }
        for at, same in grouped(rows, *keys).items()
    ]


def draw_line(axis: Any, points: Rows, x: str, look: dict[str, Any]) -> None:
    """The mean as a line, least to largest as a band."""
    points = sorted(points, key=lambda point: point[x])
    at = [point[x] for point in points]
    axis.plot(at, [point["mean"] for point in points], **look)
    low, high = ([point[end] for point in points] for end in ("low", "high"))
    axis.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)


def share_axis(axis: Any, label: str) -> None:
    """A y axis for shares."""
    axis.set_ylim(-0.02, 1.02)
    axis.set_ylabel(label)


def legend_above(figure: Any, axis: Any) -> None:
    """One legend over all panels, so that it covers no curve."""
    handles, labels = axis.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= 5 else -(-len(labels) // 2)
    figure.legend(
        handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=11
    )
