"""Attention views against the patterns of a forward pass."""

import torch

from hf_transcoders import edit_attention
from hf_transcoders.circuits.patching import attention_views
from hf_transcoders.tasks import colored_objects
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks


def test_attention_views_show_the_pattern():
    model, colors = model_for_tasks(), colored_objects(TOKENIZER, 5)
    view = attention_views(model, TOKENIZER, colors, {(2, 1): "mover"}, row=1)[0]
    patterns = {}
    with torch.no_grad(), edit_attention(model, pattern=lambda p, layer: patterns.__setitem__(layer, p[0].clone())):
        model(torch.tensor([colors[1]["clean_ids"]]))
    assert view.pattern == patterns[2][1].tolist()
    assert "".join(view.tokens) == colors[1]["clean"]
