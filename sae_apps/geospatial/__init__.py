"""Which features of a model follow the map: Moran's I of all of them, with nulls worth beating.

Places become prompts, prompts features (``probe``); features are tested at once (``moran``), under
free permutation, within labels and after covariates (``geo_report``), located (``moran_local``) and
drawn (``maps``). Beside the published procedure (arXiv 2505.03368) stands a careful one.
"""

from sae_apps.geospatial.controls import token_features, untrained
from sae_apps.geospatial.coordinates import CoordinateProbe, probe_coordinates
from sae_apps.geospatial.local import moran_local
from sae_apps.geospatial.local_result import LocalMoran
from sae_apps.geospatial.moran import moran
from sae_apps.geospatial.moran_table import MoranTable
from sae_apps.geospatial.places import Places, load_places
from sae_apps.geospatial.probe import probe, probe_saes, probe_units
from sae_apps.geospatial.prompts import PRESETS, ProbeConfig
from sae_apps.geospatial.report import geo_report
from sae_apps.geospatial.report_null import Nulls
from sae_apps.geospatial.report_result import GeoReport
from sae_apps.geospatial.weights import SpatialWeights, as_weights, spatial_weights

__all__ = [
    "PRESETS",
    "CoordinateProbe",
    "GeoReport",
    "LocalMoran",
    "MoranTable",
    "Nulls",
    "Places",
    "ProbeConfig",
    "SpatialWeights",
    "as_weights",
    "geo_report",
    "load_places",
    "moran",
    "moran_local",
    "probe",
    "probe_coordinates",
    "probe_saes",
    "probe_units",
    "spatial_weights",
    "token_features",
    "untrained",
]
