"""What spatial weights are like: counts of links, islands and parts, lengths in km."""

from dataclasses import asdict, dataclass

import numpy as np
from scipy import sparse

from sae_apps.geospatial.sphere import great_circle_km, locations
from sae_core.features import shape_of


@dataclass(frozen=True)
class WeightsFacts:
    """What a reader must know of the weights to judge a statistic; counts are of places."""

    n: int
    """Places."""
    n_links: int
    """Directed links, that is weights above 0."""
    n_islands: int
    """Places without a neighbour of their own."""
    n_components: int
    """Parts that no link joins, whatever its direction."""
    reciprocal_frac: float
    """Share of links i -> j with a link j -> i; 1 for a symmetric pattern."""
    median_km: float | None = None
    """Median great-circle length of the links; None where coordinates are not known."""
    max_km: float | None = None
    """Great-circle length of the longest link; None as above."""
    n_coincident: int | None = None
    """Places whose coordinates another place has too; None as above."""
    max_coincident: int | None = None
    """The most places at one location, 1 without coincident ones; None as above. With more than
    k + 1, their k nearest neighbours are all at their own location."""

    def asdict(self) -> dict[str, int | float | None]:
        """The facts as a dict of plain numbers."""
        return asdict(self)


def weights_facts(
    matrix: sparse.csr_array, lon: np.ndarray | None = None, lat: np.ndarray | None = None
) -> WeightsFacts:
    """Count what weights are like.

    Args:
        matrix: canonical CSR without stored zeros.
        lon: degrees, where they are known.
        lat: degrees, where they are known.
    """
    n = shape_of(matrix)[0]
    pattern = sparse.csr_array((np.ones(matrix.nnz), matrix.indices, matrix.indptr), matrix.shape)
    n_components, _ = sparse.csgraph.connected_components(pattern, directed=False)
    mutual = int(pattern.multiply(pattern.T).sum())
    counts = {
        "n": n,
        "n_links": matrix.nnz,
        "n_islands": int((np.diff(matrix.indptr) == 0).sum()),
        "n_components": int(n_components),
        "reciprocal_frac": mutual / max(matrix.nnz, 1),
    }
    if lon is None or lat is None:
        return WeightsFacts(**counts)
    coo = matrix.tocoo()
    km = great_circle_km(lon[coo.row], lat[coo.row], lon[coo.col], lat[coo.col])
    _, of_place = locations(lon, lat)
    shared = np.bincount(of_place)
    return WeightsFacts(
        **counts,
        median_km=float(np.median(km)) if km.size else None,
        max_km=float(km.max()) if km.size else None,
        n_coincident=int(shared[shared > 1].sum()),
        max_coincident=int(shared.max()),
    )
