"""How values are spread, as lines: the share of the values in each of equal bins."""

from collections.abc import Mapping, Sequence

import numpy as np

from sae_apps.report.charts import Series

N_BINS = 30


def histogram(values: Mapping[str, Sequence[float]], n_bins: int = N_BINS) -> list[Series]:
    """One line a name over common bins: x their middles, y the share of that name's values there.

    Shares, so that a thousand picks can be seen beside a million rows. The bins reach from the
    smallest to the largest value of all; values that are not finite are left out, and so is a name
    without any other. Values that are all the same get one point.
    """
    finite = {name: np.asarray(one, dtype=np.float64) for name, one in values.items()}
    finite = {name: one[np.isfinite(one)] for name, one in finite.items()}
    kept = {name: one for name, one in finite.items() if len(one)}
    if not kept:
        return []
    lo = min(float(one.min()) for one in kept.values())
    hi = max(float(one.max()) for one in kept.values())
    if not lo < hi:
        return [Series(name, [lo], [1.0]) for name in kept]
    edges = np.linspace(lo, hi, n_bins + 1)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    return [
        Series(name, middles, (np.histogram(one, edges)[0] / len(one)).tolist())
        for name, one in kept.items()
    ]
