"""Figures of the result files: a PNG, and beside it the numbers that are drawn.

    python -m benchmarks.figures [NAME ...]

Draws into results/figures what the files in results/ allow and says which are missing. Each
function takes the flat rows of a result file and the path of the PNG; NAME.json beside it holds the
points of the figure. Colours are those of Okabe and Ito, told apart by marker and dash too.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS
from benchmarks.figure_parts import (
    DASHES,
    GREY,
    MARKERS,
    PALETTE,
    Rows,
    draw_line,
    grouped,
    legend_above,
    panels,
    save,
    share_axis,
    spread,
    style_of,
)
from sae_core.errors import UserError

# ---- recovery on planted data ----


def recovery_curve(rows: Rows, out: Path) -> None:
    """Share of true features recovered against training steps, at cosine 0.8 and 0.9.

    Args:
        rows: {kind, step, seed, frr_8, frr_9}.
    """
    looks = style_of([row["kind"] for row in rows])
    figure, axes = panels(2, 4.2, sharey=True)
    drawn = []
    for axis, of in zip(axes, ("frr_8", "frr_9"), strict=True):
        points = spread(rows, "kind", "step", of=of)
        for kind, look in looks.items():
            draw_line(axis, [p for p in points if p["kind"] == kind], "step", look)
        axis.set_xlabel("training steps")
        axis.set_title(f"cosine ≥ 0.{of[-1]}")
        drawn += points
    share_axis(axes[0], "features recovered (share)")
    legend_above(figure, axes[0])
    save(figure, out, drawn)


def recovery_settings(rows: Rows, out: Path) -> None:
    """Recovery at 0.9 in every setting, each kind at the configuration with its best mean.

    Args:
        rows: {setting, kind, config, seed, frr_9}.
    """
    best: list[dict[str, Any]] = []
    for same in grouped(rows, "setting", "kind").values():
        tried = spread(same, "setting", "kind", "config", of="frr_9")
        best.append(max(tried, key=lambda point: point["mean"]))
    settings = list(dict.fromkeys(point["setting"] for point in best))
    looks = style_of([point["kind"] for point in best])
    figure, (axis,) = panels(1, 1.6 + 0.55 * len(settings))
    for place, (kind, look) in enumerate(looks.items()):
        points = [point for point in best if point["kind"] == kind]
        shift = 0.6 * ((place + 0.5) / len(looks) - 0.5)
        at = [settings.index(point["setting"]) + shift for point in points]
        mean = np.array([point["mean"] for point in points])
        ends = np.array([[point["low"], point["high"]] for point in points]).T
        error = np.clip([mean - ends[0], ends[1] - mean], 0, None)
        axis.errorbar(mean, at, xerr=error, **look | {"linestyle": "none"})
    axis.set_yticks(range(len(settings)), settings)
    axis.invert_yaxis()
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("features recovered at cosine ≥ 0.9 (share; range over seeds)")
    legend_above(figure, axis)
    save(figure, out, best)


def heatmap(rows: Rows, out: Path) -> None:
    """Recovery at 0.9 by width of the data and target frequency, with the theory's band.

    The band f <= p <= min(sqrt(f), f d) of arXiv 2506.14002 holds up to unknown constants.

    Args:
        rows: {d, taf, f, n, m, frr_9} of one f, n and m.

    Raises:
        UserError: rows of several f, n or m.
    """
    shapes = {(row["f"], row["n"], row["m"]) for row in rows}
    if len(shapes) != 1:
        raise UserError(f"Expected rows of one f, n and m, got {sorted(shapes)}.")
    ((f, n, m),) = shapes
    points = spread(rows, "d", "taf", of="frr_9")
    d, taf = (np.array(sorted({point[key] for point in points})) for key in ("d", "taf"))
    share = np.full((len(taf), len(d)), np.nan)
    for point in points:
        share[np.searchsorted(taf, point["taf"]), np.searchsorted(d, point["d"])] = point["mean"]
    figure, (axis,) = panels(1, 5.0)
    axis.grid(False)
    axis.set_facecolor("#BBBBBB")  # cells without a run
    edges = log_edges(d), log_edges(taf)
    mesh = axis.pcolormesh(*edges, np.ma.masked_invalid(share), cmap="cividis", vmin=0, vmax=1)
    wide = np.geomspace(edges[0][0], edges[0][-1], 200)
    for color, width in (("black", 3.6), ("white", 1.8)):  # seen on dark and on bright cells
        axis.plot(wide, np.full(200, f), "--", color=color, linewidth=width)
        axis.plot(wide, np.minimum(np.sqrt(f), f * wide), ":", color=color, linewidth=width)
    axis.set(xscale="log", yscale="log", xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])
    axis.set_xticks(d, [f"{value:g}" for value in d])
    axis.minorticks_off()
    axis.set_xlabel("width of the data d (dimensions)")
    axis.set_ylabel("target frequency p (share of rows)")
    axis.set_title(
        f"n = {n:,} features of frequency f = {f:.2g}, M = {m:,} latents\n"
        "lines: p = f (dashed), p = min(√f, f d) (dotted)",
        fontsize=11,
    )
    figure.colorbar(mesh, ax=axis, label="features recovered at cosine ≥ 0.9 (share)")
    save(figure, out, points)


def log_edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around ascending centres, halfway on a log scale; one more than centres."""
    logs = np.log(np.asarray(centres, dtype=float))
    if len(logs) == 1:
        return np.exp([logs[0] - 0.5, logs[0] + 0.5])
    middle = (logs[1:] + logs[:-1]) / 2
    ends = logs[0] - (middle[0] - logs[0]), logs[-1] + (logs[-1] - middle[-1])
    return np.exp([ends[0], *middle, ends[1]])


