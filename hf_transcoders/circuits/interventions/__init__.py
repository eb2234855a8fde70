"""Interventions: features changed in an ordinary language model, with none, some or all of the rest held still."""

from .effect import InterventionEffect, measure_effect
from .feature_edits import FeatureEdit
from .intervene import intervene
from .losses import intervention_losses


__all__ = [
    "FeatureEdit",
    "InterventionEffect",
    "intervene",
    "intervention_losses",
    "measure_effect",
]
