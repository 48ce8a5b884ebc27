"""Relational alignment: do codes keep the relations that a semantic space has between items?"""

from sae_apps.alignment.distances import code_distances, great_circle
from sae_apps.alignment.relational import Alignment, relational_alignment

__all__ = ["Alignment", "code_distances", "great_circle", "relational_alignment"]
