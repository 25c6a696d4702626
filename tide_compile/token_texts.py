"""token_texts: what each token adds to the text."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream


def token_texts(tokenizer: object, ids: Sequence[int]) -> list[str | None]:
    """One text per id, which together are the text of all. A token that holds a part of a character adds nothing, and
    the one that completes it adds all of it. Tokenizers without a Rust backend give their names of tokens, and without
    a tokenizer all are None."""
    if tokenizer is None:
        return [None] * len(ids)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return list(tokenizer.convert_ids_to_tokens(ids))
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(backend, token) or "" for token in ids]
