"""Dictionaries of given directions."""

import pytest
import torch

from hf_transcoders import TranscoderConfig, TranscoderError, TranscoderModel
from hf_transcoders.models import direction_dictionary, directions_config
from hf_transcoders.models.direction_dictionary import num_signed_directions


WIDTH = 6


def values(rows, seed=0):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def made(writes, reads=None, mean=None, both_signs=True):
    fields = directions_config(WIDTH, len(writes), both_signs=both_signs, centered=mean is not None)
    return direction_dictionary(TranscoderConfig(**fields), writes, reads, mean)


def test_features_are_the_two_signs_of_each_coordinate():
    reads, writes, mean = values(4), values(4, 1), values(1, 2)[0]
    model, inputs = made(writes, reads, mean), values(9, 3)
    coordinates = (inputs - mean) @ reads.T
    torch.testing.assert_close(model.encode(inputs), torch.cat([coordinates.relu(), (-coordinates).relu()], -1))
    torch.testing.assert_close(model(inputs).reconstruction, coordinates @ writes + mean)
    assert num_signed_directions(model) == 4


def test_one_sign_alone():
    rows, inputs = values(4), values(9, 3)
    model = made(rows, both_signs=False)
    torch.testing.assert_close(model.encode(inputs), (inputs @ rows.T).relu())
    assert num_signed_directions(model) is None
    assert num_signed_directions(TranscoderModel(TranscoderConfig(d_in=WIDTH, num_features=8, k=2))) is None


def test_a_configuration_of_another_size_is_refused():
    config = TranscoderConfig(**directions_config(WIDTH, 5, both_signs=False, centered=False))
    with pytest.raises(TranscoderError, match="5 features for 4 directions"):
        direction_dictionary(config, values(4))
