"""The work behind ``sae-apps geo``: read the places, test, map, write."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy import sparse

from sae_apps.geospatial.places import Places
from sae_apps.geospatial.probe import probe, probe_units
from sae_core.features import SparseFeatures
from sae_core.store import atomic_folder, load_features, save_features, verify_folder
from sae_core.untrusted import read_array

from .geo_plan import Asked, Plan, correction_of, local_permutations, nulls_of, rate_of
from .progress import Progress, duration

if TYPE_CHECKING:
    from sae_apps.geospatial.local_result import LocalMoran
    from sae_apps.geospatial.moran_table import MoranTable
    from sae_apps.geospatial.report_result import GeoReport

LOG = logging.getLogger(__name__)
PART = 512  # places between two reports of progress


def read_places(plan: Plan, *, quiet: bool = False) -> SparseFeatures:
    """Features of the places: from the run's folder, or by the model and kept there."""
    if plan.cache.is_dir():
        LOG.info("features of the places from %s", plan.cache)
        return load_features(plan.cache)
    encoder, config = plan.encoder, plan.asked.probe
    parts = [
        probe(encoder.lm, encoder.sae, encoder.hook_point, some, config)
        for some in _in_parts(plan, "features", quiet)
    ]
    acts = sparse.csr_array(sparse.vstack([part.acts for part in parts], format="csr"))
    table = pa.concat_tables([part.rows for part in parts])
    features = SparseFeatures(acts, table, parts[0].provenance)
    save_features(plan.cache, features)
    return features


def read_units(plan: Plan, *, quiet: bool = False) -> Float[np.ndarray, "n d_in"]:
    """The activations behind the features, pooled alike: cached like these."""
    folder = plan.cache.with_name(f"{plan.cache.name}-raw")
    if folder.is_dir():
        verify_folder(folder)
        return read_array(folder / "units.npy")
    encoder, point = plan.encoder, plan.encoder.hook_point
    parts = [
        probe_units(encoder.lm, [point], some, plan.asked.probe)[point]
        for some in _in_parts(plan, "raw units", quiet)
    ]
    units = np.concatenate(parts)
    with atomic_folder(folder) as temp:
        np.save(temp / "units.npy", units)
    return units


def _in_parts(plan: Plan, what: str, quiet: bool) -> Iterator[Places]:
    """The places, so many at a time, with progress after each part."""
    places = plan.places
    with Progress(what, places.n, "places", enabled=not quiet) as shown:
        for first in range(0, places.n, PART):
            some = places.take(np.arange(first, min(first + PART, places.n)))
            yield some
            shown.update(some.n)


def run(asked: Asked, plan: Plan, *, quiet: bool = False) -> dict[str, Any]:
    """Read the places, test, and write the folder; returns the summary."""
    from .geo_files import write_result
    from .geo_text import summarise

    start = time.monotonic()
    features = read_places(plan, quiet=quiet)
    baselines = {}
    if asked.chosen.baseline == "raw":
        baselines["raw units"] = read_units(plan, quiet=quiet)
    tested = time.monotonic()
    result = analyse(plan, features, baselines)
    LOG.info(
        "read in %s, tested in %s", duration(tested - start), duration(time.monotonic() - tested)
    )
    summary = summarise(plan, features, result)
    write_result(plan, features, result, summary)
    return summary


@dataclass(frozen=True, eq=False)
class Result:
    """What came of the tests."""

    table: "MoranTable"
    """Every latent under free permutation, with the options that were asked for."""
    report: "GeoReport"
    """Latents and raw units under four nulls."""
    leading: list[int]
    """Latents of the largest I, best first."""
    local: "LocalMoran | None"
    """Their local Moran's I; None where no latent could be tested."""


def analyse(
    plan: Plan, features: SparseFeatures, baselines: dict[str, Float[np.ndarray, "n d_in"]]
) -> Result:
    """Moran's I of everything, and local clusters of the leading latents."""
    from sae_apps.geospatial.local import moran_local
    from sae_apps.geospatial.moran import moran
    from sae_apps.geospatial.report import geo_report

    test, chosen = plan.asked.test, plan.asked.chosen
    correction, nulls = correction_of(test), nulls_of(plan.asked)
    report = geo_report(
        features,
        plan.places,
        plan.weights,
        baselines=baselines,
        covariates=plan.covariates,
        labels=plan.labels,
        nulls=nulls,
        n_leading=chosen.top,
    )
    table = moran(
        features,
        plan.weights,
        permutations=test.permutations,
        alternative=test.alternative,
        min_active=test.min_active,
        p_adjust=correction,
        adaptive=test.adaptive,
        seed=chosen.seed,
        device=chosen.device,
    )
    leading = [int(latent) for latent in table.top(chosen.top)]
    local = None
    if leading:
        local = moran_local(
            values_of(features, leading),
            plan.weights,
            permutations=local_permutations(test),
            alternative=test.local_alternative,
            p_adjust=rate_of(test),
            alpha=test.local_alpha,
            groups=None if test.local_pooled else plan.groups,
            seed=chosen.seed,
            names=[f"latent {latent}" for latent in leading],
        )
    return Result(table, report, leading, local)


def values_of(features: SparseFeatures, latents: Sequence[int]) -> Float[np.ndarray, "n f"]:
    """Some columns of the features, dense."""
    return features.acts[:, list(latents)].toarray().astype(np.float64)
