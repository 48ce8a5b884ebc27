"""Maps: what is drawn where and in which colour, and files that are whole and repeatable."""

import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sae_apps.geospatial import classes
from sae_apps.geospatial.classes import MOST_VALUES, class_breaks, classify
from sae_apps.geospatial.local import moran_local
from sae_apps.geospatial.local_result import COLOURS, LocalMoran
from sae_apps.geospatial.map_panels import INACTIVE, edge_texts
from sae_apps.geospatial.places import Places
from sae_apps.geospatial.weights import spatial_weights
from sae_core.errors import UserError

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from sae_apps.geospatial.maps import (
    feature_map,
    lisa_map,
    moran_scatter,
    save_figure,
    value_map,
)

N = 90


def make_places(lon: np.ndarray, lat: np.ndarray, source: str = "GeoNames IT, CC BY 4.0") -> Places:
    n = len(lon)
    names = [f"place {i}" for i in range(n)]
    ids = pa.array(np.arange(n) + 10, pa.int64())
    return Places(pa.table({"row_id": ids, "name": names, "lat": lat, "lon": lon}), source)


@pytest.fixture(scope="module")
def italy() -> Places:
    generator = np.random.default_rng(0)
    return make_places(generator.uniform(8, 17, N), generator.uniform(38, 46, N))


@pytest.fixture(scope="module")
def local(italy: Places) -> LocalMoran:
    """A feature of the north, zero in the south, with one outlier in each half."""
    x = np.where(italy.lat > 42, 1.0 + italy.lon / 10, 0.0)
    x[italy.lat.argmin()] = 3.0
    x[italy.lat.argmax()] = 0.0
    w = spatial_weights(italy.lon, italy.lat, k=5, row_id=italy.row_id)
    return moran_local(x, w, permutations=999, alpha=0.1, names=["123"])


def scatters(axes) -> list:
    return [c for c in axes.collections if type(c).__name__ == "PathCollection"]


def drawn(axes) -> dict[tuple[float, float], str]:
    """The colour of each point, later ones over earlier ones."""
    found = {}
    for points in sorted(scatters(axes), key=lambda c: c.get_zorder()):
        points.update_scalarmappable()
        colours = points.get_facecolors()
        spots = np.asarray(points.get_offsets())
        colours = np.broadcast_to(colours, (len(spots), 4)) if len(colours) == 1 else colours
        found |= {(float(x), float(y)): to_hex(c) for (x, y), c in zip(spots, colours, strict=True)}
    return found


def texts(figure) -> str:
    axes = [text.get_text() for a in figure.axes for text in a.texts]
    return "\n".join([*(t.get_text() for t in figure.texts), *axes])


def test_values_are_coloured_by_class_and_zeros_are_grey(italy: Places, local: LocalMoran):
    figure = value_map(local.values, italy, title="Latent 123", n_classes=4)
    found = drawn(figure.axes[1])
    assert len(found) == N
    breaks = class_breaks(local.values[local.values != 0], 4, "natural")
    by_class: dict[int, set[str]] = {}
    for lon, lat, value in zip(italy.lon, italy.lat, local.values, strict=True):
        rank = -1 if value == 0 else int(classify(np.array([value]), breaks)[0])
        by_class.setdefault(rank, set()).add(found[float(lon), float(lat)])
    assert by_class[-1] == {INACTIVE}
    assert all(len(colours) == 1 for colours in by_class.values())
    assert len(set.union(*by_class.values())) == 5  # four classes and grey
    # Later points lie on top: the grey ones are the lowest, then ascending values.
    zeros, active = sorted(scatters(figure.axes[1]), key=lambda c: c.get_zorder())
    assert len(zeros.get_offsets()) == (local.values == 0).sum()
    shade = active.get_array()
    assert (np.diff(shade) >= 0).all()
    assert "Latent 123" in texts(figure)
    assert f"0 ({(local.values == 0).sum()})" in texts(figure)


def test_darker_is_more(italy: Places, local: LocalMoran):
    figure = value_map(local.values, italy, scheme="continuous")
    found = drawn(figure.axes[1])
    order = np.argsort(local.values)[(local.values == 0).sum() :]
    light = [
        sum(int(found[float(italy.lon[i]), float(italy.lat[i])][k : k + 2], 16) for k in (1, 3, 5))
        for i in order
    ]
    assert light[-1] < light[0]


def test_labels_have_esdas_colours_and_places_are_matched_by_row_id(
    italy: Places, local: LocalMoran
):
    assert len(set(local.label)) >= 3
    for places in (italy, italy.take(np.random.default_rng(3).permutation(N))):
        figure = lisa_map(local, places)
        found = drawn(figure.axes[1])
        for i in range(N):
            spot = float(italy.lon[i]), float(italy.lat[i])
            assert found[spot] == COLOURS[str(local.label[i])]
        for name, count in local.counts()[0].items():
            assert f"{name} {count}" in texts(figure)
    assert "Latent 123, I = " in texts(figure)
    assert "999 conditional permutations, two-sided, BH over places, level 0.1" in texts(
        figure
    ).replace("\n", " ")


