"""ReplyText: the text of a reply as it can be sent, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tide_compile.text.special_tokens import special_tokens
from tide_compile.text.token_decoder import TokenDecoder


class ReplyText:
    """The text of a reply, token by token; nothing is handed out that a stop string may still take back.

    Args:
        tokenizer: of the model.
        stop: the reply ends before the first of these that appears. They may be special tokens or contain some, which
            are seen although they are no text.
        prompt: token ids that the reply continues.

    Attributes:
        tokens: ids so far, also those of a stop string.
        stopped: a stop string has appeared.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: list[str], prompt: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.stopped = False
        self._stop, self._decoder = stop, TokenDecoder(tokenizer, prompt)
        self._names = {
            token: special.content
            for token, special in (special_tokens(tokenizer) if stop else {}).items()
            if any(special.content in s for s in stop) and not tokenizer.decode([token], skip_special_tokens=True)
        }
        self._held: list[tuple[str, bool]] = []  # characters that may begin a stop string, and whether they are text

    def add(self, token: int) -> str:
        """The text that can be sent once ``token`` is there."""
        self.tokens.append(token)
        piece = self._decoder.add(token)
        return self._release(piece, self._names.get(token, ""))

    def finish(self) -> str:
        """What was still held back: parts of a stop string, or of a character."""
        return self._release(self._decoder.finish(), ending=True)

    def _release(self, piece: str, name: str = "", ending: bool = False) -> str:
        if self.stopped:
            return ""
        pending = self._decoder.pending
        pending = "" if pending.endswith("\ufffd") else pending  # a part of a character is none yet
        text, special = [(c, True) for c in piece], [(c, False) for c in name]
        seen = [*self._held, *text, *((c, True) for c in pending), *special]
        found = [at for at in map(_string(seen).find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return _text(seen[: min(found)])
        certain = [*self._held, *text, *special]
        keep = 0 if ending else _begun(_string(certain), self._stop)
        self._held = certain[len(certain) - keep :]
        return _text(certain[: len(certain) - keep])


def _begun(text: str, stops: list[str]) -> int:
    """Characters at the end of a text that a stop string begins with."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def _string(characters: list[tuple[str, bool]]) -> str:
    return "".join(c for c, _ in characters)


def _text(characters: list[tuple[str, bool]]) -> str:
    return "".join(c for c, is_text in characters if is_text)
