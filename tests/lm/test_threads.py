"""One model in several threads, and blocks that end in any order."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

import hf_transcoders
from hf_transcoders import TranscoderConfig, TranscoderError, TranscoderModel, ablate, capture, edit_attention, splice
from hf_transcoders.circuits import FeatureEdit, attribution_graph, intervene, measure_effect
from hf_transcoders.lm import frozen, record_frozen
from hf_transcoders.lm.hooks import wrap_method
from tests.tiny_models import tiny_model, tiny_tokens


THREADS = 4
ROUNDS = 12
SITE = "layers.1.mlp.branch"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def dictionary(model):
    config = TranscoderConfig.for_model(model, "layers.1.mlp.in", SITE, num_features=24, activation="relu")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = TranscoderModel(config).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture(autouse=True)
def leaves_nothing(model):
    plain = model(tiny_tokens()).logits
    patched = [(threading.Thread, "start"), (ThreadPoolExecutor, "submit"), (PreTrainedConfig, "_attn_implementation")]
    earlier = [owner.__dict__[name] for owner, name in patched]
    yield
    assert all(owner.__dict__[name] is one for (owner, name), one in zip(patched, earlier, strict=True))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in module.__dict__ and "generate" not in module.__dict__
    assert torch.equal(model(tiny_tokens()).logits, plain)


def in_threads(*functions):
    """Results of functions that run at once, `ROUNDS` times each; the first error of any is raised here."""
    together = threading.Barrier(len(functions))

    def rounds(function):
        together.wait()
        with torch.no_grad():
            return [function() for _ in range(ROUNDS)]

    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(rounds, function) for function in functions]
        return [future.result() for future in futures]


def each_alone(functions):
    with torch.no_grad():
        return [function() for function in functions]


def assert_as_alone(*functions):
    """Each function gives, beside the others, bit for bit what it gives alone."""
    alone = each_alone(functions)
    for expected, found in zip(alone, in_threads(*functions), strict=True):
        assert all(torch.equal(one, expected) for one in found)


def plain(model, seed=0):
    ids = tiny_tokens(seed=seed)
    return lambda: model(ids).logits


def captured(model, site, seed, stop=True):
    ids = tiny_tokens(seed=seed)

    def call():
        with capture(model, site, stop=stop) as activations:
            assert (model(ids) is None) == stop
            return activations[site]

    return call


def changed(model, block, seed=0):
    """Logits within a block that is entered anew each time."""
    ids = tiny_tokens(seed=seed)

    def call():
        with block():
            return model(ids).logits

    return call


def with_head_off(model, head):
    def off(pattern, layer):
        pattern = pattern.clone()
        pattern[:, head] = 0
        return pattern

    return lambda: edit_attention(model, pattern=off)


def test_each_thread_captures_its_own(model):
    sites = ["layers.1.mlp.in", "layers.2.resid_post", SITE, "layers.0.attn.out"]
    assert_as_alone(*(captured(model, site, seed) for seed, site in enumerate(sites)))


def test_capture_of_a_flat_mlp():
    """Where the MLP sees one axis, the batch shape is that of the thread's own forward."""
    model = tiny_model("opt")

    def call(batch, length):
        ids = tiny_tokens(batch, length)

        def captured():
            with capture(model, SITE, stop=False) as activations:
                model(ids)
                return activations[SITE]

        return captured

    assert_as_alone(call(2, 6), call(1, 12), call(3, 4), call(4, 3))


def test_plain_forwards_beside_blocks(model, dictionary):
    assert_as_alone(
        captured(model, SITE, 0),
        changed(model, lambda: splice(model, dictionary, error="drop")),
        plain(model),
        changed(model, with_head_off(model, 1)),
    )


