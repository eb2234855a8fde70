import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from hf_transcoders.errors import TranscoderError
from hf_transcoders.lm import (
    Architecture,
    Site,
    architecture_of,
    capture,
    locate,
    num_layers,
    register_architecture,
    site_width,
)
from hf_transcoders.lm import architectures as architectures_module
from hf_transcoders.lm.order import POINTS
from tests.tiny_models import HIDDEN_SIZE, NUM_LAYERS, TINY_CONFIGS, tiny_model, tiny_tokens


PARALLEL = ("gpt_neox", "phi")


@pytest.fixture(params=TINY_CONFIGS)
def family(request):
    return request.param


def test_every_name_in_the_table_is_a_module(family):
    model = tiny_model(family)
    architecture = architecture_of(model)
    base, block = model.base_model, model.base_model.get_submodule(architecture.blocks)[0]
    attention = block.get_submodule(architecture.attention)

    assert base.get_submodule(architecture.embeddings) is model.get_input_embeddings()
    if architecture.position_embeddings:
        assert isinstance(base.get_submodule(architecture.position_embeddings), nn.Embedding)
    for name in (architecture.attention_norm, architecture.mlp_norm, architecture.final_norm):
        assert (
            name
            and "norm"
            in type((base if name == architecture.final_norm else block).get_submodule(name)).__name__.lower()
        )
    norms = {name for name, module in block.named_children() if "norm" in type(module).__name__.lower()}
    assert norms == {
        architecture.attention_norm,
        architecture.attention_post_norm,
        architecture.mlp_norm,
        architecture.mlp_post_norm,
    } - {None}

    assert site_width(model, Site(point="out", module=_path(model, attention, architecture.attention_output))) == 32
    heads, kv_heads = 4, getattr(model.config, "num_key_value_heads", 4)
    if architecture.fused_qkv:
        fused = _path(model, attention, architecture.fused_qkv)
        assert site_width(model, f"module:{fused}:out") == 8 * (heads + 2 * kv_heads)
    else:
        for name, count in ((architecture.query, heads), (architecture.key, kv_heads), (architecture.value, kv_heads)):
            assert site_width(model, f"module:{_path(model, attention, name)}:out") == 8 * count


def _path(model, parent, name):
    child = parent.get_submodule(name)
    return next(path for path, module in model.named_modules() if module is child)


@torch.no_grad()
def test_the_final_norm_reads_the_last_residual_stream(family):
    model = tiny_model(family)
    final_norm = _path(model, model.base_model, architecture_of(model).final_norm)
    last, norm_input = f"layers.{NUM_LAYERS - 1}.resid_post", f"module:{final_norm}:in"
    with capture(model, [last, norm_input]) as activations:
        model(tiny_tokens())
    assert torch.equal(activations[last], activations[norm_input])


def test_causal_lm_and_base_model_are_read_alike(family):
    model = tiny_model(family)
    assert num_layers(model) == num_layers(model.base_model) == NUM_LAYERS
    for point in POINTS:
        if point == "resid_mid" and family in PARALLEL:
            continue
        site = f"layers.1.{point}"
        assert locate(model, site) == locate(model.base_model, site)
        assert site_width(model, site) == site_width(model.base_model, site) == HIDDEN_SIZE


def test_site_widths_agree_with_the_activations(family):
    model = tiny_model(family)
    sites = [f"layers.1.{point}" for point in POINTS if point != "resid_mid" or family not in PARALLEL]
    for name, module in model.named_modules():
        if not list(module.children()) and any(True for _ in module.parameters(recurse=False)):
            sites += [f"module:{name}:in", f"module:{name}:out"]
    with torch.no_grad(), capture(model, sites, stop=False) as activations:
        model(tiny_tokens())
    assert len(activations) == len(sites)
    for site, value in activations.items():
        # Only the ids that go into an embedding have no width.
        if site.module and site.point == "in" and isinstance(model.get_submodule(site.module), nn.Embedding):
            assert site_width(model, site) is None
        else:
            assert site_width(model, site) == value.shape[-1], site


def test_parallel_residual_has_no_middle():
    for family in PARALLEL:
        with pytest.raises(TranscoderError, match="'layers.0.resid_mid' does not exist: attention and MLP"):
            locate(tiny_model(family), "layers.0.resid_mid")
    assert locate(tiny_model("gpt_neox_sequential"), "layers.0.resid_mid").side == "in"


def test_layer_out_of_range_is_refused_with_the_range(family):
    with pytest.raises(TranscoderError, match="'layers.3.mlp.in' does not exist: this model has the layers 0 to 2"):
        locate(tiny_model(family), "layers.3.mlp.in")


def test_module_sites_hold_for_causal_lm_and_base_model():
    model = tiny_model("llama")
    module = model.model.layers[1].mlp.down_proj
    for path in ("model.layers.1.mlp.down_proj", "layers.1.mlp.down_proj"):
        for root in (model, model.model):
            assert locate(root, f"module:{path}:in").module is module
    assert site_width(model, "module:model.layers.1.mlp.down_proj:in") == 48
    assert site_width(model, "module:model.layers.1.mlp:out") is None
    with pytest.raises(TranscoderError, match="has no module 'model.layers.1.mlp.downproj'. Did you mean"):
        locate(model, "module:model.layers.1.mlp.downproj:in")


def test_opt_with_norms_on_the_stream_is_refused():
    config = OPTConfig(
        vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16,
        do_layer_norm_before=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(TranscoderError, match="do_layer_norm_before=False"):
        locate(model, "layers.0.mlp.in")
    assert locate(model, "module:model.decoder.layers.0.fc1:in").module is model.model.decoder.layers[0].fc1


def test_text_model_inside_multimodal_gemma():
    text = TINY_CONFIGS["gemma3_text"]()
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    assert num_layers(model) == NUM_LAYERS
    assert site_width(model, "layers.0.mlp.in") == HIDDEN_SIZE
    assert locate(model, "layers.2.mlp.branch").module is (
        model.model.language_model.layers[2].post_feedforward_layernorm
    )


def test_unknown_family_can_be_registered(monkeypatch):
    known = {name: row for name, row in architectures_module._ARCHITECTURES.items() if name != "bloom"}
    monkeypatch.setattr(architectures_module, "_ARCHITECTURES", known)
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)).eval()
    with pytest.raises(TranscoderError, match=r"register_architecture\('bloom'.*'module:<dotted name>:out'"):
        locate(model, "layers.0.resid_pre")
    assert locate(model, "module:transformer.h.0.mlp:out").module is model.transformer.h[0].mlp

    register_architecture(
        "bloom",
        Architecture(
            blocks="h",
            attention="self_attention",
            attention_norm="input_layernorm",
            mlp="mlp",
            mlp_norm="post_attention_layernorm",
            final_norm="ln_f",
            embeddings="word_embeddings",
        ),
    )
    ids = torch.arange(6)[None]
    with torch.no_grad(), capture(model, ["layers.0.resid_post", "layers.1.resid_pre"]) as activations:
        model(ids)
    assert torch.equal(activations["layers.0.resid_post"], activations["layers.1.resid_pre"])


def test_module_sites_need_no_language_model():
    class Doubler(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.linear = nn.Linear(2, 2, bias=False)
            nn.init.constant_(self.linear.weight, 2.0)

        def forward(self, values):
            return self.linear(values)

    model = Doubler(PretrainedConfig())
    with capture(model, "module:linear:out", stop=False) as activations:
        model(values=torch.ones(1, 3, 2))
    assert torch.equal(activations["module:linear:out"], torch.full((1, 3, 2), 4.0))
