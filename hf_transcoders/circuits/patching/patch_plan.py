"""Plans of patches: each row is one patched run of every prompt."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm.architectures import has_parallel_residual, num_layers
from ...lm.attention import num_heads
from ...lm.sites import HEAD_POINTS, Site
from ...lm.wrappers import takes_model


#: Components of a head. `head_key` and `head_value` are the key and value of one head that may share them with others.
HEAD_COMPONENTS = (*HEAD_POINTS, "head_key", "head_value")
COMPONENTS = ("resid_pre", *HEAD_COMPONENTS, "attn.out", "resid_mid", "mlp.out")
ALL_POSITIONS = -1


@dataclass(frozen=True)
class PatchPlan:
    """Rows of patches, as tensors. A row is one patched run of every prompt, and an entry is one patch in one row.

    Args:
        num_rows (`int`):
            Number of rows.
        row (`torch.LongTensor` of shape `(entries,)`):
            Row of each entry.
        layer (`torch.LongTensor` of shape `(entries,)`):
            Layer of each entry; the number of layers stands for the residual stream after the last block.
        component (`torch.LongTensor` of shape `(entries,)`):
            Component of each entry, an index into `COMPONENTS`: `resid_pre`, `query`, `key`, `value`, `pattern`, `z`,
            `head_key`, `head_value`, `attn.out`, `resid_mid`, `mlp.out`. With grouped queries, `key` and `value` are those
            of a key-value head, for all heads that share it; `head_key` and `head_value` change them for one of these
            heads only.
        head (`torch.LongTensor` of shape `(entries,)`):
            Head of each entry (the key-value head for `key` and `value`), 0 for components without heads.
        position (`torch.LongTensor` of shape `(entries, prompts)`):
            Token of each entry in each prompt, or -1 for all tokens. An entry has -1 in all prompts or in none.
        values (`torch.Tensor`, *optional*):
            Values to write, `(entries, prompts, width)`, or `(entries, prompts, seq, width)` for entries at all
            positions. By default they follow from the ablation of [`Patching`].
    """

    num_rows: int
    row: torch.Tensor
    layer: torch.Tensor
    component: torch.Tensor
    head: torch.Tensor
    position: torch.Tensor
    values: torch.Tensor | None = None

    @classmethod
    def from_sites(
        cls,
        rows: Sequence[str | Site | Iterable[str | Site]],
        position: torch.Tensor,
        values: torch.Tensor | None = None,
        per_query_head: bool = False,
    ) -> "PatchPlan":
        """Make a plan from sites: each row patches one site or several at once.

        Args:
            rows (`Sequence`):
                One or several sites for each row: `layers.8.attn.head.3.z` (or `query`, `key`, `value`, `pattern`), and
                the points `resid_pre`, `resid_mid`, `resid_post`, `attn.out` and `mlp.out` of a layer.
            position (`torch.LongTensor` of shape `(prompts,)` or `(entries, prompts)`):
                Token in each prompt, or -1 for all tokens.
            values (`torch.Tensor`, *optional*):
                Values to write, as in [`PatchPlan`].
            per_query_head (`bool`, *optional*, defaults to `False`):
                Whether `key` and `value` are those of one query head, with the number of that head, instead of those of a
                key-value head that several heads may share.
        """
        entries = []
        for number, sites in enumerate(rows):
            for site in [sites] if isinstance(sites, (str, Site)) else sites:
                site = Site.parse(site)
                layer, point = site.layer, site.point
                if point == "resid_post":
                    layer, point = layer + 1, "resid_pre"
                if per_query_head and point in ("key", "value"):
                    point = f"head_{point}"
                if point not in COMPONENTS:
                    raise TranscoderError(
                        f"'{site}' cannot be patched: choose resid_pre, resid_mid, resid_post, attn.out, mlp.out or a "
                        "point of a head such as 'layers.0.attn.head.0.z'."
                    )
                entries.append((number, layer, COMPONENTS.index(point), site.head or 0))
        columns = torch.tensor(entries, dtype=torch.long).reshape(-1, 4).unbind(1)
        position = torch.as_tensor(position)
        if position.dim() == 1:
            position = position.expand(len(entries), -1)
        return cls(len(rows), *columns, position, values)  # pyright: ignore[reportCallIssue]

    @classmethod
    def grid(
        cls, layers: Iterable[int], component: str, heads: int = 1, positions: torch.Tensor | None = None
    ) -> "PatchPlan":
        """Make a plan with one patch per row, for every layer, head and position in this order.

        Args:
            layers (`Iterable[int]`):
                The layers.
            component (`str`):
                One of `COMPONENTS`.
            heads (`int`, *optional*, defaults to 1):
                Number of heads, 1 for components without heads.
            positions (`torch.LongTensor` of shape `(positions, prompts)`):
                Token in each prompt, or -1 for all tokens, for each position.
        """
        layers = torch.as_tensor(list(layers))
        layer, head, column = torch.cartesian_prod(layers, torch.arange(heads), torch.arange(len(positions))).unbind(1)
        count = len(layer)
        code = torch.full((count,), COMPONENTS.index(component))
        return cls(count, torch.arange(count), layer, code, head, positions[column])

    @takes_model
    def check(self, model: PreTrainedModel, last: torch.Tensor) -> None:
        """Refuse a plan that does not fit a model and prompts whose last tokens are at `last`.

        Raises:
            [`TranscoderError`]: a layer, head, point or position does not exist.
        """
        layers, (heads, kv_heads) = num_layers(model), num_heads(model)
        residual = self.component == COMPONENTS.index("resid_pre")
        outside = (self.layer < 0) | (self.layer >= layers + residual.long())
        if outside.any():
            raise TranscoderError(
                f"A patch is at layer {int(self.layer[outside][0])}, but this model has the layers 0 to {layers - 1}."
            )
        if has_parallel_residual(model) and (self.component == COMPONENTS.index("resid_mid")).any():
            raise TranscoderError(
                "There is no residual stream between attention and MLP to patch, because both read the input of the block in "
                "this model: patch resid_pre."
            )
        shared = (self.component == COMPONENTS.index("key")) | (self.component == COMPONENTS.index("value"))
        most = torch.where(shared, kv_heads, heads)
        outside = (self.head < 0) | (self.head >= most)
        if outside.any():
            first = int(outside.nonzero()[0])
            kind = "key-value heads" if shared[first] and kv_heads != heads else "heads"
            raise TranscoderError(
                f"A patch is at head {int(self.head[first])} of layer {int(self.layer[first])}, but this model has the "
                f"{kind} 0 to {int(most[first]) - 1}."
            )
        if self.position.shape != (len(self.row), len(last)):
            raise TranscoderError(
                f"The plan has positions of shape {tuple(self.position.shape)}, but there are {len(self.row)} patches "
                f"and {len(last)} prompts."
            )
        everywhere = self.position == ALL_POSITIONS
        beyond = (self.position < ALL_POSITIONS) | (self.position > last)
        if beyond.any():
            entry, prompt = beyond.nonzero()[0].tolist()
            raise TranscoderError(
                f"A patch is at token {int(self.position[entry, prompt])} of prompt {prompt}, which ends with token "
                f"{int(last[prompt])}."
            )
        if (everywhere.any(1) != everywhere.all(1)).any():
            raise TranscoderError("A patch is at all positions of only some prompts: use two plans.")

    def select(self, prompts: torch.Tensor) -> "PatchPlan":
        """Select the plan for some of the prompts."""
        values = None if self.values is None else self.values[:, prompts]
        return PatchPlan(
            self.num_rows, self.row, self.layer, self.component, self.head, self.position[:, prompts], values
        )
