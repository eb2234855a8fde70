def hook_state(model):
    """Every hook and every instance attribute of a model: what must be the same after a context as before it."""
    return {
        name: (
            list(module._forward_hooks.items()),
            list(module._forward_pre_hooks.items()),
            dict(module._forward_pre_hooks_with_kwargs),
            dict(module._forward_hooks_with_kwargs),
            {key: value for key, value in vars(module).items() if key == "forward"},
            sorted(vars(module)),
        )
        for name, module in model.named_modules()
    }
