"""What a map is drawn from: the data of the page's script, and a drawing for readers without it.

Coordinates in a plane and values are 16-bit integers in base64, which a browser unpacks at once:
12,000 places with ten features take about one megabyte.
"""

import base64
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

from sae_apps.report.charts import svg
from sae_apps.report.formats import clean, number
from sae_apps.report.projection import Projection, Window, cut_lines, cut_rings

if TYPE_CHECKING:
    from sae_apps.report.geography import Geography, MapFeature

AROUND = 0.5  # of the longer side of the window: how far lines reach beyond it, for panning
N_STATIC = 1500  # places in the drawing for readers without a script
STATIC_WIDTH = 640.0
CLASSES = ("not significant", "High-High", "Low-High", "Low-Low", "High-Low")


def strongest(values: Float[np.ndarray, " n"], n: int) -> list[int]:
    """Places with the largest values, silent ones left out; equal ones in their order."""
    order = np.argsort(-values, kind="stable")[:n]
    return [int(i) for i in order if values[i] != 0]


def payload(shown: "Geography", projection: Projection, window: Window) -> str:
    """The data of the script as JSON that may stand inside a script element."""
    wide = window.grown(AROUND)
    points = projection(np.asarray(shown.places.lon), np.asarray(shown.places.lat))

    def drawn(pieces: list[Float[np.ndarray, "m 2"]]) -> dict[str, Any]:
        joined = np.concatenate(pieces) if pieces else np.zeros((0, 2))
        return {
            "n": [len(piece) for piece in pieces],
            "x": _coded(joined[:, 0], wide.left, wide.right),
            "y": _coded(joined[:, 1], wide.bottom, wide.top),
        }

    names = sorted({clean(text) for text in shown.places.label if text is not None})
    code = {name: i + 1 for i, name in enumerate(names)}
    labels = [0 if text is None else code[clean(text)] for text in shown.places.label]
    data = {
        "aspect": round(wide.aspect, 6),
        "window": [
            *_fractions(window.left, window.right, wide.left, wide.right),
            *_fractions(window.bottom, window.top, wide.bottom, wide.top),
        ],
        "x": _coded(points[:, 0], wide.left, wide.right),
        "y": _coded(points[:, 1], wide.bottom, wide.top),
        "land": drawn(list(cut_rings(shown.land, projection, wide))),
        "lines": drawn(list(cut_lines(shown.outlines, projection, wide))),
        "names": [clean(text) for text in shown.places.name],
        "labels": names,
        "label": _base64(np.asarray(labels)),
        "classes": CLASSES,
        "features": [_feature(one) for one in shown.features],
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # "</script>" and "<!--" would end or change the element; JSON reads the escape as the sign
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _feature(one: "MapFeature") -> dict[str, Any]:
    values = np.asarray(one.values, dtype=np.float64)
    lo, hi = float(values.min()), float(values.max())
    scale = float(values.std())
    found: dict[str, Any] = {
        "title": clean(one.title),
        "I": round(float(one.moran_i), 6),
        "lo": lo,
        "hi": hi,
        "mean": float(values.mean()),
        "sd": scale if scale > 0 else 1.0,
        "values": _base64(np.where(values == 0, 0, 1 + _levels(values, lo, hi, 65534))),
    }
    if one.lag is not None:
        lag = np.asarray(one.lag, dtype=np.float64)
        found |= {"lagLo": float(lag.min()), "lagHi": float(lag.max())}
        found["lag"] = _coded(lag, found["lagLo"], found["lagHi"])
    if one.lisa is not None:
        found["lisa"] = "".join(map(str, np.asarray(one.lisa).tolist()))
    return found


def _fractions(a: float, b: float, lo: float, hi: float) -> list[float]:
    return [round((v - lo) / (hi - lo), 6) for v in (a, b)]


def _levels(
    values: Float[np.ndarray, " n"], lo: float, hi: float, top: int = 65535
) -> Int[np.ndarray, " n"]:
    """Values in [lo, hi] on whole numbers from 0 to ``top``; what lies outside goes to the end."""
    if hi <= lo:
        return np.zeros(len(values), dtype=np.int64)
    return np.clip(np.rint((values - lo) / (hi - lo) * top), 0, top).astype(np.int64)


def _coded(values: Float[np.ndarray, " n"], lo: float, hi: float) -> str:
    return _base64(_levels(values, lo, hi))


def _base64(levels: Int[np.ndarray, " n"]) -> str:
    return base64.b64encode(levels.astype("<u2").tobytes()).decode()


def static_map(shown: "Geography", projection: Projection, window: Window) -> Markup:
    """The first feature as a drawing: lines, and the places where it is strongest."""
    height = STATIC_WIDTH * min(window.aspect, 1.3)
    scale = min(STATIC_WIDTH / (window.right - window.left), height / (window.top - window.bottom))
    centre = np.array([window.left + window.right, window.bottom + window.top]) / 2
    middle = np.array([STATIC_WIDTH / 2, height / 2])

    def placed(points: Float[np.ndarray, "k 2"]) -> Float[np.ndarray, "k 2"]:
        return middle + (points - centre) * scale * np.array([1, -1])

    def path(points: Float[np.ndarray, "k 2"]) -> str:
        return "M" + "L".join(f"{x:.0f},{y:.0f}" for x, y in placed(points))

    one = shown.features[0]
    values = np.asarray(one.values, dtype=np.float64)
    chosen = strongest(values, N_STATIC)[::-1]  # the strongest on top
    lines = "".join(path(line) for line in cut_lines(shown.outlines, projection, window))
    points = placed(projection(np.asarray(shown.places.lon), np.asarray(shown.places.lat))[chosen])
    top = float(np.abs(values).max()) or 1.0
    dots = [
        Markup('<circle cx="{:.0f}" cy="{:.0f}" r="{:.1f}" fill-opacity="{:.2f}"/>').format(
            x, y, 1.5 + 2.5 * abs(values[i]) / top, 0.25 + 0.75 * abs(values[i]) / top
        )
        for i, (x, y) in zip(chosen, points, strict=True)
    ]
    frame = Markup('<path class="geo-lines" d="{}"/>').format(lines or "M0,0")
    desc = f"Places where {one.title} is strongest; Moran's I {number(one.moran_i)}."
    parts = [frame, Markup('<g class="geo-dots">{}</g>').format(Markup("").join(dots))]
    return svg(parts, STATIC_WIDTH, height, f"Map of {one.title}", desc)
