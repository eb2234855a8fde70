from .feature_examples import FeatureContext as FeatureContext
from .feature_examples import FeatureExplanation as FeatureExplanation
from .feature_examples import explain_dictionaries as explain_dictionaries
from .feature_examples import explain_features as explain_features
