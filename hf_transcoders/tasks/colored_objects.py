"""Colored Objects (Merullo et al. 2024): name the color of the object in question."""

from ..errors import TranscoderError
from .prompt_encoding import PromptEncoder
from .task import Task
from .templates import Row, draw_rows, fill
from .words import in_split


_OBJECTS = (
    "pencil notebook pen cup plate jug mug puzzle textbook leash necklace bracelet bottle ball envelope lighter bowl"
).split()
_COLORS = "red orange yellow green blue purple brown black".split()
_SURFACES = "table desk floor".split()
_OPENINGS = ["there is", "you see", "I see"]

_LIST = (
    "Q: On the {surface}, {opening} {a_1} {colour_1} {object_1}, {a_2} {colour_2} {object_2}, and {a_3} {colour_3} "
    "{object_3}. What color is the {question_object}?\nA:"
)
_SHOT = _LIST.replace("{", "{shot_") + " {shot_answer}\n"
_POSITIONS = {f"{what}_{k}" for what in ("colour", "object") for k in (1, 2, 3)} | {"question_object", "shot_answer"}


def colored_objects(
    tokenizer, size: int = 200, seed: int = 0, split: str | None = None, add_bos: bool | None = None
) -> Task:
    """
    Make prompts with one solved example and one question, such as `Q: On the desk, I see a blue pen, a black cup, and a
    red ball. What color is the cup?\\nA:` -> ` Black`. The corrupted prompt asks for another object of the same list, and
    its answer is the wrong answer. The example shares no colors or objects with the question.

    Positions: `colour_1` ... `colour_3` and `object_1` ... `object_3` in the list of the question; among them
    `answer_colour`, `answer_object`, `wrong_colour_1` and `wrong_colour_2`; `question_object`, the object in
    question; `shot_answer`, the answer of the example; and `END`. The candidates are the three listed colors.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the language model.
        size (`int`, *optional*, defaults to 200): Number of rows.
        seed (`int`, *optional*, defaults to 0): Seed for the rows.
        split (`str`, *optional*):
            `"train"`, `"validation"` or `"test"`, which share no combination of color and object. By default all
            combinations are used.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token. The default is that of the tokenizer.

    Returns:
        [`Task`]

    Raises:
        [`TranscoderError`]: the tokenizer has too few colors or objects that are single tokens.

    Source: [Circuit Component Reuse Across Tasks in Transformer Language Models](https://arxiv.org/abs/2310.08744).
    """
    encoder = PromptEncoder(tokenizer, add_bos)
    objects = list(encoder.require(_OBJECTS, 6, "objects"))
    titles = encoder.require([color.title() for color in _COLORS], 6, "color names in title case", context="A:")
    colors = [color for color in encoder.require(_COLORS, 6, "colors") if color.title() in titles]
    things = [
        (color, thing)
        for color in colors
        for thing in objects
        if in_split(_COLORS.index(color) + _OBJECTS.index(thing), split)
    ]

    def draw(random, index):
        listed = _six_things(random, things)
        asked, other, left = random.sample(range(3), 3)
        shot_asked = random.randrange(3)
        shot = _words(random, listed[:3])
        words = {f"shot_{name}": word for name, word in shot.items()} | _words(random, listed[3:])
        words["shot_question_object"] = listed[shot_asked][1]
        words["shot_answer"] = listed[shot_asked][0].title()
        roles = {"answer_object": f"object_{asked + 1}", "answer_colour": f"colour_{asked + 1}"}
        roles |= {f"wrong_colour_{n}": f"colour_{k + 1}" for n, k in enumerate(sorted([other, left]), 1)}
        query = listed[3:]
        answers = [f" {color.title()}" for color, _ in query]
        return Row(
            clean=_prompt(words | {"question_object": query[asked][1]}, roles),
            corrupted=_prompt(words | {"question_object": query[other][1]}, roles),
            answers=[answers[asked]],
            wrong_answers=[answers[other]],
            candidates=answers,
            metadata={"asked": asked + 1, "corrupted_asked": other + 1},
        )

    return Task.from_rows(
        encoder,
        draw_rows(size, seed, draw),
        name="colored-objects",
        description="Colored Objects: the color of the object in question, against that of another object in the list.",
        settings={"corruption": "other_object", "seed": seed, "split": split},
    )


def _six_things(random, things):
    """Draw six pairs of color and object without repeated colors or objects."""
    for _ in range(1000):
        chosen = []
        for color, thing in random.sample(things, len(things)):
            if all(color != other and thing != another for other, another in chosen):
                chosen.append((color, thing))
                if len(chosen) == 6:
                    return chosen
    raise TranscoderError(
        "The tokenizer has too few single-token colors and objects for this split: leave out the split."
    )


def _words(random, things):
    words = {"surface": random.choice(_SURFACES), "opening": random.choice(_OPENINGS)}
    for k, (color, thing) in enumerate(things, 1):
        words |= {f"a_{k}": "an" if color[0] in "aeiou" else "a", f"colour_{k}": color, f"object_{k}": thing}
    return words


def _prompt(words, roles):
    prompt = fill(_SHOT + _LIST, words)
    for name in prompt.spans.keys() - _POSITIONS:
        del prompt.spans[name]
    prompt.spans.update({role: prompt.spans[name] for role, name in roles.items()})
    return prompt
