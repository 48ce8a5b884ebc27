"""Coordinates by ridge regression: in the world, in an area, within the world's countries.

Blocks are ten groups of places that lie together (k-means on the sphere), whatever the area: one of
the world is a part of a continent, one of GB some counties. ``block_km`` says how large they came
out: the median distance of a place from the middle of its block. R2 is against the mean direction
of the blocks that were fitted on, ``chance_km`` the median error of their spherical median. Random
folds stand beside the blocks for raw units, to show what they leak.

Within countries (area "world, within countries") the targets are kilometres north and east of the
spherical median of a place's country, less the country's mean; from the features the country's mean
is removed as well, as in regression with fixed effects, so that to know the country is worth
nothing. Whole countries are held out: a direction counts as north only if it is north elsewhere
too. R2 is against the country's mean, which has R2 0. Countries with fewer than five places are
left out.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks.geography_data import Lab, Spot, codes_of, prompt_of, residual, units_of
from sae_apps.geospatial.controls import token_features
from sae_apps.geospatial.coordinates import (
    ALPHAS,
    CoordinateProbe,
    nested,
    north_east_km,
    probe_coordinates,
    spherical_median,
)
from sae_apps.geospatial.places import Places
from sae_apps.geospatial.prompts import ProbeConfig
from sae_apps.geospatial.ridge import total_variance
from sae_apps.geospatial.sphere import angle_km, unit_vectors
from sae_core.errors import UserError
from sae_core.features import SparseFeatures

N_BLOCKS = 10
LEAST = 5  # places of a country
WITHIN = "world, within countries"


@dataclass(frozen=True)
class Within:
    """What features tell about places beyond their label."""

    r2_lat: float
    """1 - squared northward errors / squared northward distances from the label's mean."""
    r2_lon: float
    """The same eastward."""
    median_km: float
    """Median error on the plane that touches the label's middle."""
    chance_km: float
    """The same for the label's mean."""
    n_places: int
    """Places of labels with at least LEAST."""
    n_labels: int
    """Those labels."""


