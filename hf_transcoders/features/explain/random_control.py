"""The control of scores: features of a language model with random weights."""

import torch
from transformers import PreTrainedModel

from ...lm.wrappers import takes_model
from ...models.configuration_transcoder import TranscoderConfig
from ...models.modeling_transcoder import TranscoderModel
from ..examples import FeatureExamples


@takes_model
def random_control(
    base_model: PreTrainedModel, dictionary: TranscoderModel, examples: FeatureExamples, seed: int = 0
) -> tuple[PreTrainedModel, TranscoderModel]:
    """
    A language model of the same architecture with random weights, and random features of it as sparse as those of a dictionary.

    Random transformers pass on which token they read, so that explanations by tokens score well on them. What a score means is
    seen only beside theirs.

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
        model = type(base_model)(base_model.config).to(base_model.device, base_model.dtype).eval()
        sites = dictionary.config.input_site, dictionary.config.output_sites[0]
        k = max(1, min(dictionary.config.num_features, round(float(examples.density.sum()))))
        config = TranscoderConfig.for_model(
            model, *sites, num_features=dictionary.config.num_features, activation="topk", k=k
        )
        control = TranscoderModel(config).to(dictionary.device).eval()
    return model, control
