"""Which earlier features make a feature fire, found by ablation and compared with attribution edges."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.token_blocks import TokenBlocks
from ...dictionaries import find_dictionary, fitting_dictionaries
from ...errors import TranscoderError
from ...evaluation.rank_correlation import spearman_correlation
from ...features.firing_contexts import FiringContext, firing_contexts
from ...lm.modes import in_eval_mode
from ...lm.sites import input_site, output_site
from ...lm.stream import reading_stage, reads_from_stream, writes_to_stream, writing_stage
from ...lm.wrappers import measures_model
from ...models.modeling_transcoder import TranscoderModel
from .feature_ablation import ablation_drops
from .target_edges import target_edges
from .tree_results import FeatureTree, TreeNode


@measures_model
@torch.no_grad()
def feature_tree_study(
    base_model: PreTrainedModel,
    dictionaries: Mapping[str, TranscoderModel],
    dataset: Iterable[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    dictionary: str,
    feature: int,
    *,
    depth: int = 2,
    num_children: int = 3,
    num_contexts: int = 10,
    max_tokens: int = 10_000,
    batch_size: int = 8,
    skip_first: int = 1,
    special_token_ids: Iterable[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FeatureTree:
    """
    Find the features of the dictionary before that a feature depends on, and the features that those depend on.

    In contexts in which the feature has at least half of its largest activation, every feature of the closest earlier
    dictionary that is active is ablated at all tokens, and features are ranked by the mean decrease of the activation. The
    same ranking follows from one row of the attribution graph of each context, without any ablation; the rank correlation
    of both says how far its edges can be trusted as causes.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): A causal language model. Use fp32 for exact edges.
        dictionaries (`Mapping[str, TranscoderModel]`): Dictionaries of several layers that read from and write to the stream.
        dataset (`Iterable[Mapping]`): Rows with `input_ids`, as for [`TranscoderEvaluator`]. Short rows cost less.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that decodes the tokens.
        dictionary (`str`), feature (`int`): Name of a dictionary, and number of its feature at the root.
        depth (`int`, *optional*, defaults to 2): Levels below the root.
        num_children (`int`, *optional*, defaults to 3): Number of features below each.
        num_contexts (`int`, *optional*, defaults to 10): Number of contexts of each feature. The paper has 20.
        max_tokens, batch_size, skip_first, special_token_ids: Same as in [`TranscoderEvaluator`].
        seed (`int`, *optional*, defaults to 0): Seed of the draw of contexts.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        [`FeatureTree`]

    Raises:
        [`TranscoderError`]: a dictionary does not fit the model, the feature never fires, or no dictionary is before it.

    Source: Cunningham et al. (2023), arXiv 2309.08600, section 5, and its appendix for the trees.
    """
    named = fitting_dictionaries(base_model, dictionaries)
    name = find_dictionary(named, dictionary, feature)
    blocks = TokenBlocks(dataset, max_tokens=max_tokens, skip_first=skip_first, special_token_ids=special_token_ids)
    earlier = {each: dictionary_before(base_model, named, each) for each in named}
    if earlier[name] is None:
        raise TranscoderError(
            f"No dictionary writes before '{name}' reads: give dictionaries of earlier layers too, all in the same set."
        )
    tree = _Tree(base_model, named, earlier, blocks, tokenizer, num_children, num_contexts, batch_size, seed)
    with in_eval_mode(base_model, *named.values()), tqdm(desc="contexts", unit="context", disable=not progress) as bar:
        root = tree.grow(name, feature, depth, bar)
    return FeatureTree(
        root=root,
        protocol={
            "model": base_model.config.name_or_path,
            "dtype": str(base_model.dtype).removeprefix("torch."),
            "dictionaries": ", ".join(named),
            "text": f"{blocks.tokens} tokens",
            "contexts": f"up to {num_contexts} with at least half of the largest activation",
            "skip_first": skip_first,
            "seed": seed,
        },
    )


def dictionary_before(base_model: PreTrainedModel, named: Mapping[str, TranscoderModel], name: str) -> str | None:
    """Name of the dictionary that writes to the stream last before a dictionary reads it, or `None` if there is none."""
    reads = input_site(named[name])
    if not reads_from_stream(reads):
        raise TranscoderError(f"'{name}' reads '{reads}', which is not the stream: leave it out.")
    stages = {}
    for other, dictionary in named.items():
        writes = output_site(dictionary)
        if other == name or writes == reads or not writes_to_stream(writes):
            continue
        if (stage := writing_stage(base_model, writes)) <= reading_stage(base_model, reads):
            stages[other] = stage
    return max(stages, key=stages.__getitem__, default=None)


@dataclass(frozen=True)
class _Tree:
    """What all nodes of a tree share."""

    base_model: PreTrainedModel
    named: Mapping[str, TranscoderModel]
    earlier: Mapping[str, str | None]
    blocks: TokenBlocks
    tokenizer: PreTrainedTokenizerBase
    num_children: int
    num_contexts: int
    batch_size: int
    seed: int

    def grow(self, name: str, feature: int, depth: int, bar) -> TreeNode:
        """The tree of a feature."""
        contexts = self._contexts(name, [feature])[feature]
        if not contexts:
            raise TranscoderError(
                f"Feature {feature} of '{name}' is never active in the text: choose another, or give more text."
            )
        root = TreeNode(name, feature, 0, contexts[0].to_text(self.tokenizer))
        self._expand(root, contexts, depth, bar)
        return root

    def _expand(self, node: TreeNode, contexts: list[FiringContext], depth: int, bar) -> None:
        before = self.earlier[node.dictionary]
        if depth == 0 or before is None or not contexts:
            return
        size = self.named[before].config.num_features
        drops, active = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.long)
        for context in contexts:
            features, lost = ablation_drops(
                self.base_model,
                self.named[before],
                self.named[node.dictionary],
                node.feature,
                context.tokens,
                skip_first=self.blocks.skip_first,
            )
            drops[features] += lost.double() / len(contexts)
            active[features] += 1
            bar.update()
        edges = target_edges(
            self.base_model,
            {name: self.named[name] for name in (before, node.dictionary)},
            before,
            node.dictionary,
            node.feature,
            [context.tokens for context in contexts],
            self.blocks.skip_first,
        )
        ablated = active.nonzero()[:, 0]
        node.contexts, node.compared = len(contexts), len(ablated)
        node.spearman, node.p_value = spearman_correlation(drops[ablated], edges[ablated], seed=self.seed)
        mean = sum(context.activation for context in contexts) / len(contexts)
        children = ablated[drops[ablated].argsort(descending=True, stable=True)][: self.num_children]
        children = [child for child in children.tolist() if drops[child] > 0]
        examples = self._contexts(before, children)
        for child in children:
            its = examples[child]
            node.children.append(
                TreeNode(
                    dictionary=before,
                    feature=child,
                    level=node.level + 1,
                    example=its[0].to_text(self.tokenizer) if its else "",
                    drop=drops[child].item(),
                    drop_share=drops[child].item() / mean,
                    edge=edges[child].item(),
                    active=int(active[child]),
                )
            )
            self._expand(node.children[-1], its, depth - 1, bar)

    def _contexts(self, name: str, features: list[int]) -> dict[int, list[FiringContext]]:
        return firing_contexts(
            self.base_model,
            self.named[name],
            features,
            self.blocks,
            self.num_contexts,
            batch_size=self.batch_size,
            seed=self.seed,
        )
