"""Compare how well the features of several kinds of dictionaries can be explained, at one or several layers."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...dictionaries import Dictionaries, check_fits, named_dictionaries
from ...errors import TranscoderError
from ...features.collect import collect_examples, dictionary_digest
from ...features.explain.scoring import (
    FLOOR,
    rule_explainers,
    rule_scorers,
    sample_features,
    score_explanations,
)
from ...features.running_examples import ExampleSizes
from ...lm.sites import input_site
from ...lm.wrappers import measures_model
from ...text.printable import printable
from .autointerp_results import AutointerpStudy, ExplainedDictionary


#: Groups of examples that are not needed for these scores are small.
_SIZES = ExampleSizes(window=64, random_tokens=16, interval=3, silent=12, neighbors=4, same_token=6, sketch=0)


@measures_model
def autointerp_study(
    base_model: PreTrainedModel,
    methods: Mapping[str, Dictionaries],
    dataset: Iterable[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_features: int = 150,
    max_tokens: int = 500_000,
    batch_size: int = 8,
    skip_first: int = 1,
    output_dir: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AutointerpStudy:
    """
    Explain features of several kinds of dictionaries by the same rules and score them on the same text, as in Figure 2 of
    [Cunningham et al. (2023)](https://arxiv.org/abs/2309.08600).

    The paper's explainer and simulator are GPT-4 and text-davinci-003. Here, the explanation is the best combination of rules,
    chosen on training windows, so that only the order of the dictionaries can be compared with the paper, not the level.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        methods (`Mapping[str, Dictionaries]`):
            Name of a kind, such as `"SAE"` or `"PCA"` -> its dictionaries, one or several.
        dataset (`Iterable[Mapping]`):
            Rows with `input_ids`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the language model.
        num_features (`int`, *optional*, defaults to 150):
            Number of features of each dictionary, drawn at random from those that fire.
        max_tokens (`int`, *optional*, defaults to 500,000):
            Number of tokens to read, once for all dictionaries.
        batch_size (`int`, *optional*, defaults to 8):
            Number of rows per forward pass.
        skip_first (`int`, *optional*, defaults to 1):
            Number of tokens at the start of every row that do not count.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder in which examples and scores are kept, so that an interrupted study goes on.
        seed (`int`, *optional*, defaults to 0):
            Seed of the drawn rows, examples and features.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`AutointerpStudy`]

    Raises:
        [`TranscoderError`]: there are no dictionaries, one does not fit the model, or none of its features fires.
    """
    every, of_method = {}, {}
    for method, dictionaries in methods.items():
        for name, dictionary in named_dictionaries(dictionaries).items():
            every[f"{method}: {name}"] = dictionary
            of_method[f"{method}: {name}"] = (method, name)
    if not every:
        raise TranscoderError("There are no dictionaries to compare: give at least one kind.")
    check_fits(base_model, every)
    folder = None if output_dir is None else Path(output_dir)
    examples = collect_examples(
        base_model, every, dataset, tokenizer, sizes=_SIZES, max_tokens=max_tokens, batch_size=batch_size, seed=seed,
        skip_first=skip_first, special_token_ids=getattr(tokenizer, "all_special_ids", None), progress=progress,
        output_dir=None if folder is None else folder / "examples",
    )  # fmt: skip
    found = []
    for number, (key, dictionary) in enumerate(every.items()):
        method, name = of_method[key]
        if not int(examples[key].fired.sum()):
            raise TranscoderError(
                f"No feature of '{printable(key)}' fires on this text: check its sites, or leave it out."
            )
        features = sample_features(examples[key], num_features, seed)
        results = score_explanations(
            examples[key], features, rule_explainers(base_model, dictionary, tokenizer, features), rule_scorers(),
            output_dir=folder, name=f"{number:03d}_", progress=progress,
            facts={"dictionary": dictionary_digest(dictionary), "max_tokens": max_tokens, "seed": seed},
        )  # fmt: skip
        site = input_site(dictionary)
        found.append(
            ExplainedDictionary(
                method=method,
                dictionary=name,
                site=str(site),
                layer=site.layer,
                num_features=dictionary.config.num_features,
                l0=float(examples[key].density.sum()),
                results=results,
            )
        )
    protocol = {
        "language model": base_model.config.name_or_path or None,
        "tokens": next(iter(examples.values())).num_tokens,
        "windows": f"{_SIZES.window} tokens, one of each document",
        "features of each dictionary": num_features,
        "explanation": "best combination of rules, chosen on training windows",
        "floor": FLOOR,
        "seed": seed,
    }
    return AutointerpStudy(found, protocol)
