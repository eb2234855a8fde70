"""Subject-verb agreement: a singular or a plural verb, with or without a noun before it."""

from ..errors import TranscoderError
from .prompt_encoding import PromptEncoder
from .task import Task
from .templates import Row, choose, draw_rows, fill
from .words import words_of_split


_TEMPLATES = {
    "simple": "The {subject}",
    "prepositional": "The {subject} near the {attractor}",
    "relative": "The {subject} that the {attractor} {inner_verb}",
    "within_relative": "The {attractor} that the {subject}",
}
_NOUNS = (
    "author teacher doctor lawyer student driver farmer singer writer manager officer soldier player artist worker actor "
    "engineer leader neighbor parent king queen boy girl cousin brother sister uncle friend senator guard pilot dancer "
    "minister judge customer"
).split()
_VERBS = [("is", "are"), ("was", "were"), ("has", "have"), ("does", "do")]
_INNER_VERBS = [("likes", "like"), ("knows", "know"), ("sees", "see"), ("helps", "help"), ("loves", "love")]


def subject_verb_agreement(
    tokenizer,
    size: int = 200,
    structure: str = "prepositional",
    seed: int = 0,
    split: str | None = None,
    add_bos: bool | None = None,
) -> Task:
    """
    Make prompts that end before a verb, such as `The author near the guards` -> ` is`, ` was`, ` has` or ` does`, against
    the plural verbs. The corrupted prompt differs only in the number of the subject.

    Positions: `subject`, `END` and, except in `"simple"`, `attractor`, a noun of the opposite number to the clean subject.
    The default metric is the probability difference.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the language model.
        size (`int`, *optional*, defaults to 200): Number of rows. Half of the subjects are plural.
        structure (`str`, *optional*, defaults to `"prepositional"`):
            `"simple"` (`The author`), `"prepositional"`, `"relative"` (`The author that the guards like`) or
            `"within_relative"` (`The guards that the author`, where the verb belongs to the second noun).
        seed (`int`, *optional*, defaults to 0): Seed for the rows.
        split (`str`, *optional*): `"train"`, `"validation"` or `"test"`, which share no nouns. By default all nouns are used.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token. The default is that of the tokenizer.

    Returns:
        [`Task`]

    Raises:
        [`TranscoderError`]: the structure is unknown, or the tokenizer has too few nouns or verbs whose singular and
            plural are both single tokens.
    """
    choose("structure", structure, _TEMPLATES)
    encoder = PromptEncoder(tokenizer, add_bos)
    nouns = _both_numbers(encoder, [(noun, noun + "s") for noun in words_of_split(_NOUNS, split)], 2, "nouns")
    verbs = _both_numbers(encoder, _VERBS, 1, "verbs")
    inner = _both_numbers(encoder, _INNER_VERBS, 1, "verbs") if structure == "relative" else _INNER_VERBS

    def draw(random, index):
        number = index % 2
        subject, attractor = random.sample(nouns, 2)
        words = {"attractor": attractor[1 - number], "inner_verb": random.choice(inner)[1 - number]}
        prompts = [fill(_TEMPLATES[structure], words | {"subject": subject[n]}) for n in (number, 1 - number)]
        for prompt in prompts:
            prompt.spans.pop("inner_verb", None)
        return Row(
            *prompts,
            answers=[f" {verb[number]}" for verb in verbs],
            wrong_answers=[f" {verb[1 - number]}" for verb in verbs],
            metadata={"number": ("singular", "plural")[number]},
        )

    return Task.from_rows(
        encoder,
        draw_rows(size, seed, draw),
        name="subject-verb-agreement",
        description="Subject-verb agreement: verbs in the number of the subject, against verbs in the other number.",
        metric="probability_difference",
        settings={"corruption": "other_number", "structure": structure, "seed": seed, "split": split},
    )


def _both_numbers(encoder, pairs, needed, what):
    known = encoder.single_tokens(word for pair in pairs for word in pair)
    found = [pair for pair in pairs if all(word in known for word in pair)]
    if len(found) < needed:
        raise TranscoderError(
            f"The tokenizer {encoder.name} writes {len(found)} of "
            f"{len(pairs)} {what} as single tokens in singular and plural, but the task needs {needed}: choose another "
            "task or model."
        )
    return found
