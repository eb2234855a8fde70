"""The prompts of the greater-than case study, for tokenizers that write years in either way."""

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
    `The war lasted from 1732 to 17` for every year of a century, and the endings that can follow.

    Args:
        variant (`str`): `"two_token"`, or `"single_digit"` where the prompt ends in `to 173`.
        years (`list[str]`): The year that each prompt begins with.
        input_ids (`torch.LongTensor` of shape `(prompts, seq)`): The prompts.
        candidates (`dict[str, int]`): Ending -> token id, ascending.
        later (`torch.BoolTensor` of shape `(prompts, candidates)`): Whether an ending makes a year after the first.
        scored (`torch.LongTensor` of shape `(scored,)`):
            The prompts that count: those with endings both above and below, the first and last of all aside.
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
        The prompts that a tokenizer allows: a year counts where its ending is a token of its own.

        With two-digit endings they are 1700 to 1799 and the 100 endings compete (Dunefsky et al. 2024, whose scores leave
        out 00 and 99). Where only the last digit is a token, the decade is given, the ten digits compete, and 0 and 9 are
        left out of scores.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the base model.
            add_bos (`bool`, *optional*):
                Whether prompts begin with the beginning-of-sequence token; by default as the tokenizer does.

        Raises:
            [`TranscoderError`]: The tokenizer splits years in neither way, or those of this century in no way that can be
                compared.
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
        Probability of a later year minus that of one no later, for the prompts that count.

        Args:
            logits (`torch.Tensor` of shape `(..., scored, candidates)`): Logits of the endings only.

        Returns:
            `torch.Tensor` of shape `(..., scored)` in fp32, between -1 and 1; the endings share all probability.
        """
        signs = self.later[self.scored].to(logits.device).float() * 2 - 1
        return (logits.float().softmax(-1) * signs).sum(-1)
