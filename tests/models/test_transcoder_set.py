import json
import re
import shutil

import pytest
import torch
from transformers import AutoModel

from hf_transcoders.errors import TranscoderError
from hf_transcoders.models import TranscoderConfig, TranscoderModel, TranscoderSet

from .reference_dictionary import D_IN, PENALTIES, N, make_model


def site_model(layer, activation="topk", seed=0, base="someone/base", **kwargs):
    return make_model(
        activation,
        seed=seed,
        d_out=D_IN,
        input_site=f"layers.{layer}.mlp.in",
        output_site=f"layers.{layer}.mlp.branch",
        base_model_name_or_path=base,
        **kwargs,
    )


def make_set():
    return TranscoderSet([site_model(1), site_model(3, "jumprelu", seed=1), site_model(7, "gated", seed=2)])


NAMES = ["layers.1.mlp.transcoder", "layers.3.mlp.transcoder", "layers.7.mlp.transcoder"]


def activations(layers=(1, 3, 7), seed=5):
    generator = torch.Generator().manual_seed(seed)
    sites = [f"layers.{layer}.mlp.{point}" for layer in layers for point in ("in", "branch")]
    return {site: torch.randn(2, 8, D_IN, generator=generator) for site in sites}


def test_it_reads_like_a_dictionary():
    models = [site_model(1), site_model(3)]
    transcoders = TranscoderSet(models)
    assert list(transcoders) == transcoders.keys() == NAMES[:2] and len(transcoders) == 2
    assert transcoders[NAMES[1]] is models[1] and transcoders.values() == models
    assert [name for name, _ in transcoders.items()] == NAMES[:2]
    assert NAMES[0] in transcoders and NAMES[2] not in transcoders
    with pytest.raises(KeyError, match="layers.7.*this set has layers.1.mlp.transcoder"):
        transcoders[NAMES[2]]
    assert {id(p) for p in transcoders.parameters()} == {id(p) for m in models for p in m.parameters()}


def test_names_follow_from_the_sites():
    def name_of(**kwargs):
        return TranscoderSet([TranscoderModel(TranscoderConfig(d_in=4, num_features=8, k=2, **kwargs))]).keys()[0]

    assert name_of(input_site="layers.2.mlp.in", output_site="layers.2.mlp.out") == "layers.2.mlp.transcoder"
    assert (
        name_of(input_site="layers.2.mlp.in", output_site="layers.2.mlp.branch", skip_connection=True)
        == "layers.2.mlp.skip_transcoder"
    )
    assert name_of(input_site="layers.2.resid_mid", output_site="layers.2.resid_mid") == "layers.2.resid_mid.sae"
    assert name_of() == "transcoder" and name_of(tied=True) == "sae"
    assert list(TranscoderSet([site_model(1), site_model(1), site_model(1)])) == [
        "layers.1.mlp.transcoder",
        "layers.1.mlp.transcoder.2",
        "layers.1.mlp.transcoder.3",
    ]


def test_dictionaries_trained_together_get_the_gradients_they_get_alone():
    def build():
        return [
            site_model(1, "topk"),
            site_model(1, "relu", seed=1, **PENALTIES["relu"]),
            site_model(3, "batchtopk", seed=2),
            site_model(7, "jumprelu", seed=3, **PENALTIES["jumprelu"]),
        ]

    together, alone = TranscoderSet(build()), build()
    batch = activations()
    dead = {NAMES[0]: torch.tensor([1, 4]), NAMES[1]: torch.tensor([2])}
    output = together(batch, dead_features=dead, sparsity_scale=0.3, output_features=False)
    output.loss.backward()
    total = 0.0
    for (name, trained), model in zip(together.items(), alone, strict=True):
        site = model.config.input_site
        result = model(
            batch[site],
            batch[model.config.output_site],
            dead_features=dead.get(name),
            sparsity_scale=0.3,
            output_features=False,
        )
        result.loss.backward()
        total = total + result.loss
        assert torch.equal(output.outputs[name].loss, result.loss)
        assert list(output.outputs[name].losses) == list(result.losses)
        for (parameter_name, ours), theirs in zip(trained.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad), (name, parameter_name)
    assert torch.equal(output.loss, total)


def test_without_targets_there_is_no_loss():
    transcoders = make_set()
    batch = activations()
    inputs = {site: tensor for site, tensor in batch.items() if site.endswith("in")}
    output = transcoders(inputs)
    assert output.loss is None and set(output.outputs) == set(NAMES)
    for name, model in transcoders.items():
        expected = model(batch[model.config.input_site]).reconstruction
        assert torch.equal(output.outputs[name].reconstruction, expected)
    # A target for one of them gives that one a loss.
    output = transcoders({**inputs, "layers.3.mlp.branch": batch["layers.3.mlp.branch"]})
    assert torch.equal(output.loss, output.outputs[NAMES[1]].loss) and output.outputs[NAMES[0]].loss is None


