from .feature_examples import FeatureContext as FeatureContext
from .feature_examples import FeatureExplanation as FeatureExplanation
from .feature_examples import explain_features as explain_features
from .measured_change import MeasuredChange as MeasuredChange
from .top_activations import TopActivations as TopActivations
from .top_activations import find_top_activations as find_top_activations
