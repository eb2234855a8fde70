"""Check that the linear maps of a recorded forward pass give the activations of the model."""

import torch

from ...lm.sites import Site
from ...text import logging
from .linear_run import LinearRun, through_heads


logger = logging.get_logger(__name__)


def check_linear(run: LinearRun, values: dict[Site, torch.Tensor]) -> None:
    """Warn if the linear maps of a run do not give the activations of the model, and name the first site that differs.

    Args:
        run ([`LinearRun`]): A recorded prompt.
        values (`dict[Site, torch.Tensor]`): Activations of the model `(seq, width)` at every point of every layer.
    """
    points, errors = [], []
    for layer, maps in enumerate(run.layers):
        at = {site.point: value for site, value in values.items() if site.layer == layer}
        for point, ours in _given_by_parts(maps, at, run.parallel).items():
            points.append(Site(point, layer))
            errors.append((ours - at[point]).norm() / at[point].norm().clamp(min=torch.finfo(torch.float32).tiny))
    tolerance = 1e-3 if run.model.dtype in (torch.float32, torch.float64) else 5e-2
    # One transfer from the device for all errors.
    for site, error in zip(points, torch.stack(errors).tolist(), strict=True):
        if not error <= tolerance:
            logger.warning(
                f"'{site}' of this {run.model.config.model_type} model differs by {error:.2g} of its norm from the sum of its "
                "parts, so rows of graphs and paths do not sum and are not to be trusted: the block does more than norms, "
                "heads and an MLP that add to the stream, a hook edits it, or the family was registered with the wrong "
                "modules."
            )
            return


def _given_by_parts(maps, at, parallel):
    """Activations of a layer by point, computed from the activations before them by the linear maps."""

    def through(norm, bias, value):
        return value if norm is None else norm(value[:, None])[:, 0] + bias

    attended = through_heads((at["attn.in"] - maps.attention_norm_bias).float(), maps.pattern, maps.value, maps.output)
    branches = {
        "attn.in": through(maps.attention_norm, maps.attention_norm_bias, at["resid_pre"]),
        "attn.out": attended + maps.attention_constant,
        "attn.branch": through(maps.attention_post_norm, maps.attention_post_bias, at["attn.out"]),
        "mlp.in": through(maps.mlp_norm, maps.mlp_norm_bias, at["resid_pre" if parallel else "resid_mid"]),
        "mlp.branch": through(maps.mlp_post_norm, maps.mlp_post_bias, at["mlp.out"]),
    }
    middle = {} if parallel else {"resid_mid": at["resid_pre"] + at["attn.branch"]}
    return {**branches, **middle, "resid_post": at["resid_pre"] + at["attn.branch"] + at["mlp.branch"]}