KNOBS = {
    "K": "groups K", "HTF": "highest target frequency", "LTF": "lowest target frequency",
    "period": "steps between bias updates",
}  # fmt: skip


def sensitivity(rows: Rows, out: Path) -> None:
    """Recovery against each knob of GBA alone, at cosine 0.8 and 0.9.

    Args:
        rows: {knob, value, seed, frr_8, frr_9} with knob K, HTF, LTF or period.
    """
    known = [knob for knob in KNOBS if any(row["knob"] == knob for row in rows)]
    figure, axes = panels(len(known), 6.0, columns=min(2, len(known)), sharey=True)
    drawn = []
    for place, (axis, knob) in enumerate(zip(axes, known, strict=False)):
        mine = [row for row in rows if row["knob"] == knob]
        for of, index in (("frr_8", 0), ("frr_9", 1)):
            points = spread(mine, "knob", "value", of=of)
            look = {"color": PALETTE[index], "marker": MARKERS[index], "linestyle": DASHES[index]}
            draw_line(axis, points, "value", look | {"label": f"cosine ≥ 0.{of[-1]}"})
            drawn += points
        values = sorted({row["value"] for row in mine})
        axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
        axis.set_xlabel(KNOBS[knob])
        if place % 2 == 0:
            share_axis(axis, "features recovered (share)")
    for axis in axes[len(known) :]:
        axis.set_visible(False)
    legend_above(figure, axes[0])
    save(figure, out, drawn)


# ---- agreement across seeds ----


def comparison_rows(rows: Rows) -> list[dict[str, Any]]:
    """Rows of the default variant, of the full data where there are some.

    Raises:
        UserError: there is no row of the default variant.
    """
    default = [row for row in rows if row["variant"] == "default"]
    if not default:
        raise UserError(
            "Expected rows of the variant default, got only "
            f"{', '.join(sorted({row['variant'] for row in rows})) or 'none'}."
        )
    full = [row for row in default if row["size"] == "full"]
    return full or default


def consistency(rows: Rows, out: Path) -> None:
    """Share of latents whose maximum cosine with another run exceeds a threshold.

    Args:
        rows: {kind, variant, size, subset, directions, threshold, share, low, high}.
    """
    rows = comparison_rows(rows)
    looks = style_of([row["kind"] for row in rows])
    chance = {"color": GREY, "linestyle": (0, (1, 1)), "label": "random directions"}
    figure, axes = panels(2, 4.4, sharey=True)
    drawn = [
        {key: row[key] for key in ("kind", "subset", "directions", "threshold", "low", "high")}
        | {"mean": row["share"]}
        for row in rows
    ]
    for axis, subset in zip(axes, ("all alive", "top 0.3%"), strict=True):
        mine = [point for point in drawn if point["subset"] == subset]
        trained, random = (
            [point for point in mine if point["directions"] == origin]
            for origin in ("trained", "random")
        )
        for kind, look in looks.items():
            own = [point for point in trained if point["kind"] == kind]
            draw_line(axis, own, "threshold", look | {"markevery": 2})
        # one of them is enough: about as many directions of the same width in each
        one = [point for point in random if point["kind"] == random[0]["kind"]]
        draw_line(axis, one, "threshold", chance)
        axis.set_title("all alive latents" if subset == "all alive" else f"{subset} by activation")
    figure.supxlabel("threshold on the maximum cosine with a latent of another run", fontsize=11)
    share_axis(axes[0], "latents above the threshold (share)")
    legend_above(figure, axes[0])
    save(figure, out, drawn)


