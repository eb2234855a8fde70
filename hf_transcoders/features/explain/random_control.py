"""The control of scores: features of a language model with random weights."""

import copy

import torch
from transformers import PreTrainedModel

from ...lm.wrappers import takes_model
from ...models.configuration_transcoder import TranscoderConfig
from ...models.modeling_transcoder import TranscoderModel
from ..examples import FeatureExamples


@takes_model
@torch.no_grad()
def random_control(
    base_model: PreTrainedModel, dictionary: TranscoderModel, examples: FeatureExamples, seed: int = 0
) -> tuple[PreTrainedModel, TranscoderModel]:
    """
    A copy of a language model with random weights, and random features of it as sparse as those of a dictionary.

    Every matrix of its blocks is drawn anew, with the mean and deviation that it had; embeddings, norms and biases stay, as in the
    control of [Heap et al. (2025)](https://arxiv.org/abs/2501.17727) that keeps the embeddings. They train a dictionary on the
    random model, which scores higher than the untrained one here: for that, train one on the returned model, and score its
    examples in place of these.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): Causal language model.
        dictionary ([`TranscoderModel`]): The dictionary.
        examples ([`FeatureExamples`]): Its examples, for the mean number of active features.
        seed (`int`, *optional*, defaults to 0): Seed of all weights.

    Returns:
        `tuple[PreTrainedModel, TranscoderModel]`: the model, and a TopK dictionary of the same sites and size that was not
        trained.
    """
    devices = [base_model.device] if base_model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model = copy.deepcopy(base_model).eval()
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        embeddings = {id(each.weight) for each in ends if each is not None}
        for parameter in model.parameters():
            if parameter.dim() > 1 and id(parameter) not in embeddings:
                parameter.copy_(torch.randn_like(parameter) * parameter.std() + parameter.mean())
        sites = dictionary.config.input_site, dictionary.config.output_sites[0]
        k = max(1, min(dictionary.config.num_features, round(float(examples.density.sum()))))
        config = TranscoderConfig.for_model(
            model, *sites, num_features=dictionary.config.num_features, activation="topk", k=k
        )
        control = TranscoderModel(config).to(dictionary.device).eval()
    return model, control