def test_different_changes_in_each_thread(model, dictionary):
    assert_as_alone(
        changed(model, lambda: splice(model, dictionary, error="drop")),
        changed(model, lambda: ablate(model, "layers.0.mlp.out")),
        changed(model, with_head_off(model, 0)),
        changed(model, with_head_off(model, 3)),
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_of_other_threads_is_the_one_they_chose(implementation):
    model = tiny_model("gpt2")
    model.set_attn_implementation(implementation)
    inside, asked = threading.Event(), threading.Event()
    seen = []

    def other():
        inside.wait()
        seen.append((model.config._attn_implementation, model(tiny_tokens()).logits))
        asked.set()

    expected = model(tiny_tokens()).logits
    thread = threading.Thread(target=other)
    thread.start()
    with edit_attention(model):
        inside.set()
        asked.wait()
        assert model.config._attn_implementation == "hf_transcoders"
    thread.join()
    assert seen[0][0] == implementation == model.config._attn_implementation
    assert torch.equal(seen[0][1], expected)


def test_edits_of_features_in_each_thread(model, dictionary):
    ids = tiny_tokens()

    def edited(feature, value):
        edits = [FeatureEdit(SITE, feature, position="all", kind="steer", value=value)]
        return changed(model, lambda: intervene(model, dictionary, edits))

    def generated(feature):
        edits = [FeatureEdit(SITE, feature, position="all", kind="steer", value=9.0)]

        def call():
            with intervene(model, dictionary, edits):
                return model.generate(ids, max_new_tokens=2, do_sample=False)

        return call

    assert_as_alone(edited(0, 3.0), edited(1, -5.0), generated(2), plain(model))


def test_frozen_runs_in_each_thread(model):
    def frozen_at(seed):
        ids = tiny_tokens(1, seed=seed)
        run = record_frozen(model, ids)

        def call():
            with frozen(model, run, mlps=True):
                return model(ids).logits

        return call

    assert_as_alone(frozen_at(0), frozen_at(1), frozen_at(2), plain(model))


def test_graphs_and_measurements_in_each_thread(model, dictionary):
    ids = tiny_tokens(1, 6)[0]
    edit = FeatureEdit(SITE, 0, position=2, kind="steer", value=2.0)

    def graph():
        return attribution_graph(model, dictionary, ids.tolist(), progress=False).weight

    def effect():
        return measure_effect(model, dictionary, ids, [edit], mode="frozen").logits_after

    assert_as_alone(graph, effect, graph, captured(model, SITE, 1))


def test_threads_that_are_started_inside_share_the_block(model, dictionary):
    batches = [tiny_tokens(seed=seed) for seed in range(8)]
    with torch.no_grad(), splice(model, dictionary, error="drop") as features:

        def call(ids):
            logits = model(ids).logits
            return logits, features[SITE]

        alone = [call(ids) for ids in batches]
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(call, batches))
    for (logits, activations), (expected, expected_activations) in zip(found, alone, strict=True):
        assert torch.equal(logits, expected) and torch.equal(activations, expected_activations)


def test_masks_of_threads_that_share_a_block(model, dictionary):
    ids = tiny_tokens()
    masks = [torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in range(THREADS)]
    with torch.no_grad(), splice(model, dictionary, error="drop") as replacement:

        def call(mask):
            replacement.mask = mask
            return model(ids).logits

        alone = [call(mask) for mask in masks]
        with ThreadPoolExecutor(THREADS) as pool:
            for mask, found in zip(masks * 4, pool.map(call, masks * 4), strict=True):
                assert torch.equal(found, alone[[mask is other for other in masks].index(True)])


def test_what_another_thread_captured_can_be_read(model):
    with capture(model, SITE) as activations:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(model, tiny_tokens(seed=3)).result()
        found = activations[SITE]
    assert torch.equal(found, captured(model, SITE, 3)())


def test_streaming_from_a_thread_that_generates(model):
    """As `TextIteratorStreamer` is used: `generate` runs in a thread that is started inside the block."""
    ids, found = tiny_tokens(1), []
    with ablate(model, ["layers.0.mlp.out", "layers.1.mlp.out"]):
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        thread = threading.Thread(target=lambda: found.append(model.generate(ids, max_new_tokens=4, do_sample=False)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)


def test_a_thread_of_before_is_told_that_it_is_left_out(model, monkeypatch):
    said, found = [], []
    monkeypatch.setattr("hf_transcoders.lm.threads.logger.warning_once", said.append)
    expected, inside = model(tiny_tokens()).logits, threading.Event()
    thread = threading.Thread(target=lambda: inside.wait() and found.append(model(tiny_tokens()).logits))
    thread.start()
    with ablate(model, "layers.0.mlp.out"):
        inside.set()
        thread.join()
    assert torch.equal(found[0], expected)
    assert said and all("left out" in sentence for sentence in said)


def test_tasks_of_a_pool_that_was_there_before(model):
    """They belong to the block in which they are submitted, whatever else the pool does."""
    plain, call = model(tiny_tokens()).logits, model.__call__
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(call, tiny_tokens()).result().logits, plain)
        with ablate(model, "layers.0.mlp.out"):
            expected = model(tiny_tokens()).logits
            (found,) = pool.map(call, [tiny_tokens()])
            assert torch.equal(found.logits, expected) and not torch.equal(expected, plain)
        assert torch.equal(pool.submit(call, tiny_tokens()).result().logits, plain)


def test_a_block_inside_a_shared_block_is_of_its_thread(model, dictionary):
    with torch.no_grad(), splice(model, dictionary, error="drop"):
        functions = [captured(model, "layers.2.resid_post", seed, stop=False) for seed in range(THREADS)]
        assert_as_alone(*functions)


