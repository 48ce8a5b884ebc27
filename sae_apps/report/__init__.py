"""One self-contained HTML page per run, built from sections; each module makes one section."""

from sae_apps.report.experts import experts_section
from sae_apps.report.frequencies import frequencies_section
from sae_apps.report.geography import (
    Geography,
    MapFeature,
    MapPlaces,
    Passing,
    geography_section,
)
from sae_apps.report.identifiability import (
    IdentifiabilityView,
    RunPair,
    identifiability_section,
)
from sae_apps.report.latents import latents_section
from sae_apps.report.overview import overview_section
from sae_apps.report.page import Section, build_page, write_report
from sae_apps.report.parts import latent_anchors
from sae_apps.report.selection import (
    SelectedRow,
    SelectionReason,
    SelectionTarget,
    SelectionView,
    selection_section,
)
from sae_apps.report.separability import ConceptSet, SeparabilityView, separability_section
from sae_apps.report.suppression import RemovalCurve, SuppressionView, suppression_section
from sae_apps.report.training import training_section
from sae_apps.report.verdicts import LatentVerdicts

__all__ = [
    "ConceptSet",
    "Geography",
    "IdentifiabilityView",
    "LatentVerdicts",
    "MapFeature",
    "MapPlaces",
    "Passing",
    "RemovalCurve",
    "RunPair",
    "Section",
    "SelectedRow",
    "SelectionReason",
    "SelectionTarget",
    "SelectionView",
    "SeparabilityView",
    "SuppressionView",
    "build_page",
    "experts_section",
    "frequencies_section",
    "geography_section",
    "identifiability_section",
    "latent_anchors",
    "latents_section",
    "overview_section",
    "selection_section",
    "separability_section",
    "suppression_section",
    "training_section",
    "write_report",
]
