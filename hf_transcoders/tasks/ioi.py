"""Indirect object identification (Wang et al. 2022): name the indirect object after a repeated subject."""

from .prompt_encoding import PromptEncoder
from .task import Task
from .templates import Row, choose, draw_rows, fill
from .words import NAMES, words_of_split


# With the subject first ("BABA"). In the other order ("ABBA"), the two names of the first clause are swapped.
_BABA = [
    "Then, {S1} and {IO} went to the {place}. {S2} gave a {object} to",
    "Then, {S1} and {IO} had a lot of fun at the {place}. {S2} gave a {object} to",
    "Then, {S1} and {IO} were working at the {place}. {S2} decided to give a {object} to",
    "Then, {S1} and {IO} were thinking about going to the {place}. {S2} wanted to give a {object} to",
    "Then, {S1} and {IO} had a long argument, and afterwards {S2} said to",
    "After {S1} and {IO} went to the {place}, {S2} gave a {object} to",
    "When {S1} and {IO} got a {object} at the {place}, {S2} decided to give it to",
    "When {S1} and {IO} got a {object} at the {place}, {S2} decided to give the {object} to",
    "While {S1} and {IO} were working at the {place}, {S2} gave a {object} to",
    "While {S1} and {IO} were commuting to the {place}, {S2} gave a {object} to",
    "After the lunch, {S1} and {IO} went to the {place}. {S2} gave a {object} to",
    "Afterwards, {S1} and {IO} went to the {place}. {S2} gave a {object} to",
    "Then, {S1} and {IO} had a long argument. Afterwards {S2} said to",
    "The {place} {S1} and {IO} went to had a {object}. {S2} gave it to",
    "Friends {S1} and {IO} found a {object} at the {place}. {S2} gave it to",
]
_ABBA = [template.replace("{S1} and {IO}", "{IO} and {S1}") for template in _BABA]
TEMPLATES = _BABA + _ABBA

_PLACES = "store garden restaurant school hospital office house station".split()
_OBJECTS = "ring kiss bone basketball computer necklace drink snack".split()
_CORRUPTIONS = ("abc", "s2_io_flip", "s2_random", "io_other")
_TEMPLATE_NUMBERS = {"both": range(30), "baba": range(15), "abba": range(15, 30)}


def indirect_object_identification(
    tokenizer,
    size: int = 200,
    corruption: str = "abc",
    templates: str = "both",
    seed: int = 0,
    split: str | None = None,
    add_bos: bool | None = None,
) -> Task:
    """
    Make prompts with two names, such as `Then, John and Mary went to the store. John gave a drink to` -> ` Mary`, against
    ` John`.

    Positions: `IO` and `S1`, the first occurrences of the two names; `S1+1`, the token after `S1`; `S2`, the repeated
    name; and `END`. The candidates are the two names.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the language model.
        size (`int`, *optional*, defaults to 200): Number of rows. The templates take turns.
        corruption (`str`, *optional*, defaults to `"abc"`):
            The names in the corrupted prompt. `"abc"`: three new names, without repetition. `"s2_io_flip"`: the name `IO`
            at `S2`, which makes the other answer right. `"s2_random"`: a new name at `S2`. `"io_other"`: a new name at
            `IO`. Results with different corruptions are not comparable.
        templates (`str`, *optional*, defaults to `"both"`):
            Order of the names: `"baba"` (numbers 0 to 14), `"abba"` (15 to 29) or `"both"`.
        seed (`int`, *optional*, defaults to 0): Seed for the rows.
        split (`str`, *optional*): `"train"`, `"validation"` or `"test"`, which share no names. By default all names are used.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token. The default is that of the tokenizer.

    Returns:
        [`Task`]

    Raises:
        [`TranscoderError`]: an argument is unknown, or the tokenizer has too few names, places or objects that are single
            tokens.

    Source: [Interpretability in the Wild](https://arxiv.org/abs/2211.00593).
    """
    choose("corruption", corruption, _CORRUPTIONS)
    choose("order of templates", templates, _TEMPLATE_NUMBERS)
    encoder = PromptEncoder(tokenizer, add_bos)
    names = list(encoder.require(words_of_split(NAMES, split), 5, "first names"))
    places = list(encoder.require(_PLACES, 1, "places"))
    objects = list(encoder.require(_OBJECTS, 1, "objects"))
    numbers = _TEMPLATE_NUMBERS[templates]

    def draw(random, index):
        number = numbers[index % len(numbers)]
        io, s, *fresh = random.sample(names, 5)
        words = {"place": random.choice(places), "object": random.choice(objects)}
        changed = {
            "abc": {"IO": fresh[0], "S1": fresh[1], "S2": fresh[2]},
            "s2_io_flip": {"S2": io},
            "s2_random": {"S2": fresh[0]},
            "io_other": {"IO": fresh[0]},
        }[corruption]
        named = {"IO": io, "S1": s, "S2": s}
        return Row(
            clean=_prompt(number, words | named),
            corrupted=_prompt(number, words | named | changed),
            answers=[f" {io}"],
            wrong_answers=[f" {s}"],
            template=number,
            metadata={"io": io, "s": s, "order": "BABA" if number < 15 else "ABBA"},
        )

    return Task.from_rows(
        encoder,
        draw_rows(size, seed, draw),
        name="ioi",
        description="Indirect object identification: the name that occurs once, against the repeated name.",
        settings={"corruption": corruption, "templates": templates, "seed": seed, "split": split},
    )


def _prompt(number, words):
    prompt = fill(TEMPLATES[number], words)
    for name in ("place", "object"):
        prompt.spans.pop(name, None)
    # The first name is followed by one short word, " and" or a verb.
    begin = prompt.spans["S1"][1]
    prompt.spans["S1+1"] = (begin, prompt.text.index(" ", begin + 1))
    return prompt
