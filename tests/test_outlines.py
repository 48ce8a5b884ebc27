"""Packaged outlines: clipping, the antimeridian, the pole, the window that fits places."""

import gzip
import json
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_apps.geospatial import outlines as module
from sae_apps.geospatial.outlines import (
    WORLD,
    fit_bounds,
    land,
    outlines,
    state_borders,
    wrap_lon,
)
from sae_core.errors import UserError

FLOAT32 = 2e-5  # degrees; float32 resolves 1.5e-5 at 180
GB, FIJI = (-8.7, 49.8, 1.9, 60.9), (176.0, -20.0, 183.0, -15.0)


def length(lines: list[np.ndarray]) -> float:
    return sum(float(np.hypot(*np.diff(line.astype(np.float64), axis=0).T).sum()) for line in lines)


def ends(lines: list[np.ndarray]) -> list[frozenset]:
    """Every segment without its direction, to the precision of the files."""
    found = []
    for line in lines:
        steps = [tuple(point) for point in np.round(line.astype(np.float64), 4)]
        found += [frozenset(pair) for pair in zip(steps, steps[1:], strict=False)]
    return found


def test_the_files_are_small_and_their_origin_is_told():
    folder = resources.files("sae_apps.geospatial") / "data"
    files = {file.name: len(file.read_bytes()) for file in folder.iterdir() if file.is_file()}
    assert sum(files.values()) < 400_000
    told = (folder / "SOURCES.md").read_text(encoding="utf-8")
    packed = [name for name in files if name.endswith(".gz")]
    assert len(packed) == 3
    assert all(name in told for name in packed)


@pytest.mark.parametrize("bounds", [WORLD, GB, FIJI, (-81.0, 38.0, -71.0, 46.0)])
def test_lines_are_float32_within_the_window_and_never_jump(bounds):
    lines = outlines(bounds)
    assert lines
    west, south, east, north = bounds
    for line in lines:
        assert line.dtype == np.float32 and line.ndim == 2 and line.shape[1] == 2 <= len(line)
        low, high = line.min(axis=0), line.max(axis=0)
        assert (low >= np.array([west, south]) - FLOAT32).all()
        assert (high <= np.array([east, north]) + FLOAT32).all()
        assert np.abs(np.diff(line, axis=0)).max() < 15  # the longest piece of a border is 9


@pytest.mark.parametrize("detail", ["110m", "50m"])
def test_each_border_is_drawn_once(detail):
    segments = ends(outlines(None, detail, states=None))
    assert len(segments) > 7_000
    assert len(set(segments)) == len(segments)


def test_known_borders_are_where_they_are():
    # The border of the USA and Canada along the 49th parallel, on the coarse map.
    lines = np.concatenate(outlines((-122.0, 48.0, -96.0, 50.0), "110m", states=None))
    assert np.abs(lines[:, 1] - 49.0).min() < 0.01
    # Land's End, Dover and the north of Scotland are the rim of Great Britain.
    coast = np.concatenate(outlines((-6.0, 49.8, 1.9, 58.8), "50m"))
    for lon, lat in ((-5.7, 50.07), (1.38, 51.15), (-3.1, 58.65)):
        assert np.hypot(coast[:, 0] - lon, coast[:, 1] - lat).min() < 0.15


def test_a_window_shows_the_same_lines_as_its_halves():
    west, south, east, north = GB
    middle = -3.0
    halves = outlines((west, south, middle, north)) + outlines((middle, south, east, north))
    assert length(halves) == pytest.approx(length(outlines(GB)), rel=1e-5)


def test_clipping_is_exact():
    line = np.array([[-2.0, 0.5], [0.5, 0.5], [0.5, 2.0], [3.0, 3.0], [0.5, 0.75], [0.25, 0.25]])
    window = (0.0, 0.0, 1.0, 1.0)
    pieces = module._inside(line, np.ones(5, dtype=bool), window)
    assert [piece.tolist() for piece in pieces[:1]] == [[[0.0, 0.5], [0.5, 0.5], [0.5, 1.0]]]
    entering, last = pieces[1][0], pieces[1][1:]
    assert entering[1] == 1.0 and 0.5 < entering[0] < 1.0
    assert last.tolist() == [[0.5, 0.75], [0.25, 0.25]]
    assert len(pieces) == 2
    assert module._inside(line, np.zeros(5, dtype=bool), window) == []


