"""The distance of rows from their totals is within the tolerance in every dtype, unless a part of a row is missing."""

import copy
from contextlib import ExitStack

import pytest
import torch

from hf_transcoders.circuits.graphs import attribution_graph
from hf_transcoders.circuits.graphs.tolerance import row_tolerance
from hf_transcoders.lm import locate
from hf_transcoders.lm.hooks import write_at
from tests.circuits.graphs.setups import mixes
from tests.tiny_models import HIDDEN_SIZE, TINY_CONFIGS, tiny_model, tiny_tokens


PROMPT = tiny_tokens(1, 10)[0].tolist()


def excess(model, mix):
    return attribution_graph(model, mix, PROMPT, progress=False).metadata["largest_row_excess"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_rounding_explains_the_difference(family, dtype):
    model = copy.deepcopy(tiny_model(family)).to(dtype)
    # 0.05 to 0.12 in all of them: one formula fits three dtypes.
    assert 0.005 < excess(model, mixes(model)["relu"]) < 0.5


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_what_no_row_contains_is_no_rounding(family):
    model = copy.deepcopy(tiny_model(family))
    mix = mixes(model)["relu"]
    # An addition to the stream without a source, as by a steering vector.
    vector = 0.01 * torch.randn(HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        write_at(stack, locate(model, "layers.1.resid_post"), lambda value: value + vector)
        assert excess(model, mix) > 5


def test_tolerances_grow_with_what_is_rounded():
    mass, layer = torch.tensor([1.0, 10.0, 1.0]), torch.tensor([3, 3, 0])
    fine, coarse = (row_tolerance(mass, layer, 64, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert fine[1] == 10 * fine[0] and fine[2] < fine[0]
    assert 1e-7 < fine[0] < 1e-5 and 1e-2 < coarse[0] < 1e-1
