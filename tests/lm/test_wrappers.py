"""Blocks on models as training loops hold them: PEFT, `torch.compile`, data parallelism, Accelerate."""

import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import compile_regions
from torch import nn

from hf_transcoders import TranscoderConfig, TranscoderError, TranscoderModel, ablate, capture, edit_attention, splice
from hf_transcoders.circuits import FeatureEdit, intervene
from hf_transcoders.lm.wrappers import language_model
from tests.tiny_models import tiny_model, tiny_tokens


peft = pytest.importorskip("peft")

SITE = "layers.1.mlp.branch"
IDS = tiny_tokens()


@pytest.fixture(scope="module")
def process_group():
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def with_adapter(model, **changes):
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["up_proj"], "init_lora_weights": False, **changes}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def compiled(model, backend="eager"):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend)


def compiled_in_place(model):
    torch._dynamo.reset()
    model.compile(backend="eager")
    return model


def compiled_inside(model):
    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def compiled_by_region(model):
    torch._dynamo.reset()
    return compile_regions(model, backend="eager")


def prepared(model):
    return Accelerator(mixed_precision="no", cpu=True).prepare(model)


WRAPPERS = {
    "plain": lambda model: model,
    "peft": with_adapter,
    "peft mixed": lambda model: peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False), mixed=True
    ),
    "tuner": lambda model: with_adapter(model).base_model,
    "adapters in the layers": lambda model: with_adapter(model).get_base_model(),
    "compile": compiled,
    "compile in place": compiled_in_place,
    "compile inside": compiled_inside,
    "compile by region": compiled_by_region,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "accelerate": prepared,
    "compiled peft": lambda model: compiled(with_adapter(model)),
    "peft of compiled": lambda model: with_adapter(compiled(model)),
    "DDP of compiled peft": lambda model: nn.parallel.DistributedDataParallel(compiled(with_adapter(model))),
    "compiled DDP": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
}


def dictionary_of(model):
    config = TranscoderConfig.for_model(model, "layers.1.mlp.in", SITE, num_features=24, activation="relu")
    torch.manual_seed(1)
    dictionary = TranscoderModel(config).eval()
    for parameter in dictionary.parameters():
        nn.init.normal_(parameter, std=0.2)
    return dictionary


# Compiling takes seconds: of each kind one is always tried.
_SLOW = (
    "compiled peft",
    "compile by region",
    "compile inside",
    "peft of compiled",
    "DDP of compiled peft",
    "compiled DDP",
)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in _SLOW else ()) for name in WRAPPERS]
)
def wrapped(request, process_group):
    """A wrapped model that has run before, so that what compiles it has done so."""
    torch.manual_seed(0)
    model = WRAPPERS[request.param](tiny_model("llama").eval()).eval()
    with torch.no_grad():
        model(input_ids=IDS)
    return model


@torch.no_grad()
def test_blocks_act_on_calls_of_the_wrapped_model(wrapped):
    inner, dictionary = language_model(wrapped), dictionary_of(wrapped)
    edits = [FeatureEdit(SITE, 3, position="all", kind="steer", value=5.0)]
    before = wrapped(input_ids=IDS).logits
    for block in (
        lambda model: splice(model, dictionary, error="drop"),
        lambda model: ablate(model, "layers.0.mlp.out"),
        lambda model: edit_attention(model, z=lambda z, layer: 2 * z),
        lambda model: intervene(model, dictionary, edits),
    ):
        with block(inner):
            expected = inner(input_ids=IDS).logits
        with block(wrapped):
            found = wrapped(input_ids=IDS).logits
        assert torch.equal(found, expected) and not torch.allclose(found, before, atol=1e-3)
        # The block is given the inner model, and the wrapped one is called: as where only the inner one is known.
        with block(inner):
            assert torch.equal(wrapped(input_ids=IDS).logits, expected)
        assert torch.equal(wrapped(input_ids=IDS).logits, before)


