"""Find the largest activations of features, and where in the text they are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.token_blocks import BlockBatch, TokenBlocks
from ..data.token_texts import token_texts
from ..lm.capture import capture
from ..lm.modes import in_eval_mode
from ..lm.sites import Site, input_site
from ..lm.wrappers import measures_model
from ..models.modeling_transcoder import TranscoderModel
from .activation_histograms import RunningHistograms


# Elements of the largest temporary, the features of some blocks.
_MAX_ELEMENTS = 2**23


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
    running = {name: RunningTop(range(d.config.num_features), num_contexts, d) for name, d in dictionaries.items()}
    with in_eval_mode(base_model, *dictionaries.values()):
        for batch in blocks.batches(base_model, batch_size):
            update_all(running, base_model, batch)
    return {name: TopActivations(t.values.cpu(), t.rows.cpu(), t.positions.cpu()) for name, t in running.items()}


class RunningTop:
    """The top activations of some features of one dictionary so far, at most one per block.

    Args:
        features (`Iterable[int]`): Numbers of the features.
        k (`int`): Number of activations to keep for each of them.
        dictionary ([`TranscoderModel`]): The dictionary.
    """

    def __init__(self, features: Iterable[int], k: int, dictionary: TranscoderModel):
        self.features = list(features)
        self.dictionary, device = dictionary, dictionary.device
        shape = (k, len(self.features))
        self.values = torch.zeros(shape, device=device)
        self.rows = torch.zeros(shape, dtype=torch.long, device=device)
        self.positions = torch.zeros(shape, dtype=torch.long, device=device)
        self.fired = torch.zeros(shape[1], dtype=torch.long, device=device)
        self.total = torch.zeros(shape[1], device=device)
        # Set by callers that want histograms too.
        self.histograms: RunningHistograms | None = None

    def update(self, activations, rows):
        """Take in the activations `(blocks, seq, features)` in the blocks numbered `rows (blocks,)`."""
        self.fired += activations.count_nonzero((0, 1))
        self.total += activations.sum((0, 1))
        if self.histograms is not None:
            self.histograms.update(activations)
        values, positions = activations.max(1)
        self._keep(values, rows.to(values.device).unsqueeze(-1).expand_as(positions), positions)

    def _keep(self, values, rows, positions):
        """Take in the largest activation of each feature in each block, `(blocks, features)`, and where it is."""
        self.values, order = torch.cat([self.values, values]).topk(len(self.values), dim=0)
        self.rows = torch.cat([self.rows, rows]).gather(0, order)
        self.positions = torch.cat([self.positions, positions]).gather(0, order)

    def choose(self, count: int | None) -> list[int]:
        """Indices into `features` of the active ones, from frequent to rare: all, or `count` evenly spaced ones, if possible
        of those with all their contexts."""
        order = self.fired.argsort(descending=True, stable=True)
        firing = order[self.fired[order] > 0]
        if count is None or len(firing) <= count:
            return firing.tolist()
        full = firing[self.values[-1, firing] > 0]
        candidates = full if len(full) >= count else firing
        return candidates[torch.linspace(0, len(candidates) - 1, count, device=order.device).round().long()].tolist()


def update_all(running: Mapping[str, RunningTop], base_model: PreTrainedModel, batch: BlockBatch) -> None:
    """Run a batch once and take in the activations of every dictionary."""
    inputs = dictionary_inputs(base_model, [top.dictionary for top in running.values()], batch)
    for top in running.values():
        for rows, activations in feature_activations(top.dictionary, inputs, batch, top.features):
            top.update(activations, rows)


def dictionary_inputs(
    base_model: PreTrainedModel, dictionaries: Iterable[TranscoderModel], batch: BlockBatch
) -> dict[Site, torch.Tensor]:
    """Inputs `(blocks, seq, d_in)` of several dictionaries by site, from one forward pass."""
    sites = {input_site(dictionary) for dictionary in dictionaries}
    with capture(base_model, sites) as captured:
        base_model(**batch.inputs)
        return {site: captured.of_tokens(site, batch.input_ids.shape) for site in captured}


def feature_activations(
    dictionary: TranscoderModel, inputs: Mapping[Site, torch.Tensor], batch: BlockBatch, features: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Activations of some features, a few blocks at a time: the numbers of the blocks `(blocks,)` and the activations
    `(blocks, seq, features)`, which are 0 on tokens that do not count."""
    rows = torch.tensor(batch.numbers)
    read = inputs[input_site(dictionary)].to(dictionary.device)
    some = max(1, _MAX_ELEMENTS // (read.shape[1] * dictionary.config.num_features))
    every = features == list(range(dictionary.config.num_features))
    for part, part_rows, mask in zip(read.split(some), rows.split(some), batch.mask.split(some), strict=True):
        activations = dictionary.encode(part).float()
        if not every:
            activations = activations[..., features]
        yield part_rows, activations.where(mask.to(activations.device).unsqueeze(-1), 0)
