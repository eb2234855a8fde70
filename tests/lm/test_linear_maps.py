"""The linear map of a module equals the module, with every wrapper; modules that are not linear are refused."""

import copy
import tempfile

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from hf_transcoders import TranscoderError
from hf_transcoders.lm.linear_maps import (
    adapters_at_work,
    apply_weight,
    is_plain,
    linear_map,
    linear_modules,
    linear_rows,
    map_size,
    mean_row,
    outputs_at,
)
from hf_transcoders.lm.norms import norm_bias, norm_gain, norm_scale
from tests.tiny_models import HIDDEN_SIZE, tiny_model


peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "o_proj", "down_proj"]
PATHS = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]


def _config(name, /, **settings):
    return lambda: getattr(peft, f"{name}Config")(**{"target_modules": TARGETS, **settings})


# Adapters that PEFT can merge, so that their map is known without running them.
MERGEABLE = {
    "LoRA": _config("Lora", r=4, lora_alpha=8, init_lora_weights=False),
    "rank-stabilized, with patterns": _config(
        "Lora", r=4, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 3}, init_lora_weights=False
    ),
    "DoRA": _config("Lora", r=4, use_dora=True, init_lora_weights=False),
    "AdaLoRA": _config("AdaLora", total_step=10, init_lora_weights=False),
    "IA3": _config("IA3", feedforward_modules=["down_proj"], init_ia3_weights=False),
    "LoHa": _config("LoHa", r=4, init_weights=False),
    "LoKr": _config("LoKr", r=4, init_weights=False),
    "OFT": _config("OFT", r=4, oft_block_size=0, init_weights=False),
    "VeRA": _config("Vera", r=4, target_modules=["q_proj", "o_proj"], init_weights=False),
    "FourierFT": _config("FourierFT", n_frequency=50),
    "HRA": _config("HRA", r=4, init_weights=False),
    "C3A": _config("C3A", block_size=8, init_weights="gaussian"),
    "VBLoRA": _config("VBLoRA", r=4, vector_length=8, num_vectors=16),
}


def adapted(config, model=None, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(tiny_model("llama") if model is None else model, config).eval()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped


@torch.no_grad()
def check(module, weight=None, bias=None, rtol=1e-4):
    """Everything that is said about a module against what it computes, and its weight against the right one, if known."""
    found = linear_map(module, "it")
    outputs, inputs = map_size(module)
    assert found.weight.shape == (outputs, inputs)
    rows = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0)).to(found.weight.dtype)
    computed = module(rows[None].to(getattr(module, "weight", rows).dtype if rtol > 1e-4 else rows.dtype))[0]
    size = computed.abs().max()
    near = {"rtol": rtol, "atol": rtol * float(size)}
    torch.testing.assert_close(nn.functional.linear(rows, found.weight, found.bias), computed.to(rows), **near)
    constant = 0 if found.bias is None else found.bias
    torch.testing.assert_close(apply_weight(module, rows, "it"), computed.to(rows) - constant, **near)
    chosen = torch.tensor([7, 0, 7])
    some = linear_rows(module, chosen, "it")
    near = {"rtol": rtol, "atol": rtol * float(found.weight.abs().max())}
    torch.testing.assert_close(some.weight, found.weight[chosen], **near)
    torch.testing.assert_close(mean_row(module, "it").weight[0], found.weight.float().mean(0), **near)
    torch.testing.assert_close(
        outputs_at(module, chosen)(rows), module(rows[None])[0][:, chosen]
    ) if rtol <= 1e-4 else None
    if found.bias is not None:
        torch.testing.assert_close(some.bias, found.bias[chosen], **near)
        torch.testing.assert_close(mean_row(module, "it").bias[0], found.bias.float().mean(), **near)
    if weight is not None:
        torch.testing.assert_close(found.weight, weight.float(), **near)
    if bias is not None:
        torch.testing.assert_close(found.bias, bias.float(), **near)
    return found


