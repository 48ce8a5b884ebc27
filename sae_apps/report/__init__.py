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
from sae_apps.report.latents import latents_section
from sae_apps.report.overview import overview_section
from sae_apps.report.page import Section, build_page, write_report
from sae_apps.report.suppression import RemovalCurve, SuppressionView, suppression_section
from sae_apps.report.training import training_section

__all__ = [
    "Geography",
    "MapFeature",
    "MapPlaces",
    "Passing",
    "RemovalCurve",
    "Section",
    "SuppressionView",
    "build_page",
    "experts_section",
    "frequencies_section",
    "geography_section",
    "latents_section",
    "overview_section",
    "suppression_section",
    "training_section",
    "write_report",
]