def probe_rows(
    lab: Lab, areas: Sequence[str], prompts: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Coordinates from latents and from raw units, blocked in space and at random."""
    for area in areas:
        places, _ = lab.area(area)
        for at in (spot for spot in lab.study.main[area] if spot.prompt in prompts):
            sets = coordinate_sets(lab, places, at, prompt_of(at.prompt, area))
            for what, values in sets.items():
                facts = {
                    "model": lab.model, "area": area, "prompt": at.prompt, "layer": at.layer,
                    "set": what,
                }  # fmt: skip
                for folds in ("blocked", "random") if what == "units" else ("blocked",):
                    yield probe_row(values, places, facts | {"folds": folds})
                if area == "world":
                    yield within_row(
                        values, places, facts | {"area": WITHIN, "folds": "countries held out"}
                    )


def coordinate_sets(lab: Lab, places: Places, at: Spot, config: ProbeConfig) -> dict[str, Any]:
    """What coordinates are read from."""
    hook = residual(at.layer)
    return {
        **codes_of(lab, places, config, at.saes[:1]),
        "units": units_of(lab, lab.lm, places, config, [hook])[hook],
        "units, untrained": units_of(lab, lab.random, places, config, [hook])[hook],
        "tokens of the name": token_features(lab.lm, places, config),
    }


def probe_row(values: Any, places: Places, facts: dict[str, Any]) -> dict[str, Any]:
    """One record of the probe of an area; ``facts["folds"]`` is blocked or random."""
    begin = time.perf_counter()
    blocks = None if facts["folds"] == "blocked" else "random"
    found = probe_coordinates(values, places, blocks=blocks, n_blocks=N_BLOCKS)
    return _row(
        facts, begin, n_places=places.n, r2_lat=found.r2_lat, r2_lon=found.r2_lon,
        median_km=found.median_km, chance_km=found.chance_km, n_blocks=N_BLOCKS,
        block_km=block_km(found, places),
    )  # fmt: skip


def within_row(values: Any, places: Places, facts: dict[str, Any]) -> dict[str, Any]:
    """One record of the probe within labels."""
    begin = time.perf_counter()
    found = probe_within(values, places)
    return _row(
        facts, begin, n_places=found.n_places, r2_lat=found.r2_lat, r2_lon=found.r2_lon,
        median_km=found.median_km, chance_km=found.chance_km, n_blocks=N_BLOCKS, block_km=None,
    )  # fmt: skip


def _row(facts: dict[str, Any], begin: float, **found: Any) -> dict[str, Any]:
    name = " | ".join(str(value) for value in facts.values())
    seconds = round(time.perf_counter() - begin, 1)
    return {"name": name, "part": "probe", **facts, **found, "seconds": seconds}


def block_km(found: CoordinateProbe, places: Places) -> float:
    """Median distance of a place from the spherical median of its block."""
    u = unit_vectors(places.lon, places.lat)
    middle = np.empty_like(u)
    for b in range(int(found.block.max()) + 1):
        middle[found.block == b] = spherical_median(u[found.block == b])
    return float(np.median(angle_km(u, middle)))


def probe_within(features: Any, places: Places, *, n_blocks: int = N_BLOCKS) -> Within:
    """Ridge from features to places, both less the mean of their label; whole labels held out.

    Args:
        features: [n, F], dense, sparse or SparseFeatures of these places in their order.
        places: with labels; places without one, and of labels with fewer than LEAST, do not count.
        n_blocks: labels are dealt out into so many blocks of like size.
    Raises:
        UserError: fewer than ``n_blocks`` labels have enough places.
    """
    names, of, counts = np.unique(
        [label or "" for label in places.label], return_inverse=True, return_counts=True
    )
    kept = np.flatnonzero((counts[of] >= LEAST) & (names[of] != ""))
    _, of = np.unique(of[kept], return_inverse=True)
    n_labels = int(of.max(initial=-1)) + 1
    if n_labels < n_blocks:
        raise UserError(f"Expected {n_blocks} labels with {LEAST} places, got {n_labels}.")
    u = unit_vectors(places.lon[kept], places.lat[kept])
    middle = np.stack([spherical_median(u[of == label]) for label in range(n_labels)])[of]
    # the arc from a place to the middle, the other way round: north and east of it
    y = demeaned(-north_east_km(u, middle), of)
    x = demeaned(dense(features)[kept], of)
    block = dealt(of, n_blocks)
    rows_of = [np.flatnonzero(block == b) for b in range(n_blocks)]
    predicted, _ = nested(x, y, rows_of, np.sort(ALPHAS)[::-1] * total_variance(x))
    r2 = 1 - ((y - predicted) ** 2).sum(axis=0) / (y**2).sum(axis=0)
    return Within(
        float(r2[0]), float(r2[1]), float(np.median(np.linalg.norm(y - predicted, axis=1))),
        float(np.median(np.linalg.norm(y, axis=1))), len(kept), n_labels,
    )  # fmt: skip


def dense(features: Any) -> np.ndarray:
    """[n, F] in float64."""
    x = features.acts if isinstance(features, SparseFeatures) else features
    return np.asarray(x.toarray() if sparse.issparse(x) else x, dtype=np.float64)


def demeaned(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Values less the mean of their label."""
    counts = np.bincount(of)
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, of, values)
    return values - (sums / counts[:, None])[of]


def dealt(of: np.ndarray, n_blocks: int) -> np.ndarray:
    """A block for each place: labels whole, the largest first, each to the smallest block."""
    counts = np.bincount(of)
    home, size = np.empty(len(counts), dtype=np.int64), np.zeros(n_blocks, dtype=np.int64)
    for label in np.argsort(-counts, kind="stable"):
        home[label] = size.argmin()
        size[home[label]] += counts[label]
    return home[of]
