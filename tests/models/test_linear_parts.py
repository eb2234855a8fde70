"""Encoder rows, decoder rows, skip and bias together are the dictionary."""

import itertools

import pytest
import torch

from hf_transcoders.models.linear_parts import decoder_rows, encoder_rows, skip_and_bias

from .reference_dictionary import ACTIVATIONS, D_IN, D_OUT, N, make_batch, make_model


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalization", ["none", "scale", "standardize"])
def test_the_parts_are_the_function(activation, normalization):
    for skip, pre_bias, bias, tied in itertools.product([False, True], repeat=4):
        kwargs = {"d_out": D_IN if tied else D_OUT, "skip_connection": skip, "pre_bias": pre_bias, "tied": tied}
        model = make_model(activation, normalization=normalization, decoder_bias=bias, **kwargs).eval()
        inputs, _ = make_batch(model)
        output = model(inputs)
        rows, biases = encoder_rows(model)
        active = output.features > 0
        assert active.any()
        torch.testing.assert_close((inputs @ rows.T + biases)[active], output.features[active], rtol=1e-4, atol=1e-4)
        matrix, constant = skip_and_bias(model)
        assert (matrix is None) == (not skip)
        total = output.features @ decoder_rows(model) + constant
        total = total if matrix is None else total + inputs @ matrix.T
        torch.testing.assert_close(total, output.reconstruction, rtol=1e-4, atol=1e-4)
        some = torch.tensor([3, 0, N - 1])
        for one, every in zip(encoder_rows(model, some), (rows, biases), strict=True):
            torch.testing.assert_close(one, every[some])
        torch.testing.assert_close(decoder_rows(model, some), decoder_rows(model)[some])