def test_plain_modules_are_read_and_not_copied():
    linear, conv = nn.Linear(32, 48), Conv1D(48, 32)
    assert linear_map(linear, "it").weight is linear.weight and linear_map(linear, "it").bias is linear.bias
    assert linear_map(conv, "it").weight.data_ptr() == conv.weight.data_ptr()
    assert is_plain(linear) and is_plain(conv) and map_size(conv) == map_size(linear) == (48, 32)
    for module in (linear, conv, nn.Linear(32, 48, bias=False)):
        check(module)


@pytest.mark.parametrize("name", MERGEABLE)
def test_an_adapter_is_its_merged_weight(name):
    wrapped = adapted(MERGEABLE[name]())
    merged = copy.deepcopy(wrapped).merge_and_unload()
    plain = tiny_model("llama")
    changed = 0
    for path in PATHS:
        weight = merged.get_submodule(path).weight
        check(wrapped.get_base_model().get_submodule(path), weight)
        changed += not torch.equal(weight, plain.get_submodule(path).weight)
    assert changed >= 2


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3"])
def test_adapters_of_a_transposed_layer_with_a_bias(name):
    config = MERGEABLE[name]()
    config.target_modules, config.feedforward_modules, config.fan_in_fan_out = {"c_attn", "c_proj"}, set(), True
    wrapped = adapted(config, tiny_model("gpt2"))
    merged = copy.deepcopy(wrapped).merge_and_unload()
    for path in ("transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        right = merged.get_submodule(path)
        check(wrapped.get_base_model().get_submodule(path), right.weight.T, right.bias)


def test_what_is_switched_is_seen_at_once():
    wrapped = adapted(MERGEABLE["LoRA"]())
    module = wrapped.get_base_model().get_submodule(PATHS[0])
    plain = tiny_model("llama").get_submodule(PATHS[0]).weight
    own = linear_map(module, "it").weight
    state = adapters_at_work(wrapped)
    assert not torch.allclose(own, plain) and not is_plain(module)
    with wrapped.disable_adapter():
        assert torch.equal(check(module).weight, plain) and is_plain(module) and adapters_at_work(wrapped) != state
    assert adapters_at_work(wrapped) == state
    module.scale_layer(0.5)
    torch.testing.assert_close(check(module).weight - plain, (own - plain) / 2)
    assert adapters_at_work(wrapped) != state
    module.unscale_layer()
    wrapped.add_adapter("other", MERGEABLE["DoRA"]())
    torch.testing.assert_close(linear_map(module, "it").weight, own)
    wrapped.set_adapter("other")
    assert not torch.allclose(check(module).weight, own, atol=0.01)
    wrapped.base_model.set_adapter(["default", "other"])
    check(module)
    wrapped.set_adapter("default")
    wrapped.merge_adapter()
    assert linear_map(module, "it").weight is module.base_layer.weight
    torch.testing.assert_close(check(module).weight, own)
    with wrapped.disable_adapter():
        # PEFT takes a merged adapter out again when it is switched off.
        torch.testing.assert_close(check(module).weight, plain)


def test_copies_that_are_trained_in_place_of_a_module():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm", "embed_tokens"])
    wrapped = adapted(config)
    model = wrapped.get_base_model()
    saved = model.lm_head.modules_to_save["default"]
    assert linear_map(model.lm_head, "it").weight is saved.weight and is_plain(model.lm_head)
    assert map_size(model.lm_head) == (128, HIDDEN_SIZE)
    with wrapped.disable_adapter():
        assert linear_map(model.lm_head, "it").weight is model.lm_head.original_module.weight
    at = torch.randn(3, HIDDEN_SIZE)
    norm = model.model.norm
    torch.testing.assert_close(norm_gain(norm, HIDDEN_SIZE).push(at) * norm_scale(norm, at), norm(at))


def test_tokens_that_are_trained_in_a_head_of_its_own_and_a_tied_one():
    for family, indices in (("llama", {"lm_head": [3, 7]}), ("gpt2", {"wte": [3, 7]})):
        target = "q_proj" if family == "llama" else "c_attn"
        config = peft.LoraConfig(r=2, target_modules=[target], trainable_token_indices=indices)
        check(adapted(config, tiny_model(family)).get_base_model().get_output_embeddings())


def test_reading_leaves_everything_as_it_was():
    wrapped = adapted(peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=TARGETS, init_lora_weights=False))
    wrapped.train()
    module = wrapped.get_base_model().get_submodule(PATHS[0])
    calls = []
    handles = [part.register_forward_hook(lambda *_: calls.append(1)) for part in module.modules()]
    random = torch.get_rng_state()
    first, second = linear_map(module, "it"), linear_map(module, "it")
    linear_rows(module, torch.tensor([1]), "it"), mean_row(module, "it")
    apply_weight(module, torch.zeros(1, HIDDEN_SIZE), "it")
    assert torch.equal(first.weight, second.weight) and torch.equal(torch.get_rng_state(), random)
    assert not calls and all(part.training for part in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())
    module(torch.zeros(1, 1, HIDDEN_SIZE))
    assert handles and len(calls) == 5, "the layer, its base, dropout and two factors"


