"""The control has the same sites, sparsity and scale of weights, and none of what was learned."""

import torch

from hf_transcoders.features import ExampleSizes, collect_examples
from hf_transcoders.features.explain import random_control

from ...evaluation.conftest import VOCABULARY, random_dictionary
from ..test_collect import Words


def test_blocks_are_random_and_features_as_sparse(base):
    dictionary = random_dictionary(base, 1, "relu")
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(2, VOCABULARY, (12,), generator=generator).tolist()} for _ in range(20)]
    options = {"sizes": ExampleSizes(window=4, top=2, sketch=0), "progress": False}
    (examples,) = collect_examples(base, {"a": dictionary}, rows, Words(), **options).values()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model, control = random_control(base, dictionary, examples)
    for name, tensor in model.state_dict().items():
        assert torch.equal(base.state_dict()[name], before[name])
        if "layers" in name and tensor.dim() > 1:
            assert not torch.isclose(tensor, before[name]).all()
            assert 0.7 < tensor.std() / before[name].std() < 1.4
        else:
            assert torch.equal(tensor, before[name])
    assert control.config.k == round(float(examples.density.sum())) and control.config.activation == "topk"
    assert control.config.input_site == dictionary.config.input_site
    (others,) = collect_examples(model, {"a": control}, rows, Words(), **options).values()
    assert abs(float(others.density.sum()) - control.config.k) <= control.config.k * 0.5
    again, _ = random_control(base, dictionary, examples)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