@given(st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), min_size=2, max_size=8))
def test_clipped_points_are_those_inside(points: list[tuple[int, int]]):
    line, window = np.array(points, dtype=np.float64) / 2, (-1.25, -1.25, 1.25, 1.25)
    pieces = module._inside(line, np.ones(len(line) - 1, dtype=bool), window)
    steps = np.linspace(0, 1, 201)[:, None]
    fine = [a + steps * (b - a) for a, b in zip(line, line[1:], strict=False)]
    inside = sum(
        np.hypot(*(b - a)) * (np.abs(part) <= 1.25).all(axis=1).mean()
        for a, b, part in zip(line, line[1:], fine, strict=False)
    )
    assert length(pieces) == pytest.approx(inside, abs=0.12 * len(line))


def test_through_the_antimeridian_the_frame_goes_on():
    lines = np.concatenate(outlines(FIJI))
    assert lines[:, 0].min() < 178.7 and lines[:, 0].max() > 180.5  # Viti Levu, and isles beyond
    again = np.concatenate(outlines((176.0, -20.0, -177.0, -15.0)))  # the same, east below west
    np.testing.assert_array_equal(lines, again)
    west_side = np.concatenate(outlines((-180.0, -20.0, -177.0, -15.0)))
    beyond = lines[lines[:, 0] > 180.01]
    assert {tuple(np.round(p, 3)) for p in beyond - [360, 0]} <= {
        tuple(np.round(p, 3)) for p in west_side.astype(np.float64)
    }


@pytest.mark.parametrize("detail", ["110m", "50m"])
def test_nothing_is_drawn_along_the_seam_or_the_pole(detail):
    for line in outlines(None, detail):
        on_seam = np.abs(line[:, 0]) == 180
        assert not (on_seam[:-1] & on_seam[1:]).any()
        assert line[:, 1].min() > -89


@pytest.mark.parametrize("detail", ["110m", "50m"])
def test_rings_of_land_are_closed_and_hold_the_pole(detail):
    rings = land(None, detail)
    assert all((ring[0] == ring[-1]).all() and len(ring) >= 4 for ring in rings)
    for ring in rings:
        inner = (np.abs(ring[:, 0]) < 180) & (
            np.abs(ring[:, 1]) < 84
        )  # the edges of the window are straight
        steps = np.abs(np.diff(ring, axis=0))[inner[1:] & inner[:-1]]
        assert steps.max(initial=0.0) < 15

    def is_land(lon: float, lat: float) -> bool:
        """By the winding number, summed over all rings."""
        turns = 0
        for ring in rings:
            x, y = ring.astype(np.float64).T
            crosses = (y[:-1] <= lat) != (y[1:] <= lat)
            with np.errstate(divide="ignore", invalid="ignore"):
                at = x[:-1] + (lat - y[:-1]) / (y[1:] - y[:-1]) * (x[1:] - x[:-1])
            turns += int((np.sign(y[1:] - y[:-1]) * (crosses & (at > lon))).sum())
        return turns != 0

    for lon, lat in ((0, -88), (-1.5, 52.5), (12.5, 42.5), (175.7, -38.5), (-178.5, 67), (25, 0)):
        assert is_land(lon, lat), (lon, lat)
    for lon, lat in ((-30, 40), (51, 42), (-170, 0), (5, 40), (178, 75)):  # 51, 42: the Caspian
        assert not is_land(lon, lat), (lon, lat)


def area(rings: list[np.ndarray]) -> float:
    """Square degrees, holes taken off."""
    total = 0.0
    for ring in rings:
        x, y = ring.astype(np.float64).T
        total += float(x[1:] @ y[:-1] - x[:-1] @ y[1:]) / 2
    return total


def test_land_is_cut_at_the_window():
    for ring in land(GB):
        assert (ring >= np.array(GB[:2]) - FLOAT32).all()
        assert (ring <= np.array(GB[2:]) + FLOAT32).all()
    west, south, east, north = GB
    halves = land((west, south, -3.0, north)) + land((-3.0, south, east, north))
    assert area(halves) == pytest.approx(area(land(GB)), rel=1e-5)
    inland = (-2.0, 52.0, -1.0, 53.0)
    assert area(land(inland)) == pytest.approx(1.0, rel=1e-5)
    assert land((-30.0, 30.0, -28.0, 35.0)) == []


