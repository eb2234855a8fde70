"""The plan's sums, against what is made of the same sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_transcoders import TranscoderConfig, TranscoderModel, TranscoderTrainingArguments
from hf_transcoders.cli import main
from hf_transcoders.training.memory_plan import estimate_speed, plan_run
from tests.cli.setups import fill_workplace, train_arguments
from tests.tiny_models import tiny_model
from tests.training.test_trainer import make_trainer


READ, WRITE = "layers.1.mlp.in", "layers.1.mlp.branch"


def make_plan(configs=None, arguments=None, **changes):
    base = tiny_model("llama").to("meta")
    configs = configs or [TranscoderConfig.for_model(base, READ, WRITE, num_features=64, k=4)]
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "max_tokens": 20_000,
        "sequence_length": 10,
        "buffer_tokens": 4096,
    }
    args = TranscoderTrainingArguments("unused", **{**defaults, **(arguments or {})})
    return plan_run(base, configs, args, **changes)


def test_sizes_are_those_of_the_objects(tmp_path):
    base = tiny_model("llama")
    trainer = make_trainer(base, tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    plan = plan_run(base, [d.config for d in trainer.dictionaries.values()], trainer.args)
    held = plan.held["ddp"]

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    assert held["dictionaries"] == size(trainer.model.parameters())
    assert held["gradients"] == held["dictionaries"]
    states = trainer.optimizer.state_dict()["state"].values()
    assert held["optimizer"] == size(v for s in states for v in s.values() if v.dim())
    assert held["language model"] == size(base.parameters())
    (stream,) = trainer.stream.shards.values()
    trainer.stream.sample(1)
    assert held["activation block"] == size(stream._block.values())
    written = tmp_path / "checkpoint-4"
    found = sum((written / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors"))
    assert 0 < found - plan.disk["checkpoint"] < 10_000  # The files' own headers.


def test_length_and_checkpoints():
    plan = make_plan(arguments={"per_device_train_batch_size": 128, "gradient_accumulation_steps": 2}, processes=2)
    assert (plan.tokens_per_step, plan.steps, plan.tokens) == (512, 39, 39 * 512)
    assert "checkpoints" in plan.disk
    saved = make_plan(
        arguments={
            "per_device_train_batch_size": 128,
            "save_strategy": "steps",
            "save_steps": 10,
            "save_total_limit": 2,
        }
    )
    assert saved.disk["checkpoints"] == 3 * saved.disk["checkpoint"] == 3 * 12 * saved.parameters
    by_epochs = make_plan(
        arguments={"max_tokens": None, "num_train_epochs": 2, "per_device_train_batch_size": 9}, rows=50
    )
    assert by_epochs.tokens == 2 * 50 * 9
    # 450 activations of two sites, 32 wide in fp32: the block holds no more than an epoch, and the second comes from memory.
    assert by_epochs.held["ddp"]["activation block"] == 450 * 64 * 4
    assert by_epochs.held["ddp"]["activations kept for later epochs"] == 450 * 64 * 4


def test_processes_share_with_fsdp():
    base = tiny_model("llama")
    configs = [
        TranscoderConfig.for_model(base, READ, WRITE, num_features=n, k=4) for n in (64, 128)
    ]  # Both read the same sites.
    alone, shared = make_plan(configs), make_plan(configs, processes=4)
    total = alone.parameters
    assert shared.held["ddp"]["gradients"] == 2 * alone.held["ddp"]["gradients"] == 8 * total
    assert shared.held["fsdp"]["optimizer"] == 8 * total // 4
    assert shared.held["fsdp"]["gathered"] == 8 * (128 * 64 + 128 + 32)
    assert alone.held["ddp"]["activation block"] == 4096 * 64 * 4
    assert "fsdp" not in alone.held
    estimate_speed(shared, 1e9, 1e9)
    assert shared.hours == pytest.approx(shared.tokens / shared.tokens_per_second["run"] / 3600)


def test_flops_of_the_forward_stop_at_the_last_site():
    deep = TranscoderConfig.for_model(
        tiny_model("llama"), "layers.2.mlp.in", "layers.2.mlp.branch", num_features=64, k=4
    )
    shallow, deeper = make_plan(), make_plan([deep])
    assert deeper.flops["language model"] / shallow.flops["language model"] == pytest.approx(3 / 2)
    # One token: the encoder, and three products with the active rows, forward and backward.
    assert shallow.flops["dictionaries"] == 2 * 64 * 32 + 6 * 4 * 64


_STEP = """
import sys, torch
from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.training.monitor import DictionaryMonitor

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(1)
model = TranscoderModel(TranscoderConfig.from_pretrained(sys.argv[1]))
monitor = DictionaryMonitor(model, 1 << 60)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
def step(tokens):
    x, y = torch.randn(tokens, 256), torch.randn(tokens, 256)
    output = model(x, y, output_features=False)
    monitor.update(y, output)
    output.loss.backward()
    optimizer.step()