@torch.no_grad()
def test_captures_of_the_wrapped_model(wrapped):
    with capture(language_model(wrapped), SITE) as expected:
        assert language_model(wrapped)(input_ids=IDS) is None
    with capture(wrapped, SITE) as found:
        assert wrapped(input_ids=IDS) is None
    assert torch.equal(found[SITE], expected[SITE])
    with capture(wrapped, SITE, stop=False) as found:
        assert wrapped(input_ids=IDS).logits is not None
    assert torch.equal(found[SITE], expected[SITE])


@pytest.mark.slow
def test_compiled_to_machine_code():
    """With inductor: hooks that come later are not skipped, and the compiled code comes back afterwards."""
    model = tiny_model("gpt2")
    fast = compiled(model, "inductor")
    with torch.no_grad():
        try:
            before = fast(input_ids=IDS).logits
        except Exception as error:
            pytest.skip(f"there is no compiler here: {type(error).__name__}")
        with ablate(model, "layers.1.mlp.out"):
            expected = model(input_ids=IDS).logits
        with ablate(fast, "layers.1.mlp.out"):
            assert torch.equal(fast(input_ids=IDS).logits, expected)
        assert torch.equal(fast(input_ids=IDS).logits, before)


@torch.no_grad()
def test_a_model_that_is_first_compiled_inside_a_block():
    model = tiny_model("llama")
    plain = model(input_ids=IDS).logits
    with ablate(model, SITE):
        fast = compiled(model)
        inside = fast(input_ids=IDS).logits
    assert not torch.allclose(inside, plain)
    torch.testing.assert_close(fast(input_ids=IDS).logits, plain)
    with ablate(model, SITE):
        assert torch.equal(fast(input_ids=IDS).logits, inside)


@torch.no_grad()
def test_generate_through_a_wrapper():
    model = with_adapter(tiny_model("llama").eval()).eval()
    dictionary = dictionary_of(model)
    edits = [FeatureEdit(SITE, 3, position="all", kind="steer", value=50.0)]
    with intervene(language_model(model), dictionary, edits):
        expected = language_model(model).generate(IDS, max_new_tokens=5, do_sample=False)
    for outer in (model, compiled(model)):
        with intervene(outer, dictionary, edits):
            assert torch.equal(outer.generate(input_ids=IDS, max_new_tokens=5, do_sample=False), expected)
    assert not torch.equal(model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False), expected)


@torch.no_grad()
def test_copies_on_several_devices_are_not_made_inside_a_block(monkeypatch):
    model = tiny_model("llama")
    parallel = nn.DataParallel(model)
    parallel.device_ids = [0, 1]
    monkeypatch.setattr(
        parallel, "scatter", lambda args, kwargs, devices: ([args], [kwargs]) if devices == [0] else 1 / 0
    )
    with ablate(model, SITE):
        expected = model(input_ids=IDS).logits
    with ablate(parallel, SITE):
        assert torch.equal(parallel(input_ids=IDS).logits, expected)
    assert "forward" not in parallel.__dict__


def test_gradients_through_ddp(process_group):
    """A block that lets forwards run to the end keeps what DDP does around them."""
    model = nn.parallel.DistributedDataParallel(tiny_model("llama"))
    for _ in range(2):
        with capture(model, SITE, stop=False) as activations:
            loss = model(input_ids=IDS).logits.sum() + activations[SITE].square().sum()
            loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Linear(2, 2), "Linear is not a Transformers model"),
        (lambda: None, "NoneType is not a Transformers model"),
        (lambda: "gpt2", "str is not a Transformers model"),
        (
            lambda: peft.get_peft_model(
                tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            ),
            "A learned prompt changes no layer",
        ),
        (
            lambda: nn.DataParallel(
                peft.get_peft_model(
                    tiny_model("llama"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
                )
            ),
            "A learned prompt changes no layer",
        ),
    ],
)
def test_what_holds_no_language_model_is_refused(make, message):
    model = make()
    with pytest.raises(TranscoderError, match=message), capture(model, SITE):
        pass
    with pytest.raises(TranscoderError, match=message):
        language_model(model)
