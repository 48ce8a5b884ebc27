"""Global Moran's I of every latent of an SAE, beside `esda.Moran`, one by one.

    python -m benchmarks.moran_exact [--area world] [--limit 1500] [--every-token] [--dry]

The latents are those of the GBA SAE of layer 15 of SmolLM2 (4,608) on places of GeoNames, read at
the last token of "The city of NAME"; weights are the 8 nearest neighbours on the sphere,
row-standardised, handed to esda as a libpysal Graph. esda takes no permutations here: compared are
I and its analytic moments under randomisation, E[I], V[I] and z.

Every latent has a row of the comparison in one of three ways: both give numbers; it is dead or
constant, where I is 0 / 0, and both say that there is none; or one gives a number and the other
does not, which counts as a disagreement. Differences of z are as large as z is, so they are shown
as a share of max(1, |z|) too.
"""

import argparse
import time
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks.common import Goal, write_result
from benchmarks.geography_data import LABELLED, codes_of, open_lab, prompt_of
from benchmarks.moran import esda_columns
from sae_apps.geospatial.moran import moran
from sae_apps.geospatial.weights import SpatialWeights
from sae_core.features import shape_of

SAE = "gba-15"
COLUMNS = ("I", "EI", "VI_rand", "z_rand")
EXACT = 1e-10
UNDEFINED = ("dead", "constant")


def main() -> None:
    """Compare every latent, write results/moran_exact.json."""
    parser = argparse.ArgumentParser(description="Moran's I of every latent, beside esda's.")
    parser.add_argument("--area", default="world", help="as in sae-apps geo --area")
    parser.add_argument("--limit", type=int, default=1500, help="at most so many places")
    parser.add_argument(
        "--every-token", action="store_true",
        help="codes averaged over all tokens of NAME, LABEL and the BOS: fewer latents are dead",
    )  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="print, write no result")
    args = parser.parse_args()
    started, lab = time.time(), open_lab("smollm2", "reduced", args.limit, by_layer=False)
    places, w = lab.area(args.area)
    prompt = LABELLED["label"] if args.every_token else prompt_of("name", args.area)
    codes = codes_of(lab, places, prompt, [SAE])[SAE]
    rows = exact_rows(codes.acts, w, args.area + (", every token" if args.every_token else ""))
    if args.dry:
        print(*rows, *goals(rows), sep="\n")
    else:
        write_result("moran_exact", rows, goals, started, merge=True)


def exact_rows(x: sparse.csr_array, w: SpatialWeights, area: str) -> list[dict[str, Any]]:
    """One record a column: the largest difference over all features, and how many there are.

    Args:
        x: features [n, F].
        area: names the places.
    """
    table = moran(x, w, permutations=1, min_active=1, p_adjust=None)
    status = table.table["status"].to_pylist()
    ours = {name: table.column(name) for name in COLUMNS}
    begun = time.perf_counter()
    theirs = esda_columns(x, w, COLUMNS)
    seconds = time.perf_counter() - begun
    defined = ~np.isin(status, UNDEFINED)
    both = {name: defined & np.isfinite(theirs[name]) for name in COLUMNS}
    return [
        {
            "name": f"{area} | {name}", "area": area, "column": name, "n_places": w.n,
            "features": shape_of(x)[1], "compared": int(both[name].sum()),
            "undefined": int((~defined).sum()),
            # E[I] depends on n alone, so esda states it for a feature without an I as well
            "disagree": int((defined & ~both[name]).sum())
            + int((~defined & np.isfinite(theirs["I"])).sum()),
            "largest": float(np.abs(theirs[name][both[name]]).max(initial=0)),
            "difference": largest(ours[name], theirs[name], both[name]),
            "relative": largest(ours[name], theirs[name], both[name], relative=True),
            "esda_seconds": round(seconds, 1),
        }
        for name in COLUMNS
    ]  # fmt: skip


def largest(
    ours: np.ndarray, theirs: np.ndarray, where: np.ndarray, *, relative: bool = False
) -> float:
    """Largest difference where both are defined; relative: as a share of max(1, |theirs|)."""
    scale = np.maximum(1, np.abs(theirs[where])) if relative else 1.0
    return float((np.abs(ours[where] - theirs[where]) / scale).max(initial=0))


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Equal to 1e-10 for every feature, and no feature that only one of the two has."""
    found = []
    for row in rows:
        name, value = row["name"], row["relative" if row["column"] == "z_rand" else "difference"]
        said = (
            f"{row['compared']} of {row['features']} latents, {row['undefined']} dead or constant"
        )
        found.append(Goal(f"{name}: |ours - esda|", value, f"<= {EXACT}", value <= EXACT, said))
        wrong = row["disagree"]
        found.append(Goal(f"{name}: defined for one of both", wrong, "= 0", wrong == 0))
    return found


if __name__ == "__main__":
    main()
