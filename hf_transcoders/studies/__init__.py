"""Case studies of the paper on transcoders, on any model."""

from .blind.study import BlindFeature, BlindStudy, blind_study
from .greater_than.study import GreaterThanStudy, YearFeature, greater_than_study
from .published import PublishedStudy, published_study
from .replacement.study import ReplacedLayers, ReplacementStudy, replacement_study
from .report import greater_than_text, replacement_text, save_greater_than, save_replacement


__all__ = [
    "BlindFeature",
    "BlindStudy",
    "GreaterThanStudy",
    "PublishedStudy",
    "ReplacedLayers",
    "ReplacementStudy",
    "YearFeature",
    "blind_study",
    "greater_than_study",
    "greater_than_text",
    "published_study",
    "replacement_study",
    "replacement_text",
    "save_greater_than",
    "save_replacement",
]
