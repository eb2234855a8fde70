"""Case studies of the paper on transcoders, on any model."""

from .blind import BlindFeature, BlindStudy, blind_study
