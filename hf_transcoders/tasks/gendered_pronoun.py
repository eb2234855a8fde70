"""Gendered pronoun: he or she after a first name."""

from .prompt_encoding import PromptEncoder
from .task import Task
from .templates import Row, draw_rows, fill
from .words import FEMALE_NAMES, MALE_NAMES, words_of_split


_TEMPLATES = [
    "So {name} is a really good friend, isn't",
    "Yesterday {name} left the party early because",
    "My neighbour {name} smiled at us when",
    "Everyone who knows {name} says that",
    "The teacher asked {name} a question, but",
    "Last week {name} went to the doctor, and",
]


def gendered_pronoun(
    tokenizer, size: int = 200, seed: int = 0, split: str | None = None, add_bos: bool | None = None
) -> Task:
    """
    Make prompts with a first name, such as `Yesterday Mary left the party early because` -> ` she`, against ` he`. The
    corrupted prompt has a name of the other gender.

    Positions: `name` and `END`. The candidates are the two pronouns.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the language model.
        size (`int`, *optional*, defaults to 200): Number of rows. Half of the names are female.
        seed (`int`, *optional*, defaults to 0): Seed for the rows.
        split (`str`, *optional*): `"train"`, `"validation"` or `"test"`, which share no names. By default all names are used.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token. The default is that of the tokenizer.

    Returns:
        [`Task`]

    Raises:
        [`TranscoderError`]: the pronouns or too many names are not single tokens.
    """
    encoder = PromptEncoder(tokenizer, add_bos)
    encoder.require(["he", "she"], 2, "pronouns")
    names = {
        "he": list(encoder.require(words_of_split(MALE_NAMES, split), 1, "male first names")),
        "she": list(encoder.require(words_of_split(FEMALE_NAMES, split), 1, "female first names")),
    }

    def draw(random, index):
        number = index % len(_TEMPLATES)
        # The two pronouns alternate for each template.
        right, wrong = ("he", "she") if index // len(_TEMPLATES) % 2 else ("she", "he")
        name, other = random.choice(names[right]), random.choice(names[wrong])
        return Row(
            clean=fill(_TEMPLATES[number], {"name": name}),
            corrupted=fill(_TEMPLATES[number], {"name": other}),
            answers=[f" {right}"],
            wrong_answers=[f" {wrong}"],
            template=number,
            metadata={"name": name, "corrupted_name": other},
        )

    return Task.from_rows(
        encoder,
        draw_rows(size, seed, draw),
        name="gendered-pronoun",
        description="Gendered pronoun: the pronoun that goes with a first name, against the other pronoun.",
        settings={"corruption": "other_gender", "seed": seed, "split": split},
    )
