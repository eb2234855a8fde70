"""Case studies of Dunefsky et al. (2024) on any model with transcoders."""

from .blind.study import BlindFeature, BlindStudy, blind_study
from .greater_than.greater_than_report import save_greater_than
from .greater_than.greater_than_results import GreaterThanStudy, YearFeature
from .greater_than.study import greater_than_study
from .published import PublishedStudy, published_study
from .replacement.replacement_report import save_replacement
from .replacement.study import ReplacedLayers, ReplacementStudy, replacement_study


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
    "published_study",
    "replacement_study",
    "save_greater_than",
    "save_replacement",
]
