"""`hf-transcoders plan`: estimate the memory, disk space and duration of a run before it starts."""

import time

from ..errors import TranscoderError
from ..lm.offline_models import model_path
from ..text.columns import paired
from .common import best_device, explained, fastest_cpu_dtype, load_tokenizer
from .terminal import echo, print_json
from .train import configurations, load_rows, parse_command
from .values import positive, whole


_EXAMPLES = """examples:
  hf-transcoders plan --config run.yaml
  hf-transcoders plan --config run.yaml --processes 8 --device-memory 80
  hf-transcoders plan --layers 8 --num-features 16384 --k 64 --max-tokens 100000000 --measure

Takes the options of `hf-transcoders train`. Of the language model, only the configuration is loaded.
The text is only read if the length of the run depends on it (neither --max-tokens nor --max-steps is given).
"""
_GIB = 2**30
# Memory of a CUDA context and the kernels of PyTorch.
_CONTEXT_BYTES = _GIB // 2


def parse(argv, prog):
    return parse_command(
        argv,
        declare=_declare,
        prog=prog,
        description="Estimates the memory, disk space and duration of a training run, and tells whether it fits a device.",
        epilog=_EXAMPLES,
    )


def _declare(parser):
    parser.add_argument("--processes", type=whole(1), metavar="N", default=1, help="processes (devices) of the run")
    parser.add_argument(
        "--device-memory", type=positive, metavar="GIB", help="memory of one device, to tell whether the run fits"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure the speed of the language model and the dictionaries on this machine, for a few seconds",
    )
    parser.add_argument(
        "--tflops", type=positive, help="peak of the device in 10^12 operations per second, to estimate the duration"
    )


def run(args):
    import psutil

    from ..training.memory_plan import estimate_speed, plan_run

    options, training = args.options, args.training
    device = "cpu" if training.use_cpu else best_device()
    if args.measure and args.tflops:
        raise TranscoderError("--measure and --tflops are two sources of the speed: give one of them.")
    base_model = _without_weights(options, device)
    configs = configurations(options, base_model)
    rows = None
    if training.max_tokens is None and training.max_steps <= 0:
        rows = len(load_rows(options, training, load_tokenizer(options.model, options.revision))[0])
    runtime = psutil.Process().memory_info().rss if device == "cpu" else _CONTEXT_BYTES
    plan = plan_run(
        base_model, configs, training, processes=args.processes, device_type=device, rows=rows, runtime_bytes=runtime
    )
    if args.measure:
        plan.set_speed(*_measure(base_model.config, base_model.dtype, configs, training, device))
        plan.notes.append("Speed was measured on this machine, with random weights and without AuxK.")
    elif args.tflops:
        estimate_speed(plan, args.tflops * 1e12, args.tflops * 1e12)
    else:
        import torch

        estimate_speed(plan, _product_flops(base_model.dtype, device), _product_flops(torch.float32, device))
        plan.notes[-1] += " The peak was measured here with products of 1024 x 1024 matrices."
    if args.json:
        print_json(plan.to_dict())
    else:
        echo(*_table(plan, args.device_memory).split("\n"))


