"""Case studies of the paper on transcoders, on any model."""

from .blind import BlindFeature, BlindStudy, blind_study
from .greater_than import GreaterThanStudy, YearFeature, greater_than_study
from .published import PublishedStudy, published_study
from .replacement import ReplacedLayers, ReplacementStudy, replacement_study
from .report import greater_than_text, replacement_text, save_greater_than, save_replacement