step(8)
before = resident("VmRSS")
step(2048)
step(2048)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a process's peak in /proc")
@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu", "gated"])
def test_memory_of_a_step_is_near_the_measured(tmp_path, activation):
    changes = {"k": 32} if activation == "topk" else {}
    changes |= {"l1_coefficient": 1e-2} if activation in ("relu", "gated") else {}
    changes |= {"l0_coefficient": 1e-2} if activation == "jumprelu" else {}
    config = TranscoderConfig(
        d_in=256, num_features=4096, activation=activation, auxk_coefficient=0.0, target_variance=1.0, **changes
    )
    config.save_pretrained(tmp_path)
    root = Path(__file__).parent.parent.parent
    result = subprocess.run(
        [sys.executable, "-c", _STEP, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=120
    )
    measured = int(result.stdout)
    config.input_site, config.output_site = READ, WRITE
    planned = make_plan([config], {"per_device_train_batch_size": 2048}).phases["step"] - 2048 * (32 + 32) * 4
    assert 0.7 < planned / measured < 1.5, (planned / 2**20, measured / 2**20)


@pytest.mark.parametrize("how", [["--measure"], ["--tflops", "10"], []])
def test_plan_command(tmp_path, capsys, how):
    workplace = fill_workplace(tmp_path)
    arguments = ["plan", *train_arguments(workplace, tmp_path / "run", "--processes", "2", "--json", *how)[1:]]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    config = TranscoderConfig(d_in=32, num_features=64, k=4)
    assert plan["parameters"] == sum(p.numel() for p in TranscoderModel(config).parameters())
    assert plan["tokens"] == 640 and plan["steps"] == 10
    assert plan["hours"] > 0 and plan["peak"]["fsdp"] < plan["peak"]["ddp"]
    assert not (tmp_path / "run").exists()


def test_plan_says_whether_it_fits(tmp_path, capsys):
    workplace = fill_workplace(tmp_path)
    arguments = ["plan", *train_arguments(workplace, tmp_path / "run", "--tflops", "1")[1:]]
    assert main([*arguments, "--device_memory", "100"]) == 0
    assert "fits 100 GiB" in capsys.readouterr().out
    assert main([*arguments, "--device_memory", "0.01"]) == 0
    assert "does NOT fit 0.01 GiB" in capsys.readouterr().out
    assert main([*arguments, "--measure"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_the_plan_loads_no_weights(tmp_path, capsys):
    workplace = fill_workplace(tmp_path)
    (workplace / "model" / "model.safetensors").unlink()
    assert main(["plan", *train_arguments(workplace, tmp_path / "run", "--tflops", "1", "--json")[1:]]) == 0
    expected = sum(p.numel() for p in tiny_model("llama").parameters())
    assert json.loads(capsys.readouterr().out)["base_parameters"] == expected
    assert torch.get_default_dtype() == torch.float32
