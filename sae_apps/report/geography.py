"""Maps of the leading features: choose a feature, hover a place, values beside local clusters.

Everything that the map needs is inside the page (``map_data``). The page's script draws it on a
canvas; without it a drawing of the first feature and the table stand alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

from sae_apps.report.formats import clean, number, short
from sae_apps.report.map_data import CLASSES, payload, static_map, strongest
from sae_apps.report.page import MAX_BYTES, Section, render
from sae_apps.report.projection import choose_projection
from sae_core.errors import UserError

MAX_PLACES = 40_000  # drawn; supposed to redraw without delay
BUDGET = int(0.75 * MAX_BYTES)  # of the data; the rest of the page has the remainder
WIDE = 0.7  # height over width below which the map takes the whole width
SMALLEST_P = 1e-6
N_TOP = 5  # places named for a feature


@dataclass(frozen=True, eq=False)
class MapPlaces:
    """Where the places are."""

    name: Sequence[str]
    """As a reader should see them."""
    lon: Float[np.ndarray, " n"]
    """Degrees east."""
    lat: Float[np.ndarray, " n"]
    """Degrees north."""
    label: Sequence[str | None]
    """Region or country of each place; None where unknown."""

    def __post_init__(self) -> None:
        sizes = {len(self.name), len(self.lon), len(self.lat), len(self.label)}
        if len(sizes) != 1 or not len(self.name):
            raise UserError(
                "Expected as many names, longitudes, latitudes and labels, at least one, got "
                f"{len(self.name)}, {len(self.lon)}, {len(self.lat)} and {len(self.label)}."
            )
        for what, values, limit in (("longitude", self.lon, 180), ("latitude", self.lat, 90)):
            wrong = np.flatnonzero(~(np.abs(np.asarray(values)) <= limit))
            if len(wrong):
                raise UserError(
                    f"Expected a {what} between -{limit} and {limit}, "
                    f"got {values[wrong[0]]} for {self.name[wrong[0]]!r}."
                )


@dataclass(frozen=True, eq=False)
class MapFeature:
    """One feature on the map."""

    title: str
    """For instance ``latent 12``."""
    values: Float[np.ndarray, " n"]
    """Its value at each place; 0 where it is silent."""
    moran_i: float
    """Moran's I of the values."""
    p: Mapping[str, float | None] = field(default_factory=dict)
    """p or adjusted p under each null, by the null's name; None where it was not tested."""
    lag: Float[np.ndarray, " n"] | None = None
    """Weighted sum of the neighbours' standardised values; None: no scatter plot."""
    lisa: Int[np.ndarray, " n"] | None = None
    """Local cluster: 0 not significant, 1 High-High, 2 Low-High, 3 Low-Low, 4 High-Low."""
    note: str = ""
    """What else is known of it, such as the words on which it fires in ordinary text."""


@dataclass(frozen=True)
class Passing:
    """How many features of one kind pass the rule under each null."""

    what: str
    """For instance ``SAE latents`` or ``raw units``."""
    n_tested: int
    """Features that were tested."""
    counts: Mapping[str, int | None]
    """Features that pass, by the null's name; None where it was not tested."""


@dataclass(frozen=True, eq=False)
class Geography:
    """What the section shows."""

    places: MapPlaces
    features: Sequence[MapFeature]
    """The leading ones, best first."""
    outlines: Sequence[Float[np.ndarray, "m 2"]] = ()
    """Lines of longitude and latitude [degrees], such as coasts and borders."""
    land: Sequence[Float[np.ndarray, "m 2"]] = ()
    """Closed rings of longitude and latitude that are filled; those of lakes run the other way."""
    passing: Sequence[Passing] = ()
    """A row for each kind of feature."""
    rule: str = ""
    """What passing means, for instance ``I >= 0.3 and q < 0.01``."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Where places, neighbours and p-values come from, as name and sentence."""
    credits: Sequence[str] = ()
    """Owners of the data, with their licences."""

    def __post_init__(self) -> None:
        n = len(self.places.name)
        for one in self.features:
            for what, values in (("values", one.values), ("lags", one.lag), ("classes", one.lisa)):
                if values is not None and np.shape(values) != (n,):
                    raise UserError(
                        f"{one.title}: expected {what} of {n} places, got {np.shape(values)}."
                    )
                if values is not None and not np.isfinite(values).all():
                    raise UserError(f"{one.title}: expected finite {what}, got others.")
            if one.lisa is not None and not np.isin(one.lisa, range(len(CLASSES))).all():
                raise UserError(
                    f"{one.title}: expected classes from 0 to {len(CLASSES) - 1}, "
                    f"got {int(np.min(one.lisa))} to {int(np.max(one.lisa))}."
                )


