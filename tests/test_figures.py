"""Figures: valid PNGs of a legible size with the drawn numbers beside them."""

import ast
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="The figures need the extra `plots`.")

from benchmarks import figure_parts, figures
from sae_core.errors import UserError

KINDS = tuple(figure_parts.NAMES)


def png_size(path: Path) -> tuple[int, int]:
    """Width and height, after every chunk's checksum was compared."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, size = 8, [], (0, 0)
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(body)
        kinds.append(body[:4])
        if body[:4] == b"IHDR":
            size = struct.unpack(">II", body[4:12])
        at += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    return size


def beside(out: Path) -> list[dict]:
    return json.loads(out.with_suffix(".json").read_text())


def recovery_rows() -> list[dict]:
    return [
        {"kind": kind, "step": step, "seed": seed, "frr_8": 0.5 + 0.1 * seed, "frr_9": 0.1 * seed}
        for kind in (*KINDS, "gba_published")
        for step in (0, 100, 200)
        for seed in range(3)
    ]


def curve_rows(size: str = "full") -> list[dict]:
    return [
        {"kind": kind, "variant": variant, "size": size, "subset": subset, "directions": origin,
         "threshold": t, "share": 1 - t, "low": max(0, 0.9 - t), "high": min(1, 1.1 - t)}
        for kind in KINDS
        for variant in ("default", "wide")
        for subset in ("all alive", "top 0.3%")
        for origin in ("trained", "random")
        for t in (0.0, 0.5, 1.0)
    ]  # fmt: skip


def agreement_rows() -> list[dict]:
    rows = [
        {"kind": kind, "variant": variant, "size": "full", "fvu": 0.1 + 0.02 * i + 0.005 * j,
         "pw_mcc": 0.4, "pw_mcc_low": 0.3, "pw_mcc_high": 0.5, "chance_pw_mcc": 0.15}
        for i, kind in enumerate(KINDS)
        for j, variant in enumerate(("default", "wide"))
    ]  # fmt: skip
    without = {"pw_mcc_low": None, "pw_mcc_high": None}  # two seeds only
    return [*rows[:-2], rows[-2] | without, rows[-1] | without]


ROWS = {
    "recovery_curve": recovery_rows(),
    "recovery": [
        {"setting": setting, "kind": kind, "config": config, "seed": seed,
         "frr_9": {"a": 0.2, "b": 0.6}[config] + 0.1 * seed}
        for setting in ("mixture", "zipf") for kind in KINDS for config in "ab"
        for seed in range(3)
    ],
    "recovery_heatmap": [
        {"d": d, "taf": taf, "f": 1e-3, "n": 64, "m": 256, "frr_9": d / 100}
        for d in (16, 32, 64) for taf in (1e-3, 2e-3) if (d, taf) != (16, 1e-3)
    ],
    "recovery_sensitivity": [
        {"knob": knob, "value": value, "seed": seed, "frr_8": 0.9, "frr_9": 0.1 * seed}
        for knob, values in (("K", (1, 10)), ("HTF", (0.1, 0.5)), ("LTF", (1e-4, 1e-3)),
                             ("period", (1, 50)))
        for value in values for seed in range(2)
    ],
    "agreement_curve": curve_rows(),
    "agreement": agreement_rows(),
}  # fmt: skip


@pytest.mark.parametrize("name", list(figures.FIGURES))
def test_a_figure_is_a_png_with_its_numbers_beside_it(name: str, tmp_path: Path):
    source, draw = figures.FIGURES[name]
    out = tmp_path / "figures" / f"{name}.png"
    draw(ROWS[source], out)
    width, height = png_size(out)
    assert width == 1600  # twice 800: letters stay legible when it is shown at half its size
    assert 400 <= height <= 1600
    points = beside(out)
    assert points
    assert all(not isinstance(value, dict | list) for point in points for value in point.values())
    first = out.read_bytes()
    draw(ROWS[source], out)
    assert out.read_bytes() == first


def test_means_and_ranges_are_over_seeds(tmp_path):
    out = tmp_path / "curve.png"
    figures.recovery_curve(recovery_rows(), out)
    at = {"kind": "gba", "step": 100, "of": "frr_8"}
    (point,) = [p for p in beside(out) if at.items() <= p.items()]
    assert (point["mean"], point["low"], point["high"]) == pytest.approx((0.6, 0.5, 0.7))
    assert point["n"] == 3
    assert len(beside(out)) == 6 * 3 * 2


def test_every_kind_is_shown_at_its_best_configuration(tmp_path):
    out = tmp_path / "settings.png"
    figures.recovery_settings(ROWS["recovery"], out)
    assert len(beside(out)) == 2 * len(KINDS)
    assert {point["config"] for point in beside(out)} == {"b"}
    assert {round(point["mean"], 6) for point in beside(out)} == {0.7}


def test_the_comparison_shows_default_settings_on_the_full_data_where_there_are_some():
    small = curve_rows("reduced")
    assert {r["size"] for r in figures.comparison_rows([*curve_rows(), *small])} == {"full"}
    assert {r["size"] for r in figures.comparison_rows(small)} == {"reduced"}
    assert {r["variant"] for r in figures.comparison_rows(small)} == {"default"}


def test_a_heat_map_needs_one_setting(tmp_path):
    rows = ROWS["recovery_heatmap"]
    with pytest.raises(UserError, match="one f, n and m, got .*128"):
        figures.heatmap([*rows, rows[0] | {"n": 128}], tmp_path / "x.png")


def test_cells_lie_around_their_centres_on_a_log_scale():
    edges = figures.log_edges(np.array([1.0, 4.0, 16.0]))
    assert edges == pytest.approx([0.5, 2, 8, 32])
    (low, high) = figures.log_edges(np.array([3.0]))
    assert low < 3 < high


def test_kinds_keep_their_looks_and_no_two_share_one():
    looks = figure_parts.style_of([*KINDS, "gba_published", "another"])
    assert looks["topk"] == figure_parts.style_of(["topk"])["topk"]
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 7


def test_what_is_missing_is_named_and_the_rest_drawn(tmp_path, capsys):
    result = {"rows": ROWS["recovery_sensitivity"]}
    (tmp_path / "recovery_sensitivity.json").write_text(json.dumps(result))
    missing = figures.draw(["sensitivity", "heatmap"], tmp_path)
    assert missing == ["recovery_heatmap.json"]
    assert png_size(tmp_path / "figures" / "sensitivity.png")[0] == 1600
    assert "drew sensitivity.png" in capsys.readouterr().out


def test_a_file_without_the_rows_is_named_and_stops_nothing(tmp_path):
    wide = [row for row in curve_rows() if row["variant"] == "wide"]
    (tmp_path / "agreement_curve.json").write_text(json.dumps({"rows": wide}))
    (tmp_path / "agreement.json").write_text(json.dumps({"rows": ROWS["agreement"]}))
    (missing,) = figures.draw(["consistency", "agreement"], tmp_path)
    assert missing.startswith("rows in agreement_curve.json: Expected rows of the variant default")
    assert "got only wide" in missing
    assert (tmp_path / "figures" / "agreement.png").exists()
    assert not (tmp_path / "figures" / "consistency.png").exists()


def test_an_unknown_figure_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["figures", "nothing"])
    with pytest.raises(SystemExit):
        figures.main()
    assert "got nothing" in capsys.readouterr().err


def test_matplotlib_is_imported_only_to_draw():
    trees = [ast.parse(Path(m.__file__).read_text()) for m in (figures, figure_parts)]
    assert "matplotlib" in ast.unparse(trees[1])
    outside = [n for t in trees for n in t.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not any("matplotlib" in ast.unparse(node) for node in outside)
