"""Models quantized to 8 and 4 bits against plain models of the weights that their codes stand for."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from hf_transcoders import TranscoderError, TranscoderTrainer, TranscoderTrainingArguments
from hf_transcoders.lm.heads import key_weight, output_weight, query_weight, value_weight
from hf_transcoders.lm.linear_maps import is_quantized, linear_map, linear_rows
from tests.same_model import BLOCKS, graph_of, numbers, transcoders, untied
from tests.tiny_models import NUM_LAYERS


bnb = pytest.importorskip("bitsandbytes", reason="the quantized models of these tests need bitsandbytes")
peft = pytest.importorskip("peft")

CONFIGS = {
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "4 bits, nested": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
}
# Codes of 8 bits are multiplied in fp16 or better, and vectors of one entry have no rounding of their own. Some processors
# multiply codes of 4 bits in bf16, which rounds outputs to 2^-9 of their size, and the scales of blocks once more.
OF_WEIGHTS = {"8 bits": 1e-4, "4 bits": 2**-7, "4 bits, nested": 2**-7}
# LLM.int8 rounds what a layer reads to 1/254 of its largest entry, for normal entries 0.6% of the output, and bf16 to as
# much. What is added up over the 18 layers of three blocks and goes through steep softmaxes is off by up to a tenth.
OF_RUNS = 0.2
WEIGHTS_ALONE = (
    "reads and writes", "connections", "connections through heads", "top_connections", "ov_norms", "deembedding",
    "deembedding through heads", "logits of features", "promoted tokens", "composition query", "composition key",
    "composition value",
)  # fmt: skip
RUNS = (
    "logits", "splice", "heads z", "heads query", "heads value", "residual", "mlps",
    "paths to the logits", "component_outputs", "logit_attribution",
    "query and key", "pull_back", "mean_contributions", "measure", "evaluate",
)  # fmt: skip


@pytest.fixture(scope="module", params=[("llama", "8 bits"), ("gpt2", "4 bits"), ("llama", "4 bits, nested")])
def case(request, tmp_path_factory):
    """Bits, a quantized model, and a plain one of the same weights."""
    family, bits = request.param
    sizes = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    plain = untied(family, **sizes)
    folder = tmp_path_factory.mktemp("model")
    plain.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[bits], device_map="cpu").eval()
    for name, module in model.named_modules():
        weight = dequantized(module)
        if weight is not None:
            of_plain = plain.get_submodule(name)
            of_plain.weight.data = weight.T.contiguous() if isinstance(of_plain, Conv1D) else weight
    return bits, model, plain


def dequantized(module):
    """What the codes of a layer that has not run yet stand for."""
    if isinstance(module, bnb.nn.Linear8bitLt):
        return module.weight.CB.float() * module.weight.SCB.float()[:, None] / 127
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return None


def off(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def test_weights_are_what_the_codes_stand_for(case):
    bits, model, plain = case
    for layer in range(NUM_LAYERS):
        for read in (output_weight, lambda *args: query_weight(*args)[0], lambda *args: key_weight(*args)[0],
                     lambda *args: value_weight(*args)[0]):  # fmt: skip
            assert off(read(model, layer).float(), read(plain, layer)) < OF_WEIGHTS[bits]
    assert is_quantized(model.base_model) and not is_quantized(plain)


def test_everything_is_that_of_the_plain_model(case):
    bits, model, plain = case
    got, wanted = (numbers(each) for each in (model, plain))
    far = {name: off(got[name], wanted[name]) for name in WEIGHTS_ALONE}
    assert max(far.values()) < OF_WEIGHTS[bits], far
    far = {name: off(got[name], wanted[name]) for name in RUNS}
    assert max(far.values()) < OF_RUNS, far


def test_rows_sum_to_what_the_model_computed(case):
    _, model, _ = case
    graph = graph_of(model)
    assert float(graph.row_residuals()[graph.expanded].max()) < 1e-4
    with torch.no_grad():
        logits = model(torch.tensor([graph.input_ids])).logits[0, -1]
    expected = torch.stack([logits[5] - logits[6], logits[9] - logits.mean()])
    torch.testing.assert_close(graph.total[graph.is_kind("target")], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TranscoderError, match="use method='adjoint'"):
        graph_of(model, method="autograd")


@torch.no_grad()
def test_adapters_on_quantized_layers(case):
    bits, model, plain = case
    target = "c_attn" if model.config.model_type == "gpt2" else "q_proj"
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    ).eval()
    name = next(name for name, _ in plain.named_modules() if name.endswith(target))
    layer, base = wrapped.get_base_model().get_submodule(name), plain.get_submodule(name)
    right = linear_map(base, name).weight + layer.get_delta_weight("default")
    assert off(linear_map(layer, name).weight, right) < OF_WEIGHTS[bits]
    rows = torch.tensor([3, 0])
    assert off(linear_rows(layer, rows, name).weight, right[rows]) < OF_WEIGHTS[bits]


def test_training_on_a_quantized_model(case, tmp_path):
    _, model, _ = case
    arguments = TranscoderTrainingArguments(
        tmp_path,
        max_tokens=64,
        per_device_train_batch_size=32,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = TranscoderTrainer(transcoders(model)["t1"], model, arguments, train_dataset=BLOCKS)
    assert trainer.train().training_loss > 0
