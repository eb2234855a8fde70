"""Ask chat models: a service with the API of OpenAI, or a local model; with a transcript from which a run can go on."""

import os
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Protocol
from urllib.request import Request, urlopen

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import TranscoderError
from ...fingerprint import digest_of
from ...lm.devices import input_device
from ...lm.modes import in_eval_mode
from ...lm.wrappers import language_model
from ...text.checked import entry
from ...text.json_lines import append_json_line, read_json_lines
from ...text.printable import printable
from ...text.strict_json import parse_json, to_json


Messages = Sequence[Mapping[str, str]]
# Bytes of the answer of a service.
_LARGEST_ANSWER = 2**22


class ServiceError(TranscoderError):
    """A chat model could not be asked."""


class BadAnswer(TranscoderError):
    """The answer of a chat model does not have the form that was asked for."""


class Chat(Protocol):
    """A chat model."""

    name: str

    def answer(self, messages: Messages) -> str:
        """The answer to messages, each with `role` and `content`."""
        ...


class ServiceChat:
    """
    A service with the API of OpenAI for chats, such as vLLM, llama.cpp, Ollama or OpenAI itself.

    Args:
        url (`str`): Address of the API, such as `http://localhost:8000/v1`.
        model (`str`): Name of the model there.
        api_key (`str`, *optional*): Key of the service. Defaults to the environment variable `OPENAI_API_KEY`.
        max_tokens (`int`, *optional*, defaults to 400): Number of tokens of an answer.
        timeout (`float`, *optional*, defaults to 120): Seconds to wait for an answer.
    """

    def __init__(
        self, url: str, model: str, api_key: str | None = None, max_tokens: int = 400, timeout: float = 120.0
    ):
        if not url.startswith(("http://", "https://")):
            raise TranscoderError(
                f"'{printable(url)}' is not the address of a service: give one that begins with http://."
            )
        self.name, self.url, self.max_tokens, self.timeout = model, url.rstrip("/"), max_tokens, timeout
        self._key = api_key or os.environ.get("OPENAI_API_KEY")

    def answer(self, messages: Messages) -> str:
        asked = {
            "model": self.name,
            "messages": [dict(message) for message in messages],
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
        }
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        # Not the client of the Hub, which refuses every address, a service on this machine too, where the Hub is not reachable.
        request = Request(f"{self.url}/chat/completions", to_json(asked, indent=None).encode(), headers)
        try:
            with urlopen(request, timeout=self.timeout) as response:
                content = response.read(_LARGEST_ANSWER)
        except (OSError, HTTPException) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ServiceError(
                f"the service at {printable(self.url)} did not answer ({printable(reason)[:200]})"
            ) from error
        try:
            text = parse_json(content, "The answer")["choices"][0]["message"]["content"]
        except (TranscoderError, LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ServiceError(f"the service at {printable(self.url)} did not answer in the form of a chat completion")
        return text


class LocalChat:
    """
    A chat model that runs here, with its chat template and without sampling.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        max_tokens (`int`, *optional*, defaults to 200): Number of tokens of an answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 200):
        if tokenizer.chat_template is None:
            raise TranscoderError(
                f"{printable(tokenizer.name_or_path)} has no chat template: choose a model that was trained to follow "
                "instructions."
            )
        self.name = str(tokenizer.name_or_path)
        self.model, self.tokenizer, self.max_tokens = language_model(model), tokenizer, max_tokens

    @torch.no_grad()
    def answer(self, messages: Messages) -> str:
        inputs = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(input_device(self.model))  # pyright: ignore[reportAttributeAccessIssue]
        with in_eval_mode(self.model):
            output = self.model.generate(  # pyright: ignore[reportCallIssue]
                **inputs,
                max_new_tokens=self.max_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)  # pyright: ignore[reportReturnType]


class Transcript:
    """
    A chat model whose questions and answers are kept in a file. A question that is in the file is not asked again.

    Args:
        chat ([`Chat`]): The chat model.
        path (`Path`): File in JSON lines.
    """

    def __init__(self, chat: Chat, path: Path):
        self.chat, self.path, self.name = chat, path, chat.name
        self._answers = {}
        for number, said in enumerate(read_json_lines(path) if path.exists() else (), 1):
            where = f"Line {number} of {path}"
            self._answers[entry(said, "key", str, where)] = entry(said, "answer", str, where)

    def answer(self, messages: Messages) -> str:
        key = digest_of([self.name, list(map(dict, messages))])
        if key not in self._answers:
            self._answers[key] = self.chat.answer(messages)
            said = {
                "key": key,
                "model": self.name,
                "messages": list(map(dict, messages)),
                "answer": self._answers[key],
            }
            append_json_line(self.path, said)
        return self._answers[key]
