"""How separable concepts are in the units of a model, and suppressing one with the least damage.

Separability is the Jensen-Shannon distance between activations under different concepts, without
its bias; suppression scales units by the posterior of a concept given their activation (APP),
beside the methods it is compared with, all through one door.
"""

from sae_apps.suppression.app import App, load_app, save_app
from sae_apps.suppression.concepts import LabelledTexts
from sae_apps.suppression.fit import FitConfig, fit_app, fit_report
from sae_apps.suppression.gated import GatedPlane, fit_gated
from sae_apps.suppression.generations import Continuation, continue_prompts, cover
from sae_apps.suppression.histogram import EdgeSketch, Histogram, HurdleCounts
from sae_apps.suppression.measure import MeasureConfig, measure
from sae_apps.suppression.separability import pairwise, separability
from sae_apps.suppression.separability_table import SeparabilityTable
from sae_apps.suppression.suppress import suppress
from sae_apps.suppression.units import Units, open_units

__all__ = [
    "App",
    "Continuation",
    "EdgeSketch",
    "FitConfig",
    "GatedPlane",
    "Histogram",
    "HurdleCounts",
    "LabelledTexts",
    "MeasureConfig",
    "SeparabilityTable",
    "Units",
    "continue_prompts",
    "cover",
    "fit_app",
    "fit_gated",
    "fit_report",
    "load_app",
    "measure",
    "open_units",
    "pairwise",
    "save_app",
    "separability",
    "suppress",
]
