"""Contexts of features against their activations in whole forward passes."""

import torch

from hf_transcoders import capture
from hf_transcoders.data.token_blocks import TokenBlocks
from hf_transcoders.features.firing_contexts import firing_contexts
from tests.studies.feature_patching.test_feature_patching import sae_of
from tests.studies.greater_than.setups import transcoder_of
from tests.tiny_models import tiny_model


ROWS = [
    {"input_ids": row.tolist()} for row in torch.randint(3, 128, (30, 12), generator=torch.Generator().manual_seed(0))
]


@torch.no_grad()
def test_contexts_are_strong_and_one_of_a_block():
    model = tiny_model("llama").eval()
    dictionary = transcoder_of(model, 1)
    blocks = TokenBlocks(ROWS, max_tokens=1000, skip_first=2)
    with capture(model, ["layers.1.mlp.in"]) as captured:
        model(torch.tensor([row["input_ids"] for row in ROWS]))
        activations = dictionary.encode(captured["layers.1.mlp.in"])
    activations[:, :2] = 0
    dictionary.b_enc[3] = -1e6
    activations[..., 3] = 0
    for count in (5, 1000):
        found = firing_contexts(model, dictionary, [0, 3, 7], blocks, count)
        assert found[3] == []
        for feature in (0, 7):
            strongest, places = activations[..., feature].max(1)
            wanted = {
                (tuple(ROWS[row]["input_ids"][: place + 1]), round(strongest[row].item(), 4))
                for row, place in enumerate(places.tolist())
                if strongest[row] >= strongest.max() / 2
            }
            got = [(tuple(context.tokens.tolist()), round(context.activation, 4)) for context in found[feature]]
            assert len(got) == min(count, len(wanted)) and set(got) <= wanted
            assert [value for _, value in got] == sorted((value for _, value in got), reverse=True)
    one, other = (firing_contexts(model, dictionary, [0], blocks, 3, seed=seed)[0] for seed in (0, 1))
    assert [each.activation for each in one] != [each.activation for each in other]


@torch.no_grad()
def test_outliers_are_left_out_as_in_training():
    model = tiny_model("llama").eval()
    with torch.no_grad():
        # Token 5 enters the stream, and the site, with much more than the usual norm.
        model.get_input_embeddings().weight[5] *= 1000
    stream = sae_of(model, "layers.0.resid_post")
    rows = [{"input_ids": [*row["input_ids"][:6], 5, *row["input_ids"][7:]]} for row in ROWS]
    blocks = TokenBlocks(rows, max_tokens=1000, skip_first=1)
    for factor, outliers in ((None, True), (10.0, False)):
        found = firing_contexts(model, stream, [0, 1, 2, 3], blocks, 50, outlier_factor=factor)
        assert any(int(each.tokens[-1]) == 5 for its in found.values() for each in its) == outliers
