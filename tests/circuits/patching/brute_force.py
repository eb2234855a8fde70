"""Brute-force patching: one run at a time, with whole forward passes and nothing shared."""

from contextlib import ExitStack
from dataclasses import replace

import torch
from datasets import Dataset

from hf_transcoders import Site, edit_attention
from hf_transcoders.lm.architectures import architecture_of, has_parallel_residual, locate, num_layers
from hf_transcoders.lm.attention import attention_modules, num_heads
from hf_transcoders.lm.hooks import read_at, write_at
from hf_transcoders.tasks import Task, logit_difference
from tests.tiny_models import tiny_tokens


def tiny_task(lengths=(9, 12, 10), shared=3, corrupted=True, templates=None, seed=0) -> Task:
    """Random prompts. The corrupted prompts differ from token `shared` on, but not in every token."""
    rows = []
    for number, length in enumerate(lengths):
        clean, other = tiny_tokens(2, length, seed + number)
        keep = torch.arange(length) % 3 == 1
        keep[:shared] = True
        rows.append(
            {
                "clean": str(number),
                "clean_ids": clean.tolist(),
                "corrupted": str(number),
                "corrupted_ids": torch.where(keep, clean, other).tolist(),
                "answer_ids": [3 + number],
                "wrong_ids": [30 + number, 40 + number],
                "candidate_ids": [3 + number, 30 + number, 40 + number],
                "positions": {"S": 4 + number % 2, "END": length - 1},
                "template": 0 if templates is None else templates[number],
            }
        )
    dataset = Dataset.from_list(rows)
    if not corrupted:
        dataset = dataset.remove_columns(["corrupted", "corrupted_ids"])
    return Task(dataset, "tiny", settings={"seed": seed})


def metric(model, task, row, logits):
    answers = task.answers([row])
    return logit_difference(logits[None], answers.right, answers.wrong)[0]


def prompt(task, row, which="clean"):
    return torch.tensor([task[row][f"{which}_ids"]])


@torch.no_grad()
def activations(model, ids):
    """Record all components of all layers for one prompt: `(component, layer)` -> tensor without the batch axis."""
    found = {}

    def keep(part):
        return lambda value, layer: found.__setitem__((part, layer), value[0].clone())

    parts = ("query", "key", "value", "pattern", "z")
    points = ["resid_pre", "attn.out", "mlp.out", "resid_post"]
    points += [] if has_parallel_residual(model) else ["resid_mid"]
    with ExitStack() as stack:
        stack.enter_context(edit_attention(model, **{part: keep(part) for part in parts}))
        for layer in range(num_layers(model)):
            for point in points:
                location = locate(model, Site(point, layer))
                read_at(stack, location, lambda v, key=(point, layer): found.__setitem__(key, v[0].clone()))
        model(ids)
    return found


@torch.no_grad()
def patched(model, task, row, patches, which="clean"):
    """The metric of one prompt with patches `(component, layer, head, positions, value)`; positions are `None` for all."""
    streams = [patch for patch in patches if patch[0] in ("resid_pre", "attn.out", "mlp.out")]
    middle = [patch for patch in patches if patch[0] == "resid_mid"]
    own = [patch for patch in patches if patch[0].startswith("head_")]
    heads = [patch for patch in patches if not any(patch is other for other in [*streams, *middle, *own])]

    def edit(part):
        def function(tensor, layer):
            chosen = [patch for patch in heads if patch[:2] == (part, layer)]
            if not chosen:
                return None
            tensor = tensor.clone()
            for _, _, head, at, value in chosen:
                tensor[0, head, slice(None) if at is None else at] = value
            return tensor

        return function

    with ExitStack() as stack:
        parts = sorted({patch[0] for patch in heads} - {"z"})
        stack.enter_context(edit_attention(model, **{part: edit(part) for part in parts}))
        for _, layer, head, at, value in (patch for patch in heads if patch[0] == "z"):
            stack.callback(_hook_z(model, layer, head, at, value).remove)
        if own:
            stack.enter_context(edit_attention(model, compute=_of_single_heads(own)))
        for _, layer, _, at, value in middle:
            _write_between(stack, model, layer, at, value)
        for component, layer, _, at, value in streams:
            point, of = ("resid_post", layer - 1) if layer == num_layers(model) else (component, layer)

            def write(tensor, at=at, value=value):
                tensor = tensor.clone()
                tensor[0, slice(None) if at is None else at] = value
                return tensor

            write_at(stack, locate(model, Site(point, of)), write)
        logits = model(prompt(task, row, which)).logits[0, -1]
    return metric(model, task, row, logits).item()


