"""Which features fired, as the search for dead ones counts them. Metrics are tested with the statistics that they come from."""

import pytest
import torch

from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.models.modeling_transcoder import TranscoderOutput
from hf_transcoders.training.monitor import DictionaryMonitor


@pytest.mark.parametrize("tokens", [1, 255, 256, 512])
@pytest.mark.parametrize("counted", [False, True])
def test_a_feature_that_fires_on_every_token_has_fired(tokens, counted):
    monitor = DictionaryMonitor(TranscoderModel(TranscoderConfig(d_in=3, num_features=5, k=2)), 10**6)
    output = TranscoderOutput(
        reconstruction=torch.zeros(tokens, 3),
        feature_values=torch.tensor([[1.0, 0.0]]).expand(tokens, 2),
        feature_indices=torch.tensor([[4, 1]]).expand(tokens, 2),
        feature_counts=torch.tensor([0.0, 0.0, 0.0, 0.0, tokens]) if counted else None,
        losses={},
    )
    monitor.update(torch.ones(tokens, 3), output)
    assert monitor.fired.tolist() == [False, False, False, False, True]
