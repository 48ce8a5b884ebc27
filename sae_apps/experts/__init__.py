"""Knowledge in Monet models: which experts serve a domain, and what deleting them does.

Monet (Park, Ahn, Kim, Kang; arXiv 2412.04139), section 5 and appendix D; see ``sae_core.monet``.
"""

from sae_apps.experts.assign import Assignment, assign_experts
from sae_apps.experts.correlate import correlated_experts
from sae_apps.experts.damage import Damage, measure_damage, text_losses
from sae_apps.experts.matched import matched_random
from sae_apps.experts.use import ExpertUse, UseStats, measure_use

__all__ = [
    "Assignment",
    "Damage",
    "ExpertUse",
    "UseStats",
    "assign_experts",
    "correlated_experts",
    "matched_random",
    "measure_damage",
    "measure_use",
    "text_losses",
]
