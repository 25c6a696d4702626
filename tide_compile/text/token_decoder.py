"""TokenDecoder: text of tokens that come one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # byte fallback: a run of these is text as a whole, or all of it is broken


class TokenDecoder:
    """Decodes tokens one by one; the pieces together are the text of all.

    What a token adds depends on those before it (decoders drop a blank at the beginning of a text) and on those after
    it (a character in several tokens), and decoders that are told of one token at a time raise where bytes are no
    character. So a window of tokens is decoded with and without the tokens that are new, and the difference is handed
    out once later tokens cannot change it. The window begins where the last piece began, so that a token costs the
    same however long the text is.

    Args:
        tokenizer: any of transformers', fast or not.
        prompt: token ids that the text continues: the pieces are the text of all without that of the prompt. A
            character that the prompt begins and the text ends is the text's.
        skip_special_tokens: they have no text.

    Attributes:
        pending: text of the tokens so far that later ones may still change; the rest of the text if none follow.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._prompt: Sequence[int] | None = prompt  # None once it is in the window
        self._window: list[int] = []
        self._known = 0  # ids of the window whose text has been handed out
        self._before = self._text = ""  # of these, and of the whole window
        self._in_bytes = False  # the last token that has text is one of a run of bytes
        self.pending = ""

    def add(self, token: int) -> str:
        """The text that is certain once ``token`` is there; often empty. Never raises: an id that the tokenizer cannot
        decode has no text."""
        if self._prompt is not None:
            self._begin()
        text = self._decode([*self._window, token])
        if text is None:
            return ""
        self._window.append(token)
        if text != self._text:
            self._text, self._in_bytes = text, self._is_byte(token)
        self.pending = text[_equal(self._before, text) :]
        if not self.pending or self._in_bytes or text.endswith("\ufffd"):
            return ""
        piece, self.pending = self.pending, ""
        if piece.strip():  # else the window would begin with blanks, of which decoders drop some
            del self._window[: self._known]
            self._text = self._decode(self._window) or ""
        self._before, self._known = self._text, len(self._window)
        return piece

    def finish(self) -> str:
        """What was still held back."""
        rest, self.pending = self.pending, ""
        return rest

    def _begin(self) -> None:
        prompt, self._prompt = list(self._prompt), None
        text = self._decode(prompt)
        if text is None:
            prompt = [token for token in prompt if self._decode([token]) is not None]
            text = self._decode(prompt) or ""
        self._window, self._known = prompt, len(prompt)
        self._before = self._text = text

    def _is_byte(self, token: int) -> bool:
        name = self._tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and _BYTE.fullmatch(name) is not None

    def _decode(self, ids: list[int]) -> str | None:
        """None: the tokenizer cannot. They raise what they like for an id that is not theirs."""
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        except Exception:
            return None


def _equal(one: str, other: str) -> int:
    """Characters at the beginning that are the same."""
    if other.startswith(one):
        return len(one)
    return next(i for i, (a, b) in enumerate(zip(one, f"{other}\0", strict=False)) if a != b)