def test_weights_that_are_computed_before_each_forward():
    for wrap in (
        nn.utils.parametrizations.weight_norm,
        nn.utils.weight_norm,
        nn.utils.parametrizations.orthogonal,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ):
        module = wrap(nn.Linear(32, 48))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        # The change is not in `module.weight` yet where a hook computes it.
        weight = linear_map(module, "it").weight
        module(torch.zeros(1, 32))
        torch.testing.assert_close(weight, module.weight)


class _Squashed(nn.Linear):
    def forward(self, rows):
        return torch.tanh(super().forward(rows))


class _TellsDevice(nn.Linear):
    def forward(self, rows, device):
        return super().forward(rows)


@pytest.mark.parametrize(
    "read", [linear_map, mean_row, lambda module, name: apply_weight(module, torch.ones(1, 32), name)]
)
def test_what_is_no_linear_map_is_refused(read):
    with pytest.raises(TranscoderError, match="layers.3.attn is not a linear map.*_Squashed.*merge it"):
        read(_Squashed(32, 48), "layers.3.attn")
    with pytest.raises(TranscoderError, match="layers.3.attn cannot be found.*_TellsDevice does not run on its own"):
        read(_TellsDevice(32, 48), "layers.3.attn")
    with pytest.raises(TranscoderError, match="Sequential does not say how wide it is"):
        read(nn.Sequential(nn.Linear(32, 48)), "layers.3.attn")


def test_adapters_that_route_are_refused():
    module = adapted(peft.PolyConfig(r=4, target_modules=TARGETS, n_tasks=2, n_skills=2)).get_base_model()
    with pytest.raises(TranscoderError, match="does not run on its own .task_ids"):
        linear_map(module.get_submodule(PATHS[0]), "it")


def test_half_precision():
    model = tiny_model("llama").bfloat16()
    wrapped = adapted(MERGEABLE["LoRA"](), model)
    merged = copy.deepcopy(wrapped).float().merge_and_unload()
    for path in PATHS:
        found = linear_map(wrapped.get_base_model().get_submodule(path), "it").weight
        right = merged.get_submodule(path).weight
        # Outputs are rounded to 8 bits.
        torch.testing.assert_close(found, right, rtol=2**-7, atol=2**-8)
    # A large bias does not take the digits of the weights.
    conv = adapted(peft.LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True), tiny_model("gpt2").bfloat16())
    module = conv.get_base_model().transformer.h[0].mlp.c_proj
    before = linear_map(module, "it").weight
    with torch.no_grad():
        module.base_layer.bias.add_(20)
    torch.testing.assert_close(linear_map(module, "it").weight, before, rtol=2**-7, atol=2**-8)