def test_gradient_checkpointing_recomputes_under_the_block(dictionary):
    model = tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def gradient():
        model.zero_grad()
        with splice(model, dictionary, error="drop"):
            model(tiny_tokens(), use_cache=False).logits.sum().backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    found = gradient()
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(found, gradient())


def foreign(function):
    """The result of a function in a thread that `threading` did not start, as those of autograd on an accelerator."""
    import _thread

    result, done = [], threading.Event()

    def run():
        try:
            result.append(function())
        except Exception as error:
            result.append(error)
        done.set()

    _thread.start_new_thread(run, ())
    done.wait()
    return result[0]


def test_autograd_threads_follow_the_one_thread_that_has_blocks(model):
    ids = tiny_tokens()
    with torch.no_grad():
        original = model(ids).logits
        with ablate(model, "layers.0.mlp.out"):
            expected = model(ids).logits
            assert torch.equal(foreign(lambda: model(ids).logits).detach(), expected)
            with ThreadPoolExecutor(1) as pool:
                inside = ExitStack()
                pool.submit(inside.enter_context, ablate(model, "layers.1.mlp.out")).result()
                error = foreign(lambda: model(ids).logits)
                assert isinstance(error, TranscoderError) and "gradient_checkpointing_disable" in str(error)
                inside.close()
        assert torch.equal(foreign(lambda: model(ids).logits).detach(), original)
    error = foreign(lambda: ablate(model, "layers.0.mlp.out").__enter__())
    assert isinstance(error, TranscoderError) and "Python did not start" in str(error)


def blocks_of(model, dictionary):
    edit = FeatureEdit(SITE, 0, position="all", kind="steer", value=2.0)
    return [
        capture(model, "layers.1.mlp.in", stop=False),
        splice(model, dictionary, error="drop"),
        edit_attention(model, z=lambda z, layer: 2 * z),
        capture(model, "layers.2.mlp.in", stop=False),
        intervene(model, dictionary, [edit]),
        frozen(model, record_frozen(model, tiny_tokens(1))),
        ablate(model, "layers.0.mlp.out"),
    ]


@pytest.mark.parametrize("seed", range(4))
def test_blocks_are_left_in_any_order(model, dictionary, seed):
    """What is left acts as if the others had never been there."""
    ids, twin = tiny_tokens(1), tiny_model("llama")
    blocks, left = blocks_of(model, dictionary), list(range(7))
    for block in blocks:
        block.__enter__()
    with torch.no_grad():
        for number in torch.randperm(7, generator=torch.Generator().manual_seed(seed)).tolist():
            blocks[number].__exit__(None, None, None)
            left.remove(number)
            of_twin = blocks_of(twin, dictionary)
            with ExitStack() as stack:
                for other in left:
                    stack.enter_context(of_twin[other])
                expected = twin(ids).logits
            assert torch.equal(model(ids).logits, expected)


def test_a_block_that_is_closed_in_another_thread_leaves_nothing(model, dictionary):
    expected = model(tiny_tokens()).logits

    def opened():
        with splice(model, dictionary, error="drop"), edit_attention(model, z=lambda z, layer: 2 * z):
            yield

    generator = opened()
    next(generator)
    assert not torch.equal(model(tiny_tokens()).logits, expected)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert torch.equal(model(tiny_tokens()).logits, expected)


def test_a_method_of_before_comes_back(model):
    """As accelerate's hooks, which set `forward` on the instance."""
    own = model.forward
    module = model.model.layers[0].mlp
    original = module.forward
    module.forward = lambda hidden: original(hidden)
    earlier = module.forward
    first, second = ExitStack(), ExitStack()
    wrap_method(first, module, "forward", lambda inner, hidden: 2 * inner(hidden))
    wrap_method(second, module, "forward", lambda inner, hidden: 3 * inner(hidden))
    hidden = torch.randn(1, 2, 32)
    assert torch.equal(module(hidden), 6 * original(hidden)) or torch.allclose(module(hidden), 6 * original(hidden))
    first.close()
    assert torch.equal(module(hidden), 3 * original(hidden))
    second.close()
    assert module.forward is earlier and model.forward == own
    del module.forward


def test_everything_is_attached_in_one_place():
    """A hook or a method that is set past `lm/hooks.py` would act on every thread."""
    root = Path(hf_transcoders.__file__).parent
    past = re.compile(r"register_forward_(pre_)?hook\(|\.(forward|generate) = |_attn_implementation = ")
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if past.search(path.read_text())}
    assert found == {"lm/hooks.py"}