def test_save_load_partly_and_one_alone(tmp_path):
    transcoders = make_set()
    transcoders.save_pretrained(tmp_path / "repo" / "inner")
    folder = tmp_path / "repo" / "inner"
    assert sorted(path.name for path in folder.iterdir()) == [*NAMES, "transcoder_set.json"]

    def check(model, name):
        assert type(model) is TranscoderModel
        for key, tensor in transcoders[name].state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor)

    loaded = TranscoderSet.from_pretrained(folder)
    assert list(loaded) == NAMES and loaded.base_model_name_or_path == "someone/base"
    batch = activations()
    ours, theirs = loaded(batch), transcoders.eval()(batch)
    assert torch.equal(ours.loss, theirs.loss)
    for name in NAMES:
        check(loaded[name], name)
        assert torch.equal(ours.outputs[name].reconstruction, theirs.outputs[name].reconstruction)
        check(TranscoderModel.from_pretrained(folder, subfolder=name), name)
        check(AutoModel.from_pretrained(folder, subfolder=name), name)

    some = TranscoderSet.from_pretrained(tmp_path / "repo", subfolder="inner", names=[NAMES[2], NAMES[0]])
    assert list(some) == [NAMES[2], NAMES[0]]
    for name, model in some.items():
        check(model, name)
    low = TranscoderSet.from_pretrained(folder, names=NAMES[1:2], dtype=torch.bfloat16)[NAMES[1]]
    assert low.W_enc.dtype == torch.bfloat16 and torch.equal(low.threshold, transcoders[NAMES[1]].threshold)


def test_saving_a_smaller_set_into_the_same_folder(tmp_path):
    make_set().save_pretrained(tmp_path)
    smaller = TranscoderSet([site_model(3, "relu", seed=9)])
    smaller.save_pretrained(tmp_path, max_shard_size=400)
    loaded = TranscoderSet.from_pretrained(tmp_path)
    assert list(loaded) == NAMES[1:2]
    assert torch.equal(loaded[NAMES[1]].W_enc, smaller[NAMES[1]].W_enc)


def test_the_base_model_is_that_of_any_dictionary():
    assert TranscoderSet([site_model(1, base=None), site_model(3)]).base_model_name_or_path == "someone/base"
    assert TranscoderSet([site_model(1, base=None)]).base_model_name_or_path is None


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(TranscoderError, match="at least one dictionary"):
        TranscoderSet([])
    with pytest.raises(TranscoderError, match="different base models .a/b, c/d.: make one set for each"):
        TranscoderSet([site_model(1, base="a/b"), site_model(3, base="c/d")])
    for name in ("", ".", "..", "../up", "a/b", "a\\b", "/root", "a..b", ".hidden", "a b", "ends."):
        with pytest.raises(TranscoderError, match="cannot name a dictionary"):
            TranscoderSet({name: site_model(1)})
    with pytest.raises(TranscoderError, match="no activations of layers.7.mlp.in"):
        make_set()(activations(layers=(1, 3)))


def test_a_missing_member_is_named(tmp_path):
    TranscoderSet([site_model(1), site_model(3)]).save_pretrained(tmp_path)
    first, second = NAMES[:2]
    (tmp_path / second / "model.safetensors").unlink()
    with pytest.raises((TranscoderError, OSError), match=re.escape(second)):
        TranscoderSet.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path / second)
    with pytest.raises((TranscoderError, OSError), match=re.escape(second)):
        TranscoderSet.from_pretrained(tmp_path)
    assert list(TranscoderSet.from_pretrained(tmp_path, names=[first])) == [first]


def test_folders_that_are_no_set_are_refused(tmp_path):
    site_model(1).save_pretrained(tmp_path / "single")
    for folder in (tmp_path / "single", tmp_path):
        with pytest.raises(TranscoderError, match="not a set of dictionaries.*TranscoderModel.from_pretrained"):
            TranscoderSet.from_pretrained(folder)
    make_set().save_pretrained(tmp_path / "set")
    with pytest.raises(TranscoderError, match="no dictionary layers.2.mlp.transcoder: choose from layers.1.mlp"):
        TranscoderSet.from_pretrained(tmp_path / "set", names=["layers.2.mlp.transcoder"])
    index = tmp_path / "set" / "transcoder_set.json"
    content = index.read_text()
    for damaged in (content[:40], "", "[]", "{}", json.dumps({"format_version": 1, "dictionaries": ["a"]})):
        index.write_text(damaged)
        with pytest.raises(TranscoderError, match="cannot be read.*damaged or cut short"):
            TranscoderSet.from_pretrained(tmp_path / "set")
    index.write_text(json.dumps({**json.loads(content), "format_version": 2}))
    with pytest.raises(TranscoderError, match="format 2.*pip install -U"):
        TranscoderSet.from_pretrained(tmp_path / "set")
    index.write_text(content)
    weights = tmp_path / "set" / NAMES[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(TranscoderError, match="damaged"):
        TranscoderSet.from_pretrained(tmp_path / "set")
    assert len(TranscoderSet.from_pretrained(tmp_path / "set", names=NAMES[1:])) == 2


def test_all_features_of_all_dictionaries_are_there_on_request():
    output = make_set()(activations())
    assert all(out.features.shape == (2, 8, N) for out in output.outputs.values())