def test_offloaded_modules():
    from accelerate import cpu_offload, disk_offload

    rows = torch.tensor([1, 4])
    for family in ("llama", "gpt2"):
        plain = tiny_model(family)
        for offload in (cpu_offload, lambda model, **kwargs: disk_offload(model, tempfile.mkdtemp(), **kwargs)):
            model = offload(tiny_model(family), execution_device=torch.device("cpu"))
            for name, module in plain.named_modules():
                if isinstance(module, nn.Linear | Conv1D):
                    found, right = linear_map(model.get_submodule(name), name), linear_map(module, name)
                    assert torch.equal(found.weight, right.weight) and not is_plain(model.get_submodule(name))
                    assert torch.equal(linear_rows(model.get_submodule(name), rows, name).weight, right.weight[rows])
                    assert found.bias is None or torch.equal(found.bias, right.bias)
                elif "norm" in name or "ln_" in name:
                    norm = model.get_submodule(name)
                    assert torch.equal(norm_gain(norm, HIDDEN_SIZE).gain, norm_gain(module, HIDDEN_SIZE).gain)
                    assert torch.equal(torch.as_tensor(norm_bias(norm)), torch.as_tensor(norm_bias(module)))
            assert all(parameter.is_meta for parameter in model.parameters())
    together = cpu_offload(
        tiny_model("llama"), execution_device=torch.device("cpu"), preload_module_classes=["LlamaAttention"]
    )
    with pytest.raises(TranscoderError, match="offloaded together with a module around it"):
        linear_map(together.get_submodule(PATHS[0]), "it")


def test_offloaded_adapters():
    from accelerate import cpu_offload

    wrapped = adapted(MERGEABLE["LoRA"]())
    right = linear_map(wrapped.get_base_model().get_submodule(PATHS[1]), "it").weight
    offloaded = cpu_offload(wrapped.get_base_model(), execution_device=torch.device("cpu"))
    torch.testing.assert_close(check(offloaded.get_submodule(PATHS[1])).weight, right)
    assert all(parameter.is_meta for parameter in offloaded.parameters())


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_norms_that_are_tuned(family):
    names = [name for name, part in tiny_model(family).named_modules() if "norm" in name or "ln_" in name]
    wrapped = adapted(peft.LNTuningConfig(target_modules=names), tiny_model(family))
    model, at = wrapped.get_base_model(), torch.randn(4, HIDDEN_SIZE)
    plain = tiny_model(family)

    def as_linear(norm):
        return norm_gain(norm, HIDDEN_SIZE).push(at) * norm_scale(norm, at) + norm_bias(norm)

    for name in names:
        norm, changed = model.get_submodule(name), plain.get_submodule(name)(at)
        torch.testing.assert_close(as_linear(norm), norm(at))
        assert not torch.allclose(norm(at), changed)
        with wrapped.disable_adapter():
            torch.testing.assert_close(as_linear(norm), changed)
    wrapped.merge_adapter()
    for name in names:
        torch.testing.assert_close(as_linear(model.get_submodule(name)), model.get_submodule(name)(at))


def test_a_norm_that_is_known_by_running_it_alone():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.LayerNorm(HIDDEN_SIZE)

        def forward(self, rows):
            return self.inner(rows)

    norm, at = Unknown(), torch.randn(4, HIDDEN_SIZE)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
        torch.testing.assert_close(norm_bias(norm), norm.inner.bias, rtol=1e-4, atol=1e-4)
        expected = norm(at)
        found = norm_gain(norm, HIDDEN_SIZE).push(at) * norm_scale(norm, at) + norm_bias(norm)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_are_listed_with_their_adapters_and_without_their_parts():
    wrapped = adapted(MERGEABLE["LoRA"]())
    mlp = wrapped.get_base_model().model.layers[0].mlp
    assert list(linear_modules(mlp)) == [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    assert type(mlp.down_proj) is not nn.Linear
