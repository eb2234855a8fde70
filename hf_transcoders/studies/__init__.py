"""Case studies of published papers on any model with dictionaries."""

from .autointerp.autointerp_report import save_autointerp
from .autointerp.autointerp_results import AutointerpStudy, ExplainedDictionary
from .autointerp.study import autointerp_study
from .blind.study import BlindFeature, BlindStudy, blind_study
from .feature_effects.effects_report import save_feature_effects
from .feature_effects.effects_results import FeatureEffect, FeatureEffects
from .feature_effects.study import feature_effects_study
from .feature_patching.patching_report import save_feature_patching
from .feature_patching.patching_results import FeaturePatchingStudy, PatchedDictionary, PatchingCurve, PatchingPoint
from .feature_patching.study import feature_patching_study
from .feature_tree.study import feature_tree_study
from .feature_tree.tree_report import save_feature_tree
from .feature_tree.tree_results import FeatureTree, TreeNode
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
    "FeatureEffect",
    "FeatureEffects",
    "FeaturePatchingStudy",
    "FeatureTree",
    "ExplainedDictionary",
    "GreaterThanStudy",
    "PatchedDictionary",
    "PatchingCurve",
    "PatchingPoint",
    "PublishedStudy",
    "ReplacedLayers",
    "ReplacementStudy",
    "TreeNode",
    "YearFeature",
    "autointerp_study",
    "blind_study",
    "feature_effects_study",
    "feature_patching_study",
    "feature_tree_study",
    "greater_than_study",
    "published_study",
    "replacement_study",
    "save_feature_effects",
    "save_feature_patching",
    "save_feature_tree",
    "save_autointerp",
    "save_greater_than",
    "save_replacement",
]