def test_states_come_with_fine_maps_of_the_usa_only():
    region = (-81.0, 38.0, -71.0, 46.0)
    bare, full = outlines(region, states=None), outlines(region)
    assert len(full) == len(bare) + len(state_borders(region))
    assert len(outlines(region, states=False)) == len(bare)
    # New York and Pennsylvania meet on the 42nd parallel.
    lines = np.concatenate(state_borders((-79.0, 41.8, -76.0, 42.2)))
    assert np.abs(lines[:, 1] - 42.0).max() < 0.05
    assert state_borders(GB) == []
    assert len(outlines(None)) == len(outlines(None, states=None))
    assert len(outlines(None, states=True)) > len(outlines(None))


def test_detail_follows_the_window():
    assert length(outlines(GB)) == length(outlines(GB, "50m")) > 1.2 * length(outlines(GB, "110m"))
    assert length(outlines(None)) == length(outlines(None, "110m"))


def test_the_narrowest_window_may_cross_the_antimeridian():
    west, south, east, north = fit_bounds(np.array([179.0, -179.0]), np.array([-18.0, -17.0]))
    assert 178 < west < 179 and 181 < east < 182
    assert -19 < south < -18 and -17 < north < -16
    lon = wrap_lon(np.array([179.0, -179.0]), west)
    assert lon.tolist() == [179.0, 181.0]


@given(
    st.lists(st.tuples(st.floats(-180, 180), st.floats(-85, 85)), min_size=1, max_size=12),
    st.floats(0, 0.2),
)
def test_a_window_holds_all_places_and_no_narrower_one_does(points, margin):
    lon, lat = np.array(points).T
    west, south, east, north = fit_bounds(lon, lat, margin)
    assert -180 <= west < 180 and west < east <= west + 360
    assert (south <= lat).all() and (lat <= north).all()
    inside = wrap_lon(lon, west)
    assert (inside <= east + 1e-9).all()
    outlines((west, south, east, north), "110m")  # is a window
    tight = fit_bounds(lon, np.zeros_like(lat), 0.0)
    widest = min(
        (np.sort((lon - first) % 360)[-1] for first in lon), default=0.0
    )  # the arc that starts at some place and holds the others
    assert tight[2] - tight[0] <= widest + 2 * module.LEAST_MARGIN + 1e-9


def test_a_margin_alone_does_not_cross_the_antimeridian():
    west, _, east, _ = fit_bounds(np.array([-160.0, -100, -40, 20, 80, 139]), np.zeros(6), 0.2)
    assert (west, east) == (-180.0, 180.0)


def test_the_file_on_disk_is_what_its_page_says():
    file = resources.files("sae_apps.geospatial") / "data" / "outlines-50m.json.gz"
    document = json.loads(gzip.decompress(file.read_bytes()))
    assert sum(document["points"]) == len(document["x"]) == len(document["y"])
    first = document["points"][0]
    arc = np.cumsum([document["x"][:first], document["y"][:first]], axis=1).T * document["step"]
    np.testing.assert_allclose(module._layer("50m").points[:first], arc, atol=1e-9)


@pytest.mark.parametrize(
    "bounds",
    [(0, 50, 10, 40), (0, -91, 10, 0), (0, 0, 400, 10), (np.nan, 0, 10, 10), (900, 0, 910, 1)],
)
def test_bounds_that_are_no_window_are_refused(bounds):
    with pytest.raises(UserError, match=r"Expected bounds .* got \("):
        outlines(bounds)


def test_other_bad_input_is_refused():
    with pytest.raises(UserError, match="got '10m'"):
        outlines(GB, "10m")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="latitude 91.0 and longitude 0.0 for place 1"):
        fit_bounds(np.zeros(2), np.array([0.0, 91.0]))
    for lon, lat in ((np.zeros(0), np.zeros(0)), (np.zeros(2), np.zeros(3))):
        with pytest.raises(UserError, match="the same places"):
            fit_bounds(lon, lat)