def _of_single_heads(patches):
    """Attention in which single heads read other keys or values, each computed in a call of its own."""

    def compute(call):
        z = call.run()[0].clone()
        groups = call.query.shape[1] // call.key.shape[1]
        for head in {patch[2] for patch in patches}:
            parts = {"key": call.key.clone(), "value": call.value.clone()}
            for component, _, _, at, value in (patch for patch in patches if patch[1:3] == (call.layer, head)):
                parts[component.removeprefix("head_")][0, head // groups, slice(None) if at is None else at] = value
            z[:, :, head] = replace(call, **parts).run()[0][:, :, head]
        return z

    return compute


def _write_between(stack, model, layer, at, value):
    """Set the residual stream after attention to `value`, by changing the output of attention."""
    index, entered = slice(None) if at is None else at, {}
    read_at(stack, locate(model, Site("resid_pre", layer)), lambda stream: entered.update(stream=stream))

    def write(added):
        added = added.clone()
        added[0, index] = value - entered["stream"][0, index]
        return added

    write_at(stack, locate(model, Site("attn.branch", layer)), write)


def _hook_z(model, layer, head, at, value):
    module = attention_modules(model)[layer]
    projection = module.get_submodule(architecture_of(model).attention_output)
    heads = num_heads(model)[0]

    def hook(module, args):
        z = args[0].clone()
        z.view(*z.shape[:-1], heads, -1)[0, slice(None) if at is None else at, head] = value
        return (z, *args[1:])

    return projection.register_forward_pre_hook(hook)


def at(value, component, head, position, groups=1):
    """The part of a recorded activation for a patch."""
    if component in ("query", "key", "value", "pattern", "z"):
        value = value[head]
    if component.startswith("head_"):
        # The caller gives the activation of the key-value head, which the heads of a group share.
        value = value[head // groups]
    return value if position is None else value[position]


@torch.no_grad()
def path_patched(
    model, task, row, sender, receivers, position, freeze_mlps, which=("clean", "corrupted"), per_query_head=False
):
    """Path-patch one sender in two hooked forward passes. `receivers` is `None` for the logits; `position` is `None` for all."""
    clean, other = (activations(model, prompt(task, row, name)) for name in which)
    heads, layers = num_heads(model)[0], num_layers(model)
    layer, head = sender
    seen = {}
    with ExitStack() as stack:

        def read(part):
            return lambda value, at: seen.__setitem__((part, at), value[0].clone())

        parts = ("query", "key", "value")
        stack.enter_context(edit_attention(model, **{part: read(part) for part in parts}))
        for each in range(layers):
            for other_head in range(heads):
                handle = _hook_z(model, each, other_head, None, clean["z", each][other_head])
                stack.callback(handle.remove)
            if each == layer and head < heads:
                stack.callback(_hook_z(model, each, head, position, at(other["z", each], "z", head, position)).remove)
            location = locate(model, Site("mlp.out", each))
            read_at(stack, location, lambda v, each=each: seen.__setitem__(("mlp.out", each), v[0].clone()))
            value = clean["mlp.out", each].clone() if freeze_mlps or (each == layer and head == heads) else None
            if each == layer and head == heads:
                index = slice(None) if position is None else position
                value[index] = other["mlp.out", each][index]
            if value is not None:
                # The output of a receiving MLP is read, so it is not frozen.
                frozen = not any(site.head is None and site.layer == each for site in receivers or [])
                if frozen or (each == layer and head == heads):
                    write_at(stack, location, lambda tensor, value=value: value[None].to(tensor))
        logits = model(prompt(task, row, which[0])).logits[0, -1]
    if receivers is None:
        return metric(model, task, row, logits).item()
    patches = []
    for site in receivers:
        component = part = "mlp.out" if site.head is None else site.point
        if per_query_head and part in ("key", "value"):
            component = f"head_{part}"
        reached = site.layer > layer or (site.layer == layer and site.head is None and head < heads)
        if reached:
            patches.append(
                (
                    component,
                    site.layer,
                    site.head,
                    position,
                    at(seen[part, site.layer], component, site.head, position, heads // num_heads(model)[1]),
                )
            )
    return patched(model, task, row, patches, which[0])
