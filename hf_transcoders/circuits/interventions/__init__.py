"""Interventions: edit features of a running language model, with the rest of it free or frozen."""

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
