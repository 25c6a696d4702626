"""Prompts: token ids of texts and chats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from transformers import PreTrainedTokenizerBase

from tide_compile.serving.errors import ApiError
from tide_compile.serving.requests import Message
from tide_compile.text.special_tokens import special_tokens

_RARE = "\U00010600"  # a letter of Linear A: it has no case, is no blank, and templates print it as it is
_BLANKS = re.compile(r"\s*")


class Prompts:
    """Makes token ids of what clients send.

    What a message says never becomes a control token, which could end the turn and begin another one: where it looks
    like one, it is encoded as the text that it is. The prompt of a completion is the whole of what the model reads, and
    control tokens in it are meant.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        longest_first = sorted(special_tokens(tokenizer).items(), key=lambda pair: len(pair[1].content), reverse=True)
        self._special = {token.content: (id_, token) for id_, token in longest_first}

    def of_text(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]

    def of_chat(self, messages: list[Message]) -> list[int]:
        """Raises ApiError (400) if the tokenizer has no chat template, or that does not take these messages."""
        if self._tokenizer.chat_template is None:
            raise ApiError(400, "messages: this model has no chat template, use /v1/completions.", param="messages")
        turns = [message.for_template() for message in messages]
        texts = "\n".join(_strings(turns))
        look_alike = _any([name for name in self._special if len(name) > 1 and name in texts])
        if look_alike is None:
            return self._tokenizer(self._render(turns), add_special_tokens=False)["input_ids"]
        mark = _RARE
        while mark in texts:
            mark += _RARE
        broken = _mapped(turns, lambda text: look_alike.sub(lambda found: mark.join(found[0]), text))
        return self._encode(self._render(broken), mark)

    def _render(self, turns: list[dict[str, object]]) -> str:
        try:
            return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template raises what it likes: roles in the wrong order, unknown ones, ...
            found = f"messages: the model's chat template refuses them: {str(error)[:200]}."
            raise ApiError(400, found, param="messages") from error

    def _encode(self, text: str, mark: str) -> list[int]:
        """As the tokenizer does, but text that marks break is text."""
        ids, end = [], 0
        control = _any([name for name in self._special if name in text])
        for found in control.finditer(text) if control else ():
            id_, token = self._special[found[0]]
            before = text[end : found.start()].replace(mark, "")
            ids += [*self._plain(before.rstrip() if token.lstrip else before), id_]
            end = _BLANKS.match(text, found.end()).end() if token.rstrip else found.end()
        return ids + self._plain(text[end:].replace(mark, ""))

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []


def _any(names: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, names))) if names else None


def _strings(value: object) -> Iterator[str]:
    """All texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _strings(part)


def _mapped(value: object, change: Callable[[str], str]) -> object:
    """A value of JSON with other texts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(part, change) for part in value]
    return {change(k): _mapped(v, change) for k, v in value.items()} if isinstance(value, dict) else value
