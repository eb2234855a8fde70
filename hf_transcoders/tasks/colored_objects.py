"""Colored Objects (Merullo et al. 2024): which colour had the thing that is asked for."""

from ..errors import TranscoderError
from .prompt_encoding import PromptEncoder
from .task import Task
from .templates import Row, draw_rows, fill
from .words import in_split


_OBJECTS = (
    "pencil notebook pen cup plate jug mug puzzle textbook leash necklace bracelet bottle ball envelope lighter bowl"
).split()
_COLOURS = "red orange yellow green blue purple brown black".split()
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
    One solved example and one question, such as `Q: On the desk, I see a blue pen, a black cup, and a red ball. What
    color is the cup?\\nA:` -> ` Black`. The corrupted prompt asks for another thing of the same list, and its answer is
    what the right one is measured against. The example shares neither colours nor things with the question.

    Positions: `colour_1` ... `colour_3` and `object_1` ... `object_3` in the list of the question; among them
    `answer_colour`, `answer_object`, `wrong_colour_1` and `wrong_colour_2`; `question_object`, the thing asked for;
    `shot_answer`, the answer of the example; and `END`. The candidates are the three colours listed.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the base model.
        size (`int`, *optional*, defaults to 200): Rows.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same rows.
        split (`str`, *optional*):
            `"train"`, `"validation"` or `"test"`, in which no thing has the same colour as in another; everything if left
            out.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token; by default as the tokenizer does.

    Returns:
        [`Task`]

    Raises:
        [`TranscoderError`]: The tokenizer has too few colours or objects of one token.

    Source: [Circuit Component Reuse Across Tasks in Transformer Language Models](https://arxiv.org/abs/2310.08744).
    """
    encoder = PromptEncoder(tokenizer, add_bos)
    objects = list(encoder.require(_OBJECTS, 6, "objects"))
    titles = encoder.require([colour.title() for colour in _COLOURS], 6, "colour names in title case", context="A:")
    colours = [colour for colour in encoder.require(_COLOURS, 6, "colours") if colour.title() in titles]
    things = [
        (colour, thing)
        for colour in colours
        for thing in objects
        if in_split(_COLOURS.index(colour) + _OBJECTS.index(thing), split)
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
        answers = [f" {colour.title()}" for colour, _ in query]
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
        description="Colored Objects: the colour of the thing asked for, against that of another thing of the list.",
        settings={"corruption": "other_object", "seed": seed, "split": split},
    )


def _six_things(random, things):
    """Six pairs of colour and object in which nothing comes twice."""
    for _ in range(1000):
        chosen = []
        for colour, thing in random.sample(things, len(things)):
            if all(colour != other and thing != another for other, another in chosen):
                chosen.append((colour, thing))
                if len(chosen) == 6:
                    return chosen
    raise TranscoderError(
        "The tokenizer has too few colours and objects of one token for this split: leave out the split."
    )


def _words(random, things):
    words = {"surface": random.choice(_SURFACES), "opening": random.choice(_OPENINGS)}
    for k, (colour, thing) in enumerate(things, 1):
        words |= {f"a_{k}": "an" if colour[0] in "aeiou" else "a", f"colour_{k}": colour, f"object_{k}": thing}
    return words


def _prompt(words, roles):
    prompt = fill(_SHOT + _LIST, words)
    for name in prompt.spans.keys() - _POSITIONS:
        del prompt.spans[name]
    prompt.spans.update({role: prompt.spans[name] for role, name in roles.items()})
    return prompt