def _without_weights(options, device):
    """Make the language model without weights, on the `meta` device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with explained(f"The configuration of '{options.model}'", options.model):
        config = AutoConfig.from_pretrained(model_path(options.model), revision=options.revision)
    if options.dtype != "auto":
        dtype = getattr(torch, options.dtype)
    else:
        dtype = fastest_cpu_dtype() if device == "cpu" else config.dtype or torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _measure(config, dtype, configs, training, device) -> tuple[float, float]:
    """Measure tokens per second of the language model and of the dictionaries, with random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..lm.capture import capture
    from ..models.cross_layer.configuration_cross_layer import CrossLayerTranscoderConfig
    from ..models.cross_layer.modeling_cross_layer import CrossLayerTranscoder
    from ..models.model_types import dictionary_configs
    from ..models.modeling_transcoder import TranscoderModel
    from ..models.transcoder_set import TranscoderSet
    from ..training.monitor import DictionaryMonitor

    with torch.device(device):
        base_model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    layers = [one for config in configs for one in (dictionary_configs(config) or {"": config}).values()]
    sites = list(dict.fromkeys(site for layer in layers for site in (layer.input_site, layer.output_site)))
    ids = torch.randint(config.get_text_config().vocab_size, (training.harvest_batch_size, training.sequence_length))
    ids = ids.to(device)

    def forward():
        with torch.no_grad(), capture(base_model, sites) as activations:
            base_model(ids)
        return activations

    widths = {c.input_site: c.d_in for c in layers} | {c.output_site: c.d_out for c in layers}
    tokens = training.per_device_train_batch_size
    batch = {site: torch.randn(tokens, width, device=device) for site, width in widths.items()}
    if isinstance(configs[0], CrossLayerTranscoderConfig):
        models = CrossLayerTranscoder(configs[0]).to(device)
    else:
        models = TranscoderSet([TranscoderModel(c) for c in configs]).to(device)
    monitors = {name: DictionaryMonitor(model, 1 << 60) for name, model in models.items()}
    optimizer = torch.optim.AdamW(models.parameters(), fused=True)
    precision = torch.bfloat16 if training.bf16 else torch.float16
    mixed = torch.autocast(device, dtype=precision, enabled=training.bf16 or training.fp16)

    def step():
        with mixed:
            result = models(batch, output_features=False)
        for name, monitor in monitors.items():
            monitor.update(batch[models[name].config.output_site], result.outputs[name])
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return ids.numel() / _seconds(forward, device), tokens / _seconds(step, device)


def _seconds(function, device, budget: float = 3.0) -> float:
    """Measure the median duration of a call, after a warm-up call."""
    import torch

    def synchronized():
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    synchronized()
    times, end = [], time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 50):
        start = time.perf_counter()
        synchronized()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _product_flops(dtype, device) -> float:
    import torch

    a = torch.ones(1024, 1024, dtype=dtype, device=device)
    return 2 * 1024**3 / _seconds(lambda: a @ a, device, budget=0.2)


def _table(plan, device_memory) -> str:
    facts = {
        "dictionaries": f"{plan.parameters:,} parameters",
        "language model": f"{plan.base_parameters:,} parameters",
        "tokens per step": f"{plan.tokens_per_step:,}",
    }
    if plan.tokens is not None:
        facts["tokens of the run"] = f"{plan.tokens:,} ({plan.steps:,} steps)"
    several = plan.processes > 1
    parts = {"": facts}
    for sharing, held in plan.held.items():
        phase, size = max(plan.phases.items(), key=lambda item: item[1])
        sizes = {**held, f"largest phase: {phase}": size, "peak": plan.peak(sharing)}
        facts = {name: _size(size) for name, size in sizes.items() if size}
        if device_memory is not None:
            left = device_memory * _GIB - plan.peak(sharing)
            largest = max((held | plan.phases).items(), key=lambda item: item[1])[0]
            facts[f"{'fits' if left >= 0 else 'does NOT fit'} {device_memory:g} GiB"] = (
                f"{_size(left)} left" if left >= 0 else f"{_size(-left)} too much; the largest part is {largest}"
            )
        parts[f"memory of each of {plan.processes} processes, {sharing.upper()}" if several else "memory"] = facts
    parts["disk"] = {name: _size(size) for name, size in plan.disk.items() if size}
    speed = {name: f"{value:,.0f} tokens/s" for name, value in plan.tokens_per_second.items()}
    if plan.hours is not None:
        speed["duration of the run"] = f"{plan.hours:,.2f} hours"
    parts[f"speed of one process, and of a run with {plan.processes}" if several else "speed"] = speed
    return "\n\n".join(
        [*(f"{title}\n{paired(facts, '  ')}".lstrip("\n") for title, facts in parts.items()), *plan.notes]
    )


def _size(size: float) -> str:
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:,.2f} MiB"
