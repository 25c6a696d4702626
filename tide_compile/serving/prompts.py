"""Prompts: token ids of texts and chats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from transformers import AddedToken, PreTrainedTokenizerBase

from tide_compile.serving.errors import ApiError
from tide_compile.serving.requests import Message
from tide_compile.text.special_tokens import special_tokens


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
        special = sorted(special_tokens(tokenizer).items(), key=lambda pair: len(pair[1].content), reverse=True)
        self._ids = {token.content: id_ for id_, token in special}
        self._look_alike = _any(re.escape(token.content) for _, token in special if len(token.content) > 1)
        self._control = _any(_pattern(token) for _, token in special)

    def of_text(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]

    def of_chat(self, messages: list[Message]) -> list[int]:
        """Raises ApiError (400) if the tokenizer has no chat template, or that does not take these messages."""
        if self._tokenizer.chat_template is None:
            raise ApiError(400, "this model has no chat template: use /v1/completions.", param="messages")
        turns = [message.for_template() for message in messages]
        texts = "\n".join(_strings(turns))
        if not self._look_alike.search(texts):
            return self._tokenizer(self._render(turns), add_special_tokens=False)["input_ids"]
        mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in texts)  # of Unicode's private ones
        broken = _mapped(turns, lambda text: self._look_alike.sub(lambda found: mark.join(found[0]), text))
        return self._encode(self._render(broken), mark)

    def _render(self, turns: list[dict[str, object]]) -> str:
        try:
            return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template raises what it likes: roles in the wrong order, unknown ones, ...
            raise ApiError(400, f"the model's chat template refuses this: {error}", param="messages") from error

    def _encode(self, text: str, mark: str) -> list[int]:
        """As the tokenizer does, but text that marks break is text."""
        ids, end = [], 0
        for found in self._control.finditer(text):
            ids += self._plain(text[end : found.start()].replace(mark, ""))
            name = found[0] if found[0] in self._ids else found[0].strip()
            ids.append(self._ids[name])
            end = found.end()
        return ids + self._plain(text[end:].replace(mark, ""))

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []


def _any(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or "(?!)")  # which is nowhere


def _pattern(token: AddedToken) -> str:
    return (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")


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
