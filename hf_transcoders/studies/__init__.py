"""Case studies of published papers on any model with dictionaries."""

from .autointerp.autointerp_report import save_autointerp
from .autointerp.study import AutointerpStudy, ExplainedDictionary, autointerp_study
from .blind.study import BlindFeature, BlindStudy, blind_study
from .greater_than.greater_than_report import save_greater_than
from .greater_than.greater_than_results import GreaterThanStudy, YearFeature
from .greater_than.study import greater_than_study
from .published import PublishedStudy, published_study
from .replacement.replacement_report import save_replacement
from .replacement.study import ReplacedLayers, ReplacementStudy, replacement_study


__all__ = [
    "AutointerpStudy",
    "BlindFeature",
    "BlindStudy",
    "ExplainedDictionary",
    "GreaterThanStudy",
    "PublishedStudy",
    "ReplacedLayers",
    "ReplacementStudy",
    "YearFeature",
    "autointerp_study",
    "blind_study",
    "greater_than_study",
    "published_study",
    "replacement_study",
    "save_autointerp",
    "save_greater_than",
    "save_replacement",
]