def test_outlines_lie_below_the_points_and_inside_the_axes(italy: Places, local: LocalMoran):
    axes = lisa_map(local, italy).axes[1]
    (west, east), (south, north) = axes.get_xlim(), axes.get_ylim()
    (line,) = axes.lines
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    kept = ~np.isnan(x)
    assert kept.sum() > 300
    assert west - 1e-4 <= x[kept].min() and x[kept].max() <= east + 1e-4
    assert south - 1e-4 <= y[kept].min() and y[kept].max() <= north + 1e-4
    assert line.get_zorder() < min(c.get_zorder() for c in scatters(axes))
    assert axes.patches  # land
    assert west < italy.lon.min() and italy.lon.max() < east


def test_the_map_has_the_shape_of_its_middle_latitude(italy: Places, local: LocalMoran):
    figure = lisa_map(local, italy)
    axes = figure.axes[1]
    (west, east), (south, north) = axes.get_xlim(), axes.get_ylim()
    box = axes.get_position()
    wide, high = box.width * figure.get_figwidth(), box.height * figure.get_figheight()
    shrink = np.cos(np.deg2rad((south + north) / 2))
    assert wide / high == pytest.approx((east - west) * shrink / (north - south), rel=1e-6)


def test_places_on_both_sides_of_the_antimeridian_stay_together():
    generator = np.random.default_rng(0)
    lon = np.concatenate([generator.uniform(177, 180, 20), generator.uniform(-180, -178, 20)])
    figure = value_map(np.arange(40.0), make_places(lon, generator.uniform(-19, -16, 40)))
    axes = figure.axes[1]
    west, east = axes.get_xlim()
    assert west > 175 and east < 184
    assert all(west < x < east for x, _ in drawn(axes))


def test_the_scatter_plot_shows_the_slope_and_the_quadrants(local: LocalMoran):
    figure = moran_scatter(local)
    axes = figure.axes[1]
    assert len(drawn(axes)) == len({(z, g) for z, g in zip(local.z, local.lag, strict=True)})
    assert all(
        drawn(axes)[float(z), float(g)] in (COLOURS[str(label)], COLOURS["High-High"])
        for z, g, label in zip(local.z, local.lag, local.label, strict=True)
    )
    slope = next(line for line in axes.lines if line.get_zorder() == 9)
    (x0, x1), (y0, y1) = np.asarray(slope.get_xdata()), np.asarray(slope.get_ydata())
    assert (y1 - y0) / (x1 - x0) == pytest.approx(local.global_i[0])  # row-standardised
    for rank, name in enumerate(("HH", "LH", "LL", "HL"), start=1):
        assert f"{name} {(local.q == rank).sum()}" in texts(figure)


def test_a_sheet_holds_the_three_drawings(italy: Places, local: LocalMoran):
    figure = feature_map(local, italy)
    assert len(figure.axes) == 6  # three, each with a strip for its legend
    value, lisa, scatter = figure.axes[1::2]
    assert drawn(value).keys() == drawn(lisa).keys()
    assert len(drawn(scatter)) > 50
    boxes = [axes.get_position() for axes in (value, lisa, scatter)]
    assert boxes[0].x1 < boxes[1].x0 and boxes[1].x1 < boxes[2].x0  # side by side
    assert f"Latent 123, I = {local.global_i[0]:.2f}" in texts(figure)
    assert "GeoNames IT, CC BY 4.0; outlines Natural Earth" in texts(figure).replace("\n", " ")
    wide = feature_map(local, italy, bounds=(-180, -60, 180, 80))
    boxes = [axes.get_position() for axes in wide.axes[1::2]]
    assert boxes[0].y0 > boxes[1].y1 and boxes[0].x1 < boxes[2].x0  # one above the other


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_input_writes_the_same_bytes(
    kind: str, italy: Places, local: LocalMoran, tmp_path: Path
):
    paths = [
        save_figure(feature_map(local, italy), tmp_path / f"{i}.{kind}", dpi=40) for i in (1, 2)
    ]
    first, second = (path.read_bytes() for path in paths)
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"1.{kind}", f"2.{kind}"]
    assert not re.search(rb"<dc:date>|Software|20\d\d-\d\d-\d\dT", first)
    other = save_figure(value_map(local.values, italy), tmp_path / f"3.{kind}", dpi=40)
    assert other.read_bytes() != first


