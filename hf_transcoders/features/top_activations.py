"""Find the largest activations of features, and where in the text they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.token_blocks import TokenBlocks
from ..data.token_texts import token_texts
from ..lm.modes import in_eval_mode
from ..lm.wrappers import measures_model
from ..models.modeling_transcoder import TranscoderModel
from .collect import read_all
from .running_examples import ExampleSizes, RunningExamples
from .text_sample import whole_text


@dataclass
class TopActivations:
    """The largest activations of each feature of a dictionary: enough to label a feature later, without the model.

    Args:
        values (`torch.Tensor` of shape `(num_contexts, num_features)`):
            Largest activations in descending order, at most one per block; 0 where a feature fires in fewer blocks.
        rows, positions (`torch.LongTensor` of shape `(num_contexts, num_features)`): Their blocks and positions.
    """

    values: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor

    def label(
        self, feature: int, texts: Sequence[torch.Tensor], tokenizer: PreTrainedTokenizerBase, window: int = 6
    ) -> str | None:
        """Label a feature by the tokens with its top activations, and the context of the first of them.

        Args:
            feature (`int`): Number of the feature.
            texts (`Sequence[torch.LongTensor]`): Tokens of each block that was searched.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that decodes the tokens.
            window (`int`, *optional*, defaults to 6): Number of tokens shown on each side of the activation.

        Returns:
            `str`, or `None` if the feature never fired. The token of the top activation is in `[[ ]]`.
        """
        places = [
            (row, position)
            for value, row, position in zip(
                *(tensor[:, feature].tolist() for tensor in (self.values, self.rows, self.positions)), strict=True
            )
            if value > 0
        ]
        if not places:
            return None
        tokens = dict.fromkeys(token_texts(tokenizer, [int(texts[row][position]) for row, position in places]))
        row, position = places[0]
        start = max(0, position - window)
        context = token_texts(tokenizer, texts[row][start : position + window + 1].tolist())
        context[position - start] = f"[[{context[position - start]}]]"
        return (", ".join(map(repr, tokens)) + ": " + "".join(context)).replace("\n", "⏎")


@measures_model
@torch.no_grad()
def find_top_activations(
    base_model: PreTrainedModel,
    dictionaries: Mapping[str, TranscoderModel],
    blocks: TokenBlocks,
    *,
    num_contexts: int = 3,
    batch_size: int = 8,
) -> dict[str, TopActivations]:
    """Find the top activations of every feature of several dictionaries, on the same forward passes.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): Causal language model.
        dictionaries (`Mapping[str, TranscoderModel]`): Dictionaries by name.
        blocks ([`TokenBlocks`]): Blocks to search.
        num_contexts (`int`, *optional*, defaults to 3): Number of activations to keep for each feature.
        batch_size (`int`, *optional*, defaults to 8): Number of blocks per forward pass.

    Returns:
        `dict[str, TopActivations]`: top activations by dictionary, on the CPU.
    """
    sample = whole_text(blocks)
    sizes = ExampleSizes(
        top=num_contexts, random_tokens=0, random_windows=0, interval=0, silent=0, neighbors=0, same_token=0, sketch=0
    )
    running = {
        name: RunningExamples(range(dictionary.config.num_features), dictionary, sample, sizes)
        for name, dictionary in dictionaries.items()
    }
    with in_eval_mode(base_model, *dictionaries.values()):
        read_all(base_model, running, sample, batch_size, progress=False)
    tops = {name: each.groups["top"] for name, each in running.items()}
    return {
        name: TopActivations(
            *(tensor.T.contiguous().cpu() for tensor in (top.values, top.rows.long(), top.positions.long()))
        )
        for name, top in tops.items()
    }
