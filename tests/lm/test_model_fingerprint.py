"""The record of a base model changes with everything that changes its activations, and with nothing else."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from hf_transcoders import TranscoderError
from hf_transcoders.fingerprint import differences
from hf_transcoders.lm.model_fingerprint import model_facts
from tests.tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


@pytest.fixture
def llama():
    return tiny_model("llama")


def changed(one, other):
    return differences(model_facts(one), model_facts(other))


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_the_same_model_is_the_same(family, tmp_path):
    model = tiny_model(family)
    facts = model_facts(model)
    model.train()
    model(tiny_tokens()).logits.sum().backward()
    model.eval().requires_grad_(False)
    model(tiny_tokens(3, 40))
    model.config.pad_token_id, model.config.use_cache = 5, False
    assert differences(facts, model_facts(model)) == []
    assert changed(model, copy.deepcopy(model)) == []
    model.save_pretrained(tmp_path)
    assert differences(facts, model_facts(AutoModelForCausalLM.from_pretrained(tmp_path))) == []


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_the_last_bit_of_a_weight_counts(family):
    model = tiny_model(family)
    facts = model_facts(model)
    for name, parameter in list(model.named_parameters())[::3]:
        flat = parameter.data.view(-1)
        place = flat.numel() // 3
        before = flat[place].clone()
        flat[place] = torch.nextafter(before, before + 1)
        assert differences(facts, model_facts(model)) == ["other weights"], name
        flat[place] = before
    assert differences(facts, model_facts(model)) == []


class TestChanges:
    def change(self, model, function):
        other = copy.deepcopy(model)
        function(other)
        return changed(model, other)

    def test_of_modules(self, llama):
        def epsilon(model):
            model.model.layers[1].input_layernorm.variance_epsilon = 1.0

        def activation(model):
            model.model.layers[0].mlp.act_fn = torch.nn.ReLU()

        def scaling(model):
            model.model.layers[2].self_attn.scaling *= 2

        assert [self.change(llama, f) for f in (epsilon, activation, scaling)] == [["other modules"]] * 3

    def test_of_buffers_that_are_not_saved(self, llama):
        assert self.change(llama, lambda model: model.model.rotary_emb.inv_freq.mul_(0.5)) == ["other weights"]

    def test_of_computed_buffers_only_beyond_rounding(self, llama):
        """Another processor may compute them with other last bits."""
        other = copy.deepcopy(llama)
        buffer = other.model.rotary_emb.inv_freq
        buffer.copy_(torch.nextafter(buffer, buffer + 1))
        assert changed(llama, other) == []

    def test_of_the_precision(self, llama):
        assert self.change(llama, lambda model: model.to(torch.bfloat16)) == ["other weights"]

    def test_of_the_attention(self, llama):
        found = self.change(llama, lambda model: model.set_attn_implementation("eager"))
        assert found == ["config.attn_implementation sdpa and this run has eager"]

    def test_of_the_configuration(self, llama):
        config = copy.deepcopy(llama.config)
        config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
        config.rms_norm_eps = 1e-3
        other = LlamaForCausalLM(config).eval()
        other.load_state_dict(llama.state_dict())
        found = changed(llama, other)
        assert "config.rms_norm_eps 1e-06 and this run has 0.001" in found
        assert "config.rope_parameters.rope_type default and this run has linear" in found


def test_frequencies_that_follow_the_text_are_no_change(llama):
    config = copy.deepcopy(llama.config)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = LlamaForCausalLM(config).eval()
    facts = model_facts(model)
    model(tiny_tokens(1, 100))
    assert differences(facts, model_facts(model)) == []


def test_offloaded_models_are_read(llama, tmp_path):
    facts = model_facts(llama)
    for offload in (
        lambda model: cpu_offload(model, execution_device="cpu"),
        lambda model: disk_offload(model, tmp_path, execution_device="cpu"),
    ):
        other = copy.deepcopy(llama)
        offload(other)
        assert other.lm_head.weight.is_meta
        assert differences(facts, model_facts(other)) == []


def test_weights_that_are_nowhere_are_refused(llama):
    with pytest.raises(TranscoderError, match="not loaded"):
        model_facts(llama.to("meta"))


class TestAdapters:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    def lora(self, peft, model, **changes):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False, **changes)
        return peft.get_peft_model(copy.deepcopy(model), config).eval()

    def test_count_where_they_take_part(self, peft, llama):
        model = self.lora(peft, llama)
        assert changed(llama, model)[0] == "adapters [] and this run has ['default']"
        assert changed(model, model.get_base_model()) == []
        facts = model_facts(model)
        model(tiny_tokens())
        model.add_adapter("idle", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        assert differences(facts, model_facts(model)) == []
        model.set_adapter("idle")
        assert differences(facts, model_facts(model))
        model.set_adapter("default")
        assert differences(facts, model_facts(model)) == []
        with model.disable_adapter():
            assert changed(llama, model) == []

    def test_their_scale_and_weights_count(self, peft, llama):
        model = self.lora(peft, llama)
        facts = model_facts(model)
        layer = model.get_base_model().model.layers[1].self_attn.o_proj
        layer.scaling["default"] *= 2
        assert differences(facts, model_facts(model)) == ["other modules"]
        layer.scaling["default"] /= 2
        layer.lora_A["default"].weight.data[0, 0] += 1
        assert differences(facts, model_facts(model)) == ["other weights"]

    def test_merged_is_another_model(self, peft, llama):
        model = self.lora(peft, llama)
        facts = model_facts(model)
        model.merge_adapter()
        assert differences(facts, model_facts(model))

    @pytest.mark.parametrize("kind", ["IA3", "LoHa", "DoRA", "head"])
    def test_of_other_kinds(self, peft, llama, kind, tmp_path):
        config = {
            "IA3": lambda: peft.IA3Config(
                target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
            ),
            "LoHa": lambda: peft.LoHaConfig(target_modules=["q_proj"], init_weights=False),
            "DoRA": lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
            "head": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        }[kind]()
        model = peft.get_peft_model(copy.deepcopy(llama), config).eval()
        facts = model_facts(model)
        model(tiny_tokens())
        assert differences(facts, model_facts(model)) == []
        model.save_pretrained(tmp_path)
        assert differences(facts, model_facts(peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path))) == []
        with torch.no_grad():
            [p for name, p in model.named_parameters() if "default" in name][-1].mul_(1.5)
        assert differences(facts, model_facts(model)) == ["other weights"]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models(bits, llama, tmp_path):
    pytest.importorskip("bitsandbytes")
    llama.save_pretrained(tmp_path)
    one, other = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        )
        for _ in range(2)
    )
    facts = model_facts(one)
    assert "no config.quantization_config" in changed(llama, one)[0]
    one(tiny_tokens())
    assert differences(facts, model_facts(one)) == differences(facts, model_facts(other)) == []
    weight = other.model.layers[0].mlp.up_proj.weight
    scale = weight.quant_state.absmax if bits == 4 else weight.SCB
    scale[0] *= 2
    assert differences(facts, model_facts(other)) == ["other weights"]