def test_a_file_that_fails_leaves_the_old_one(
    italy: Places, local: LocalMoran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "map.png"
    path.write_bytes(b"old")
    figure = value_map(local.values, italy)

    def fails(file, **options):
        file.write(b"half")
        raise RuntimeError("stopped")

    monkeypatch.setattr(figure, "savefig", fails)
    with pytest.raises(RuntimeError, match="stopped"):
        save_figure(figure, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]


def test_maps_need_no_display_and_no_pyplot():
    code = (
        "import sys, numpy as np, pyarrow as pa\n"
        "from sae_apps.geospatial.maps import value_map\n"
        "from sae_apps.geospatial.places import Places\n"
        "assert 'matplotlib' not in sys.modules\n"
        "t = pa.table({'row_id': pa.array([1, 2], pa.int64()), 'name': ['a', 'b'],"
        " 'lat': [1.0, 2.0], 'lon': [3.0, 4.0]})\n"
        "value_map(np.array([0.0, 1.0]), Places(t, 'test'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_maps_of_few_or_empty_values(italy: Places, local: LocalMoran, tmp_path: Path):
    for values in (np.zeros(N), np.full(N, 2.5), -np.arange(N, dtype=float)):
        for scheme in ("natural", "quantiles", "continuous"):
            figure = value_map(values, italy, scheme=scheme)
            assert len(drawn(figure.axes[1])) == N
    one = make_places(np.array([12.5]), np.array([41.9]))
    assert len(drawn(value_map(np.array([1.0]), one).axes[1])) == 1
    save_figure(figure, tmp_path / "deep" / "map.png", dpi=30)
    assert (tmp_path / "deep" / "map.png").is_file()


def test_bad_input_is_refused(italy: Places, local: LocalMoran, tmp_path: Path):
    with pytest.raises(UserError, match=r"90 values, one per place, got the shape \(3,\)"):
        value_map(np.zeros(3), italy)
    with pytest.raises(UserError, match="finite values, got nan"):
        value_map(np.full(N, np.nan), italy)
    with pytest.raises(UserError, match=r"\.png or \.svg, got 'map\.jpg'"):
        save_figure(value_map(local.values, italy), tmp_path / "map.jpg")
    with pytest.raises(UserError, match="of one feature, got 2"):
        lisa_map(replace(local, names=("1", "2"), status=("ok", "ok")), italy)
    with pytest.raises(UserError, match="missing"):
        lisa_map(local, italy.take(np.arange(N - 1)))


def within(values: np.ndarray, breaks: np.ndarray) -> float:
    """Sum of squares within classes."""
    classes = classify(values, breaks)
    return sum(
        ((values[classes == c] - values[classes == c].mean()) ** 2).sum() for c in set(classes)
    )


def test_natural_breaks_are_the_best_of_all():
    values = np.random.default_rng(0).choice([0.5, 1, 1.1, 2, 5, 5.2, 9], 25)
    levels = np.unique(values)
    best = min(
        within(values, np.array([levels[0], levels[i], levels[j], levels[-1]]))
        for i in range(len(levels) - 2)
        for j in range(i + 1, len(levels) - 1)
    )
    breaks = class_breaks(values, 3, "natural")
    assert within(values, breaks) == pytest.approx(best)
    assert (breaks[0], breaks[-1]) == (levels[0], levels[-1])


def test_natural_breaks_of_many_values_are_nearly_the_best(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).gamma(2.0, size=3 * MOST_VALUES)
    coarse = within(values, class_breaks(values, 6, "natural"))
    monkeypatch.setattr(classes, "MOST_VALUES", len(values))
    best = within(values, class_breaks(values, 6, "natural"))
    assert best < coarse < 1.02 * best
    assert best < 0.8 * within(values, np.linspace(values.min(), values.max(), 7))


def test_quantiles_hold_equal_shares():
    values = np.random.default_rng(0).random(600)
    breaks = class_breaks(values, 6, "quantiles")
    assert np.bincount(classify(values, breaks)).tolist() == [100] * 6


def test_few_values_make_few_classes():
    assert class_breaks(np.array([2.0, 2.0]), 6, "natural").tolist() == [2.0, 2.0]
    assert class_breaks(np.array([1.0, 2.0, 2.0]), 6, "natural").tolist() == [1.0, 1.0, 2.0]
    with pytest.raises(UserError, match="got 0 values"):
        class_breaks(np.array([]), 6, "natural")
    with pytest.raises(UserError, match="got 'equal'"):
        class_breaks(np.ones(3), 6, "equal")  # type: ignore[arg-type]


def test_edges_are_written_alike():
    assert edge_texts([0.00027, 0.166, 0.351, 2.08]) == ["0.00", "0.17", "0.35", "2.08"]
    assert edge_texts([0.0, 1500.0, 40_000.0]) == ["0", "1,500", "40,000"]
    assert edge_texts([1e-9, 2e-9]) == ["1e-09", "2e-09"]
    assert edge_texts([2.5, 2.5]) == ["2.50", "2.50"]