def agreement(rows: Rows, out: Path) -> None:
    """PW-MCC against FVU, a point per kind and variant, with its interval over seeds.

    Args:
        rows: {kind, variant, size, fvu, pw_mcc, pw_mcc_low, pw_mcc_high, chance_pw_mcc}.
    """
    size = "full" if any(row["size"] == "full" for row in rows) else "reduced"
    keys = ("kind", "variant", "size", "fvu", "pw_mcc", "pw_mcc_low", "pw_mcc_high")
    points = [
        {key: row[key] for key in (*keys, "chance_pw_mcc")} for row in rows if row["size"] == size
    ]
    looks = style_of([point["kind"] for point in points])
    figure, (axis,) = panels(1, 4.8)
    for kind, look in looks.items():
        for filled in (True, False):
            own = [p for p in points if p["kind"] == kind]
            own = [p for p in own if (p["variant"] == "default") == filled]
            known = [p for p in own if p["pw_mcc_low"] is not None]
            if filled:
                value = np.array([p["pw_mcc"] for p in known])
                ends = np.array([[p["pw_mcc_low"], p["pw_mcc_high"]] for p in known]).reshape(-1, 2)
                error = [value - ends[:, 0], ends[:, 1] - value]
                axis.errorbar(
                    [p["fvu"] for p in known], value, error,
                    color=look["color"], linestyle="none", linewidth=1.2,
                )  # fmt: skip
            look = look | {"linestyle": "none", "label": look["label"] if filled else None}
            face = {} if filled else {"markerfacecolor": "white", "markersize": 4}
            axis.plot([p["fvu"] for p in own], [p["pw_mcc"] for p in own], **look | face)
    chance = float(np.mean([point["chance_pw_mcc"] for point in points]))
    axis.axhline(chance, color=GREY, linestyle=":", linewidth=1.2, label="random directions")
    axis.axhline(0.8, color=GREY, linestyle="--", linewidth=1.2, label="goal 0.80")
    axis.set_xlabel("FVU of held-out tokens (share of variance; filled: default, open: variants)")
    share_axis(axis, "PW-MCC over all alive latents")
    legend_above(figure, axis)
    save(figure, out, points)


FIGURES: dict[str, tuple[str, Callable[[Rows, Path], None]]] = {
    "recovery_curve": ("recovery_curve", recovery_curve),
    "recovery_settings": ("recovery", recovery_settings),
    "heatmap": ("recovery_heatmap", heatmap),
    "sensitivity": ("recovery_sensitivity", sensitivity),
    "consistency": ("agreement_curve", consistency),
    "agreement": ("agreement", agreement),
}


def draw(names: Sequence[str], results: Path) -> list[str]:
    """Draw these figures from result files into results/figures.

    Returns:
        Result files that are missing, or lack the rows for it.
    """
    missing = []
    for name in names:
        source, function = FIGURES[name]
        path = results / f"{source}.json"
        if not path.exists():
            missing.append(path.name)
            continue
        out = results / "figures" / f"{name}.png"
        try:
            function(json.loads(path.read_text())["rows"], out)
        except UserError as error:
            missing.append(f"rows in {path.name}: {error}")
            continue
        print(f"drew {out.name} from {path.name}")
    return missing


def main() -> None:
    """Draw what there is, name what is missing."""
    parser = argparse.ArgumentParser(description="Figures of the result files.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)} (all)")
    names = parser.parse_args().names or list(FIGURES)
    if unknown := sorted(set(names) - set(FIGURES)):
        parser.error(f"Expected figures of {', '.join(FIGURES)}, got {', '.join(unknown)}.")
    for file in draw(names, RESULTS):
        print(f"missing {file}")


if __name__ == "__main__":
    main()
