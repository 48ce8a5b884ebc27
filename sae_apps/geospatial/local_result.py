"""LocalMoran: which places belong to clusters of a feature, as a table, a map or a GeoDataFrame.

Quadrants, labels and colours are those of esda (Moran_Local.q, get_cluster_labels).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_core.errors import UserError
from sae_core.extras import require

if TYPE_CHECKING:
    import geopandas
    from matplotlib.figure import Figure

    from sae_apps.geospatial.places import Places

Values = Float[np.ndarray, "*places_features"]  # [n], or [n, f] for several features

INSIGNIFICANT = "Insignificant"
LABELS = (INSIGNIFICANT, "High-High", "Low-High", "Low-Low", "High-Low")  # by quadrant; 0 is none
COLOURS = {
    "High-High": "#d7191c",
    "High-Low": "#fdae61",
    "Low-High": "#abd9e9",
    "Low-Low": "#2c7bb6",
    INSIGNIFICANT: "#cccccc",
}


@dataclass(frozen=True, eq=False)
class LocalMoments:
    """Moments of I_i under its null, each [n] or [n, f]; 0 where the statistic is undefined."""

    EI_sim: Values
    """Mean over the permutations."""
    seI_sim: Values
    """Standard deviation over the permutations (divisor B, as in esda)."""
    EIc: Values
    """Analytic mean, conditional on the value of the place (Sokal et al. 1998, eq. A7)."""
    VIc: Values
    """Analytic variance, conditional on the value of the place (eq. A8)."""


@dataclass(frozen=True, eq=False)
class LocalMoran:
    """Local Moran's I of one feature (arrays [n]) or of several (arrays [n, f]).

    Nothing is NaN: where the statistic is undefined (``is_defined``), Is is 0, q is 0, p_sim is 1
    and the label is "Insignificant".
    """

    row_id: Int[np.ndarray, " n"]
    """Ids of the places, in the order of the arrays."""
    names: tuple[str, ...]
    """Name of each feature."""
    status: tuple[str, ...]
    """Of each feature: "ok", "constant" (undefined everywhere) or "constant in some groups"."""
    values: Values
    """The feature as it came."""
    z: Values
    """Standardised values (divisor n), about the mean of the place's group if groups were given."""
    lag: Values
    """Weighted sum of the neighbours' z."""
    Is: Values
    """Local Moran's I, z lag (n - 1) / n."""
    is_defined: Bool[np.ndarray, "*places_features"]
    """False for islands and where the feature is constant."""
    p_sim: Values
    """Permutation p-value; floor 1 / (B + 1), or 2 / (B + 1) if two-sided."""
    p_adjusted: Values
    """p_sim adjusted over the places of each feature, or p_sim itself without adjustment."""
    moments: LocalMoments
    """Mean and spread under the null."""
    how: dict[str, Any]
    """Statistic, alternative, permutations, seed, n_tests, correction, alpha, groups, weights."""

    @property
    def n_permutations(self) -> int:
        """Permutations per place."""
        return int(self.how["permutations"])

    @property
    def n_features(self) -> int:
        """Number of features."""
        return len(self.names)

    @property
    def global_i(self) -> Float[np.ndarray, " f"]:
        """Global Moran's I of each feature, n / S0 z'Wz / z'z; 0 where it is constant.

        With groups, z is standardised within each, so this is the I within groups.
        """
        z = self.z.reshape(len(self.row_id), -1)
        top = (z * self.lag.reshape(z.shape)).sum(axis=0) * len(z) / self.how["s0"]
        below = (z * z).sum(axis=0)
        return np.divide(top, below, out=np.zeros_like(top), where=below > 0)

    @property
    def EI_sim(self) -> Values:
        """Mean of I over the permutations."""
        return self.moments.EI_sim

    @property
    def seI_sim(self) -> Values:
        """Standard deviation of I over the permutations."""
        return self.moments.seI_sim

    @property
    def EIc(self) -> Values:
        """Analytic conditional mean of I."""
        return self.moments.EIc

    @property
    def VIc(self) -> Values:
        """Analytic conditional variance of I."""
        return self.moments.VIc

    @property
    def z_sim(self) -> Values:
        """(Is - EI_sim) / seI_sim; 0 where the permutations do not vary."""
        spread = self.seI_sim
        return np.divide(self.Is - self.EI_sim, spread, out=np.zeros_like(spread), where=spread > 0)

    @property
    def q(self) -> Int[np.ndarray, "*places_features"]:
        """Quadrant: 1 HH, 2 LH, 3 LL, 4 HL (own value, then the neighbours'); 0 undefined.

        As in esda, high is above 0 and everything else is low.
        """
        high, near = self.z > 0, self.lag > 0
        quadrant = np.where(high, np.where(near, 1, 4), np.where(near, 2, 3))
        return np.where(self.is_defined, quadrant, 0).astype(np.int8)

    @property
    def label(self) -> np.ndarray:
        """esda's labels: the quadrant where p_adjusted < alpha, else "Insignificant"."""
        significant = self.p_adjusted < self.how["alpha"]
        return np.array(LABELS)[np.where(significant, self.q, 0)]

    def counts(self) -> list[dict[str, int]]:
        """Number of places with each label, one dict per feature."""
        label = self.label.reshape(len(self.row_id), self.n_features)
        return [
            {name: int((label[:, j] == name).sum()) for name in COLOURS}
            for j in range(self.n_features)
        ]

    def feature(self, which: int | str) -> "LocalMoran":
        """One feature, by position or name, with arrays [n].

        Raises:
            UserError: there is no such feature.
        """
        if isinstance(which, str) and which in self.names:
            which = self.names.index(which)
        if not isinstance(which, int | np.integer) or not 0 <= which < self.n_features:
            raise UserError(
                f"Expected a feature of {list(self.names[:5])} or its position below "
                f"{self.n_features}, got {which!r}."
            )
        if self.values.ndim == 1:
            return self
        arrays = {
            name: getattr(self, name)[:, which]
            for name in ("values", "z", "lag", "Is", "is_defined", "p_sim", "p_adjusted")
        }
        moments = LocalMoments(
            **{name: value[:, which] for name, value in vars(self.moments).items()}
        )
        return replace(
            self,
            names=(self.names[which],),
            status=(self.status[which],),
            moments=moments,
            **arrays,
        )

    def to_geodataframe(self, places: "Places", feature: int | str = 0) -> "geopandas.GeoDataFrame":
        """The places, in the order of the arrays, with one feature's columns.

        They are value, z, lag, Is, q, p_sim, p_adjusted, z_sim and label, in place of columns of
        the same names; the index is row_id.

        Raises:
            UserError: the places are not those of the weights, or there is no such feature.
            MissingExtraError: geopandas is not installed.
        """
        one = self.feature(feature)
        frame = places.take(self.positions(places)).to_geodataframe()
        columns = {"value": one.values, "z": one.z, "lag": one.lag, "Is": one.Is, "q": one.q}
        columns |= {"p_sim": one.p_sim, "p_adjusted": one.p_adjusted, "z_sim": one.z_sim}
        for name, value in {**columns, "label": one.label}.items():
            frame[name] = value
        return frame

    def plot(self, places: "Places", feature: int | str = 0, **options: Any) -> "Figure":
        """The LISA map of one feature (``maps.lisa_map``); options as there.

        Raises:
            UserError: the places are not those of the weights, or there is no such feature.
            MissingExtraError: matplotlib is not installed.
        """
        from sae_apps.geospatial.maps import lisa_map

        return lisa_map(self.feature(feature), places, **options)

    def explore(self, places: "Places", feature: int | str = 0, **options: Any) -> Any:
        """An interactive folium map of the labels (GeoDataFrame.explore, which loads tiles).

        Raises:
            UserError: the places are not those of the weights, or there is no such feature.
            MissingExtraError: folium or geopandas is not installed.
        """
        require("folium", "geo")
        frame = self.to_geodataframe(places, feature)
        found = set(frame["label"])
        shown = [name for name in COLOURS if name in found]
        defaults: dict[str, Any] = {
            "column": "label",
            "categories": shown,
            "cmap": [COLOURS[name] for name in shown],
            "tooltip": ["name", "value", "label", "p_adjusted"],
            "tiles": "CartoDB positron",
        }
        return frame.explore(**(defaults | options))

    def positions(self, places: "Places") -> Int[np.ndarray, " n"]:
        """Where this result's places stand in a table that may be longer or in another order.

        Raises:
            UserError: a place is not in the table.
        """
        ids = np.asarray(places.row_id)
        order = np.argsort(ids, kind="stable")
        at = np.searchsorted(ids, self.row_id, sorter=order).clip(max=len(ids) - 1)
        index = order[at]
        missing = self.row_id[ids[index] != self.row_id]
        if missing.size:
            raise UserError(
                f"Expected a place with the row_id {missing[0]} of the weights, got "
                f"{len(ids)} places without it ({missing.size} are missing)."
            )
        return index
