import pytest
import torch

from hf_transcoders.features import explain_features
from hf_transcoders.features.measured_change import measured_changes

from ..evaluation.conftest import random_dictionary
from .test_feature_examples import tokenizer


__all__ = ["tokenizer"]


@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_the_measured_change_is_that_of_the_ablated_model(base, blocks, tokenizer, layer):
    dictionary = random_dictionary(base, layer, "relu")
    ids = [torch.tensor(row["input_ids"]) for row in blocks]
    contexts = {3: [(ids[0][:7], 40.0), (ids[1], 20.0)], 8: [(ids[2][:3], 10.0)], 9: []}
    found = measured_changes(base, dictionary, contexts, tokenizer, count=50)
    assert list(found) == [3, 8]
    for feature, its in contexts.items():
        weights = changes = kl = 0
        for text, value in its:
            plain = base(text[None]).logits[0, -1].log_softmax(-1)

            def ablate(module, args, output, feature=feature, value=value):
                output[:, -1] -= value * dictionary.W_dec[feature]

            hook = base.model.layers[layer].mlp.register_forward_hook(ablate)
            ablated = base(text[None]).logits[0, -1].log_softmax(-1)
            hook.remove()
            weight = torch.maximum(plain, ablated).exp()
            weights, changes = weights + weight, changes + weight * (plain - ablated)
            kl += (plain.exp() * (plain - ablated)).sum() / len(its)
        if not its:
            continue
        measured = found[feature]
        assert measured.contexts == len(its) and measured.kl == pytest.approx(kl.item(), rel=1e-3)
        for listed, sign in ((measured.raised, 1), (measured.lowered, -1)):
            order = (sign * changes).argsort(descending=True)
            expected = [(f"w{i} ", (changes / weights)[i].item()) for i in order.tolist() if sign * changes[i] > 0]
            assert listed == [(token, pytest.approx(change, rel=1e-3, abs=1e-5)) for token, change in expected]


def test_it_can_be_left_out(base, blocks, tokenizer):
    dictionary = random_dictionary(base, 1, "topk", k=4)
    explain = lambda **options: explain_features(base, dictionary, blocks, tokenizer, progress=False, **options)  # noqa: E731
    measured, plain = explain(num_features=3), explain(num_features=3, num_measured=0, num_quantile_contexts=0)
    assert all(each.measured.contexts == min(3, len(each.contexts)) for each in measured)
    assert "measured at 3 top contexts" in measured[0].to_text()
    assert all(each.measured is None and each.quantile_contexts == {} for each in plain)
    assert "measured" not in plain[0].to_text()
    assert [each.contexts for each in measured] == [each.contexts for each in plain]
    assert any("-75%)" in each.to_text() or "-50%)" in each.to_text() for each in explain(num_contexts=1))
