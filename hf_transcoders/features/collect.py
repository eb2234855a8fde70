"""Read text once, and collect the examples and counts of all features of one or several dictionaries."""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.token_blocks import BlockBatch
from ..dictionaries import Dictionaries, check_fits, may_be_same_model, named_dictionaries
from ..errors import TranscoderError
from ..files import atomic_file, remove_leftovers
from ..fingerprint import differences, digest_of, new_hash, tensor_digest
from ..lm.capture import capture
from ..lm.inputs import check_tokens
from ..lm.model_fingerprint import model_facts
from ..lm.modes import in_eval_mode
from ..lm.sites import Site, input_site
from ..lm.wrappers import measures_model
from ..models.modeling_transcoder import TranscoderModel
from ..text.printable import printable
from ..text.strict_json import parse_json, to_json
from .example_files import EXAMPLES_NAME, load_examples, read_example_facts, save_examples
from .examples import ExampleText, FeatureExamples
from .running_examples import ExampleSizes, RunningExamples
from .text_sample import TextSample, sample_text


# Elements of the largest temporary, the features of some blocks.
_MAX_ELEMENTS = 2**23
_STATE_NAME = "feature_examples.partial.safetensors"


@measures_model
@torch.no_grad()
def collect_examples(
    base_model: PreTrainedModel,
    dictionaries: Dictionaries,
    dataset: Iterable[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sizes: ExampleSizes | None = None,
    max_tokens: int = 1_000_000,
    batch_size: int = 8,
    skip_first: int = 1,
    special_token_ids: Sequence[int] | None = None,
    seed: int = 0,
    output_dir: str | os.PathLike | None = None,
    save_seconds: float = 120.0,
    progress: bool = True,
) -> dict[str, FeatureExamples]:
    """
    Collect the examples and counts of all features of dictionaries in one pass over text.

    Memory is fixed for each feature, however long the text is. All examples of a group are from different documents and
    have different contexts.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        dictionaries ([`TranscoderModel`], [`TranscoderSet`], a mapping from name to dictionary, or a list):
            Dictionaries, which share the forward passes of the language model.
        dataset (`Iterable[Mapping]`):
            Rows with `input_ids` and, if they are padded, `attention_mask`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the text, whose end-of-sequence token ends documents.
        sizes ([`ExampleSizes`], *optional*):
            What is kept of each feature.
        max_tokens (`int`, *optional*, defaults to 1,000,000):
            Number of tokens to read, in rows drawn from all of the dataset.
        batch_size (`int`, *optional*, defaults to 8):
            Number of rows per forward pass.
        skip_first (`int`, *optional*, defaults to 1):
            Number of tokens at the start of every row whose activations do not count.
        special_token_ids (`Sequence[int]`, *optional*):
            Tokens whose activations do not count.
        seed (`int`, *optional*, defaults to 0):
            Seed of the drawn rows and of all random examples.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder in which the examples are saved. A pass into it that was interrupted goes on where it was saved last, with
            the same result, bit for bit, as without interruption, and a complete one is read instead of repeated.
        save_seconds (`float`, *optional*, defaults to 120):
            Seconds between saves of an unfinished pass.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `dict[str, FeatureExamples]`: examples by name of the dictionary.

    Raises:
        [`TranscoderError`]: the dictionaries or the tokenizer do not fit the model, there is no text, or the unfinished pass in `output_dir`
            has other settings.
    """
    sizes = sizes or ExampleSizes()
    for name, value, least in (("batch_size", batch_size, 1), ("window", sizes.window, 1), ("top", sizes.top, 1)):
        if value < least:
            raise TranscoderError(f"`{name}` is {value}; give at least {least}.")
    named = named_dictionaries(dictionaries)
    if not named:
        raise TranscoderError("There are no dictionaries: give at least one.")
    check_fits(base_model, named)
    check_tokenizer(base_model, tokenizer)
    sample = sample_text(
        dataset,
        max_tokens=max_tokens,
        skip_first=skip_first,
        special_token_ids=special_token_ids,
        separator=getattr(tokenizer, "eos_token_id", None),
        seed=seed,
    )
    check_tokens(base_model, sample.blocks.texts, "Row", sample.rows)
    with in_eval_mode(base_model, *named.values()):
        running = {
            name: RunningExamples(range(dictionary.config.num_features), dictionary, sample, sizes)
            for name, dictionary in named.items()
        }
        settings = {"sizes": asdict(sizes), "batch_size": batch_size, "skip_first": skip_first, "seed": seed}
        facts = example_facts(base_model, named, tokenizer, sample, settings)
        if output_dir is not None and Path(output_dir, EXAMPLES_NAME).exists():
            if not differences(read_example_facts(output_dir), facts):
                return load_examples(output_dir)
        unfinished = None if output_dir is None else _Unfinished(Path(output_dir), facts, running, save_seconds)
        read_all(base_model, running, sample, batch_size, unfinished=unfinished, progress=progress)
    text = ExampleText.of(sample)
    found = {name: FeatureExamples.of(each, text) for name, each in running.items()}
    if output_dir is not None:
        save_examples(found, output_dir, facts)
        unfinished.remove()
    return found


def check_tokenizer(base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that is, by its name, that of another model."""
    theirs, ours = getattr(tokenizer, "name_or_path", None), base_model.config.name_or_path
    if not may_be_same_model(theirs, ours):
        raise TranscoderError(
            f"The tokenizer is that of {printable(theirs)}, and the language model is {printable(ours)}: give the tokenizer of the "
            "model, or, if both have the same, set `tokenizer.name_or_path`."
        )


def read_all(
    base_model: PreTrainedModel,
    running: Mapping[str, RunningExamples],
    sample: TextSample,
    batch_size: int,
    *,
    unfinished: "_Unfinished | None" = None,
    progress: bool = True,
) -> None:
    """Run the language model on all blocks of a sample, and take in the activations of the features of dictionaries."""
    steps = -(-len(sample.blocks.texts) // batch_size)
    done = 0 if unfinished is None else unfinished.restore()
    bar = tqdm(sample.blocks.batches(base_model, batch_size), "features", steps, disable=not progress)
    for number, batch in enumerate(bar):
        if number < done:
            continue
        inputs = dictionary_inputs(base_model, [each.dictionary for each in running.values()], batch)
        for each in running.values():
            for part, rows, mask in _split(inputs[input_site(each.dictionary)], batch, each):
                each.update(_activations(each, part, mask), rows, mask)
        if unfinished is not None:
            unfinished.save(number + 1)


def dictionary_inputs(
    base_model: PreTrainedModel, dictionaries: Iterable[TranscoderModel], batch: BlockBatch
) -> dict[Site, torch.Tensor]:
    """Inputs `(blocks, seq, d_in)` of several dictionaries by site, from one forward pass."""
    sites = {input_site(dictionary) for dictionary in dictionaries}
    with capture(base_model, sites) as captured:
        base_model(**batch.inputs)
        return {site: captured.of_tokens(site, batch.input_ids.shape) for site in captured}


def _split(read, batch, running):
    """Inputs, numbers and masks of a few blocks at a time."""
    some = max(1, _MAX_ELEMENTS // (read.shape[1] * running.dictionary.config.num_features))
    return zip(read.split(some), torch.tensor(batch.numbers).split(some), batch.mask.split(some), strict=True)


def _activations(running, part, mask):
    """Activations `(blocks, seq, features)` of the features that are collected, 0 on tokens that do not count."""
    dictionary = running.dictionary
    activations = dictionary.encode(part.to(dictionary.device)).float()
    if len(running.features) != dictionary.config.num_features:
        activations = activations[..., running.features]
    return activations.masked_fill_(~mask.to(activations.device)[..., None], 0)


def example_facts(
    base_model: PreTrainedModel,
    named: Mapping[str, TranscoderModel],
    tokenizer: PreTrainedTokenizerBase,
    sample: TextSample,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides about the result of a pass, as JSON data for [`~hf_transcoders.fingerprint.differences`]."""
    text = new_hash()
    for row, mask in zip(sample.blocks.texts, sample.blocks.masks, strict=True):
        text.update(len(row).to_bytes(8, "little") + row.numpy().tobytes() + mask.numpy().tobytes())
    facts = {
        "base_model": {"name": base_model.config.name_or_path or None, **model_facts(base_model)},
        "dictionaries": {name: dictionary_digest(dictionary) for name, dictionary in named.items()},
        "tokenizer": tokenizer_digest(tokenizer),
        "text": digest_of(text),
        "settings": dict(settings),
    }
    return json.loads(to_json(facts))


def dictionary_digest(dictionary: TranscoderModel) -> str:
    """The digest of what a dictionary computes: its weights, its activation function and its sites."""
    config = dictionary.config
    settings = [config.activation, config.k, config.tied, config.normalization, config.input_site, config.output_sites]
    return digest_of([settings, {name: tensor_digest(each) for name, each in dictionary.state_dict().items()}])


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The digest of the vocabulary of a tokenizer."""
    return digest_of(sorted(tokenizer.get_vocab().items()))


class _Unfinished:
    """The saved state of a pass that may be interrupted.

    Args:
        folder (`Path`): Folder of the pass.
        facts (`dict[str, Any]`): What decides about its result.
        running (`Mapping[str, RunningExamples]`): What is collected, by name.
        save_seconds (`float`): Seconds between saves.
    """

    def __init__(
        self, folder: Path, facts: dict[str, Any], running: Mapping[str, RunningExamples], save_seconds: float
    ):
        self.path = folder / _STATE_NAME
        self.facts, self.save_seconds, self.saved_at = facts, save_seconds, time.monotonic()
        self.state = {
            f"{number}.{name}": tensor
            for number, each in enumerate(running.values())
            for name, tensor in each.state().items()
        }

    def restore(self) -> int:
        """Read the state, if there is one, and give the number of batches that are done."""
        if not self.path.exists():
            return 0
        damaged = TranscoderError(
            f"{printable(self.path)} is damaged, so that the pass cannot go on: remove the file to start again."
        )
        try:
            with safe_open(self.path, "pt") as tensors:
                header = parse_json((tensors.metadata() or {}).get("pass", ""), str(self.path))
                saved = {name: tensors.get_tensor(name) for name in tensors.keys()}
        except (SafetensorError, OSError, TranscoderError) as error:
            raise damaged from error
        if not isinstance(facts := header.get("facts"), dict):
            raise damaged
        if differ := differences(facts, self.facts):
            raise TranscoderError(
                f"{printable(self.path)} is of an unfinished pass with {'; '.join(differ[:3])}: repeat its settings, "
                "or remove the file."
            )
        done = header.get("done")
        fits = saved.keys() == self.state.keys() and all(
            saved[name].shape == tensor.shape and saved[name].dtype == tensor.dtype
            for name, tensor in self.state.items()
        )
        if not fits or type(done) is not int or done < 0:
            raise damaged
        for name, tensor in self.state.items():
            tensor.copy_(saved[name])
        return done

    def save(self, done: int) -> None:
        """Save the state after a number of batches, if the last save is some time ago."""
        if time.monotonic() - self.saved_at < self.save_seconds:
            return
        header = {"pass": to_json({"facts": self.facts, "done": done}, indent=None)}
        with atomic_file(self.path) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in self.state.items()}, partial, header)
        self.saved_at = time.monotonic()

    def remove(self) -> None:
        """Remove the state of a pass that is complete."""
        self.path.unlink(missing_ok=True)
        remove_leftovers(self.path.parent, _STATE_NAME)
