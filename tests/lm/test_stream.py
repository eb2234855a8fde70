"""Reads from and writes to the residual stream."""

import copy

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.lm import Site, architecture_of, capture
from hf_transcoders.lm.norms import norm_bias, norm_gain, norm_scale
from hf_transcoders.lm.stream import (
    direct_logits,
    norm_after,
    norm_before,
    reading_stage,
    stream_before,
    writing_stage,
)

from ..tiny_models import HIDDEN_SIZE, TINY_CONFIGS, tiny_model, tiny_tokens


@pytest.mark.parametrize("family", TINY_CONFIGS)
@torch.no_grad()
def test_gain_and_scale_are_the_norm(family):
    model = tiny_model(family)
    for point in ("attn.in", "mlp.in"):
        site = Site(point, 1)
        norm, before = norm_before(model, site), stream_before(model, site)
        with capture(model, [site, before]) as activations:
            model(input_ids=tiny_tokens())
            inputs, stream = activations[site], activations[before]
        gain = norm_gain(norm, HIDDEN_SIZE)
        torch.testing.assert_close(gain.push(stream) * norm_scale(norm, stream) + norm_bias(norm), inputs)
        readers = torch.randn(5, HIDDEN_SIZE)
        torch.testing.assert_close(gain.push(stream) @ readers.T, stream @ gain.pull(readers).T, rtol=1e-4, atol=1e-4)
        # In half precision the gain is still that of the parameters.
        coarse = norm_gain(copy.deepcopy(norm).bfloat16(), HIDDEN_SIZE)
        torch.testing.assert_close(coarse.gain.float(), gain.gain, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("family", TINY_CONFIGS)
@torch.no_grad()
def test_a_post_norm_lies_between_output_and_stream(family):
    model = tiny_model(family)
    for part in ("attn", "mlp"):
        out, branch = Site(f"{part}.out", 1), Site(f"{part}.branch", 1)
        with capture(model, [out, branch], stop=False) as activations:
            model(input_ids=tiny_tokens())
            written, norm = activations[out], norm_after(model, out)
            if norm is not None:
                written = norm(written)
            torch.testing.assert_close(written, activations[branch])
        assert (norm is not None) == family.startswith("gemma") and norm_after(model, branch) is None


def test_stages():
    points = ["resid_pre", "attn.in", "resid_mid", "mlp.in", "resid_post"]
    assert [reading_stage(tiny_model("llama"), Site(point, 3)) for point in points] == [6, 6, 7, 7, 8]
    assert [writing_stage(tiny_model("llama"), Site(point, 3)) for point in ("attn.out", "mlp.branch")] == [7, 8]
    assert reading_stage(tiny_model("phi"), Site("mlp.in", 3)) == 6
    assert [writing_stage(tiny_model("phi"), Site(point, 3)) for point in ("attn.branch", "mlp.out")] == [8, 8]
    with pytest.raises(TranscoderError, match="does not read the residual stream"):
        reading_stage(tiny_model("llama"), Site("mlp.out", 0))
    with pytest.raises(TranscoderError, match="does not write to the residual stream"):
        writing_stage(tiny_model("llama"), Site("mlp.in", 0))


@pytest.mark.parametrize("family", TINY_CONFIGS)
@torch.no_grad()
def test_direct_logits_are_what_the_final_norm_lets_through(family):
    model = tiny_model(family)
    directions = torch.randn(4, HIDDEN_SIZE)
    norm = model.base_model.get_submodule(architecture_of(model).final_norm)
    head = model.get_output_embeddings()
    normalized = (norm(directions) - norm_bias(norm)) / norm_scale(norm, directions)
    logits = head(normalized) - head(torch.zeros(1, HIDDEN_SIZE))
    torch.testing.assert_close(direct_logits(model, directions), logits, rtol=1e-3, atol=1e-3)
