"""Prompts of the greater-than case study, for tokenizers that split years into pairs of digits or into digits."""

from dataclasses import dataclass

import torch

from ...errors import TranscoderError
from ...tasks.greater_than import year_tokens
from ...tasks.prompt_encoding import PromptEncoder


_TEMPLATE = "The war lasted from {stem}{ending} to {stem}"
_CENTURY = "17"


@dataclass(frozen=True)
class YearPrompts:
    """
    Prompts such as `The war lasted from 1732 to 17` for the years of a century, and their candidate endings.

    Args:
        variant (`str`): `"two_token"`, or `"single_digit"` if the prompt ends in `to 173`.
        years (`list[str]`): First year in each prompt.
        input_ids (`torch.LongTensor` of shape `(prompts, seq)`): Tokens of the prompts.
        candidates (`dict[str, int]`): Ending -> token id, in ascending order.
        later (`torch.BoolTensor` of shape `(prompts, candidates)`): Whether each ending makes a later year.
        scored (`torch.LongTensor` of shape `(scored,)`):
            Indices of the scored prompts, which exclude the lowest and the highest ending.
        beginning (`bool`): Whether prompts begin with the beginning-of-sequence token.
    """

    variant: str
    years: list[str]
    input_ids: torch.LongTensor
    candidates: dict[str, int]
    later: torch.BoolTensor
    scored: torch.LongTensor
    beginning: bool

    @classmethod
    def of(cls, tokenizer, add_bos: bool | None = None) -> "YearPrompts":
        """
        Make the prompts for a tokenizer, from all years whose ending is a separate token.

        With two-digit endings, these are 1700 to 1799 with 100 candidate endings, and 00 and 99 are not scored (Dunefsky
        et al. 2024). If only the last digit is a token, the prompt includes the decade, the candidates are the ten digits,
        and 0 and 9 are not scored.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the language model.
            add_bos (`bool`, *optional*):
                Whether prompts begin with the beginning-of-sequence token. By default, as the tokenizer does.

        Raises:
            [`TranscoderError`]: The tokenizer splits years in another way, or not all years of the century alike.
        """
        encoder = PromptEncoder(tokenizer, add_bos)
        known = year_tokens(encoder)
        digits = "0123456789"
        stems = [_CENTURY] if known.variant == "two_token" else [_CENTURY + tens for tens in digits]
        keys = [(stem, ending) for stem in stems for ending in known.ids]
        starts = encoder.next_tokens([(f"The war lasted from {stem}", ending) for stem, ending in keys])
        keys = [key for key, id_ in zip(keys, starts, strict=True) if id_ is not None]
        texts = [_TEMPLATE.format(stem=stem, ending=ending) for stem, ending in keys]
        rows = encoder.encode(texts)
        answers = dict.fromkeys(known.ids)
        if texts:
            answers = dict(
                zip(known.ids, encoder.next_tokens([(texts[0], ending) for ending in known.ids]), strict=True)
            )
        candidates = {ending: id_ for ending, id_ in answers.items() if id_ is not None}
        lowest, highest = min(known.ids), max(known.ids)
        scored = [n for n, (_, ending) in enumerate(keys) if lowest < ending < highest]
        if len(set(map(len, rows))) != 1 or len(candidates) < 10 or len(scored) < 2:
            raise TranscoderError(
                f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} does not write the years of the "
                f"{int(_CENTURY) + 1}th century alike, so their prompts cannot be compared: use another model."
            )
        later = torch.tensor([[candidate > ending for candidate in candidates] for _, ending in keys])
        return cls(
            variant=known.variant,
            years=[stem + ending for stem, ending in keys],
            input_ids=torch.tensor(rows),
            candidates=candidates,
            later=later,
            scored=torch.tensor(scored),
            beginning=bool(encoder.prefix),
        )

    def differences(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Compute the probability of later years minus that of all other years, for the scored prompts.

        Args:
            logits (`torch.Tensor` of shape `(..., scored, candidates)`): Logits of the endings.

        Returns:
            `torch.Tensor` of shape `(..., scored)` in fp32, between -1 and 1, with probabilities normalized over the endings.
        """
        signs = self.later[self.scored].to(logits.device).float() * 2 - 1
        return (logits.float().softmax(-1) * signs).sum(-1)
