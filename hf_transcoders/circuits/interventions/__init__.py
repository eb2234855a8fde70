"""Interventions: features changed in an ordinary language model, with none, some or all of the rest held still."""

from .feature_edits import FeatureEdit
from .effect import InterventionEffect, measure_effect
from .intervene import intervene
from .losses import intervention_losses
