"""special_tokens: the control tokens of a tokenizer."""

from __future__ import annotations

from transformers import AddedToken, PreTrainedTokenizerBase


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, AddedToken]:
    """By id, those that are control tokens: ends of turns and texts, padding, what is reserved."""
    added = {id_: token for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    for id_, name in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True):
        added.setdefault(id_, AddedToken(str(name), special=True, normalized=False))
    return {id_: token for id_, token in added.items() if token.content}