def geography_section(geography: Geography) -> Section:
    """The section: how many features pass, a table of the leading ones, the map, a scatter plot.

    Beyond ``MAX_PLACES`` places an evenly spread sample of them is drawn, and beyond ``BUDGET``
    bytes fewer features; the section says so.

    Raises:
        UserError: texts so long that not even one feature fits into the page.
    """
    shown, notes = _fit(geography)
    nulls = list(dict.fromkeys(name for one in geography.features for name in one.p))
    counted = list(dict.fromkeys(name for row in geography.passing for name in row.counts))
    data, drawing, is_wide = "", Markup(""), False
    if shown.features:
        projection, window = choose_projection(shown.places.lon, shown.places.lat)
        data, is_wide = payload(shown, projection, window), window.aspect < WIDE
        drawing = static_map(shown, projection, window)
    html = render(
        "geography.html.j2",
        n_places=len(geography.places.name),
        passing=geography.passing,
        counted=counted,
        rule=geography.rule,
        rows=[_row(one, nulls, geography.places) for one in geography.features],
        nulls=nulls,
        n_live=len(shown.features),
        drawing=drawing,
        is_wide=is_wide,
        has_lisa=any(one.lisa is not None for one in shown.features),
        has_lag=any(one.lag is not None for one in shown.features),
        facts=geography.facts,
        credits=geography.credits,
        notes=notes,
        data=Markup(data),
    )
    return Section("geography", "Geography", html)


def _fit(geography: Geography) -> tuple[Geography, list[str]]:
    """The part that the map can hold, and sentences on what was left out."""
    places, features, notes = geography.places, list(geography.features), []
    n = len(places.name)
    if n > MAX_PLACES:
        index = np.linspace(0, n - 1, MAX_PLACES).round().astype(np.int64)
        places = MapPlaces(
            [places.name[int(i)] for i in index], np.asarray(places.lon)[index],
            np.asarray(places.lat)[index], [places.label[int(i)] for i in index],
        )  # fmt: skip
        features = [_taken(one, index) for one in features]
        notes.append(
            f"The map draws {MAX_PLACES:,} of the {n:,} places, evenly spread over their list; "
            "every number in the tables is from all of them."
        )
    fixed = len(json.dumps([[clean(t) for t in places.name], list(places.label)]))
    fixed += 12 * n + 8 * sum(map(len, (*geography.outlines, *geography.land)))
    each = 7 * len(places.name) + 500  # 16 bits twice in base64, and a digit
    n_fit = max(0, (BUDGET - fixed) // each)
    if features and not n_fit:
        raise UserError(
            f"Expected names, labels and outlines of a map below {BUDGET:,} bytes, got {fixed:,}."
        )
    if len(features) > n_fit:
        notes.append(f"The map holds the first {n_fit} of the {len(features)} features.")
    shown = Geography(places, features[:n_fit], geography.outlines, geography.land)
    return shown, notes


def _taken(one: MapFeature, index: Int[np.ndarray, " k"]) -> MapFeature:
    lag = None if one.lag is None else np.asarray(one.lag)[index]
    lisa = None if one.lisa is None else np.asarray(one.lisa)[index]
    values = np.asarray(one.values)[index]
    return MapFeature(one.title, values, one.moran_i, one.p, lag, lisa, one.note)


def _row(one: MapFeature, nulls: Sequence[str], places: MapPlaces) -> dict[str, Any]:
    values = np.asarray(one.values)
    best = strongest(values, N_TOP)
    return {
        "title": one.title,
        "moran_i": one.moran_i,
        "p": [_p_text(one.p.get(name)) for name in nulls],
        "n_active": int(np.count_nonzero(values)),
        "top": [{"name": places.name[i], "label": places.label[i]} for i in best],
        "note": one.note,
    }


def _p_text(p: float | None) -> str:
    """Below ``SMALLEST_P`` the value comes from the tail of a fitted curve: only its size holds."""
    return number(p, 2) if p is None or p >= SMALLEST_P else f"< {short(SMALLEST_P)}"
