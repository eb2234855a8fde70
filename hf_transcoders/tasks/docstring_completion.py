"""Docstring completion (Heimersheim and Janiak 2023): name the next argument to describe."""

from .prompt_encoding import PromptEncoder
from .task import Task
from .templates import Row, choose, draw_rows, fill
from .words import words_of_split


_ARGUMENTS = ", ".join(f"{{def_{k}}}" for k in range(1, 7))
_TEMPLATE = (
    f'\ndef {{function}}(self, {_ARGUMENTS}):\n    """{{about}}\n\n'
    "    :param {doc_3}: {about_3}\n    :param {doc_4}: {about_4}\n    :param"
)
_WORDS = (
    "load size file last value index name path user page date list code text image table group count state event model "
    "order price field title color shape point node token query result label target source limit offset cache block frame "
    "layer width height depth score level mode option parent child session account message address network element "
    "section project update number start"
).split()
_NOUNS = (
    "school land river music winter paper market mountain teacher summer garden bridge window kitchen forest island"
).split()
_CORRUPTIONS = ("random_random", "random_doc", "random_answer")


def docstring_completion(
    tokenizer,
    size: int = 200,
    corruption: str = "random_random",
    seed: int = 0,
    split: str | None = None,
    add_bos: bool | None = None,
) -> Task:
    """
    Make prompts of a function with six arguments and a docstring that describes the third and the fourth. The prompt ends
    in `:param`; the fifth argument is the right answer, and the other five are wrong answers.

    Positions: `def_1` ... `def_6`, the arguments in the signature; `doc_3` and `doc_4`, the arguments in the docstring; and
    `END`. The candidates are the six arguments.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the language model.
        size (`int`, *optional*, defaults to 200): Number of rows.
        corruption (`str`, *optional*, defaults to `"random_random"`):
            The names in the corrupted prompt. `"random_random"`: new names in the signature and other new names in the
            docstring. `"random_doc"`: new names in the docstring. `"random_answer"`: a new fifth argument.
        seed (`int`, *optional*, defaults to 0): Seed for the rows.
        split (`str`, *optional*): `"train"`, `"validation"` or `"test"`, which share no argument names. By default all names are used.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token. The default is that of the tokenizer.

    Returns:
        [`Task`]

    Raises:
        [`TranscoderError`]: the corruption is unknown, or the tokenizer has too few argument names that are single tokens.

    Source: [A circuit for Python docstrings in a 4-layer attention-only
    transformer](https://www.alignmentforum.org/posts/u6KXXmKFbXfWzoAXn).
    """
    choose("corruption", corruption, _CORRUPTIONS)
    encoder = PromptEncoder(tokenizer, add_bos)
    fresh_needed = {"random_random": 8, "random_doc": 2, "random_answer": 1}[corruption]
    # The name of the function is drawn together with the arguments, so that it differs from them.
    candidates = words_of_split(_WORDS, split)
    words = list(encoder.require(candidates, 7 + fresh_needed, "argument names"))

    def draw(random, index):
        function, *chosen = random.sample(words, 7 + fresh_needed)
        arguments, fresh = chosen[:6], chosen[6:]
        nouns = random.sample(_NOUNS, 7)
        named = {f"def_{k}": argument for k, argument in enumerate(arguments, 1)}
        named |= {"doc_3": arguments[2], "doc_4": arguments[3]}
        if corruption == "random_random":
            changed = dict(zip(named, fresh, strict=True))
        elif corruption == "random_doc":
            changed = dict(zip(("doc_3", "doc_4"), fresh, strict=True))
        else:
            changed = {"def_5": fresh[0]}
        about = {"about": " ".join(nouns[:3]), "about_3": " ".join(nouns[3:5]), "about_4": " ".join(nouns[5:])}
        prompts = [fill(_TEMPLATE, about | {"function": function} | filling) for filling in (named, named | changed)]
        for prompt in prompts:
            for name in (*about, "function"):
                del prompt.spans[name]
        answers = [f" {argument}" for argument in arguments]
        return Row(*prompts, answers=[answers[4]], wrong_answers=answers[:4] + answers[5:])

    return Task.from_rows(
        encoder,
        draw_rows(size, seed, draw),
        name="docstring",
        description="Docstring completion: the next argument to describe, against the others.",
        settings={"corruption": corruption, "seed": seed, "split": split},
    )
