"""Text that is put together from pieces is the text of the whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tokenizers import TOKENIZERS, byte_fallback_tokenizer, every_byte_tokenizer, metaspace_tokenizer
from tide_compile.text.token_decoder import TokenDecoder


def whole(tokenizer, ids, skip):
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def pieces(tokenizer, ids, prompt=(), skip=True):
    decoder = TokenDecoder(tokenizer, prompt, skip_special_tokens=skip)
    return [*(decoder.add(token) for token in ids), decoder.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_are_the_text(name, skip, data):
    """Of random tokens behind random prompts: what is right of the prompt's text, or of as much of it as later tokens
    leave. Catches blanks that are lost or doubled between pieces, and characters that are cut."""
    tokenizer = TOKENIZERS[name]()
    tokens = st.lists(st.integers(0, len(tokenizer) - 1), max_size=12)
    prompt, ids = data.draw(tokens), data.draw(tokens)
    before, text = whole(tokenizer, prompt, skip), whole(tokenizer, prompt + ids, skip)
    kept = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    assert "".join(pieces(tokenizer, ids, prompt, skip)) == text[kept:]


def test_a_blank_between_prompt_and_text():
    """Catches text that is decoded without its prompt; and without one, there is no blank in front."""
    tokenizer = metaspace_tokenizer()
    assert pieces(tokenizer, [7, 8], [5, 6]) == [" w7", " w8", ""]
    assert pieces(tokenizer, [7, 8]) == ["w7", " w8", ""]


def test_a_character_is_handed_out_whole():
    """As soon as it is there, also where the prompt has begun it. Catches a replacement character in the place of
    each byte, and text that is held back for no reason."""
    tokenizer = every_byte_tokenizer()
    ids = tokenizer("é🙂a")["input_ids"]
    assert pieces(tokenizer, ids) == ["", "é", "", "", "", "🙂", "a", ""]
    assert pieces(tokenizer, ids[1:], ids[:1]) == ["é", "", "", "", "🙂", "a", ""]
    assert pieces(tokenizer, ids[:1]) == ["", "\ufffd"]


def test_bytes_that_are_no_character():
    """Byte fallback decodes a run of bytes together: one that is broken breaks all. Catches a newline that is sent and
    then is none, and a decoder that raises."""
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["a", "<0x0A>", "<0xE2>", "b", "a"])
    assert pieces(tokenizer, ids) == ["a", "", "", "\ufffd\ufffdb", "a", ""]
    ids.insert(2, tokenizer.eos_token_id)  # which has no text, and does not end the run
    assert pieces(tokenizer, ids) == ["a", "", "", "", "\ufffd\ufffdb", "a", ""]
    decoder = TokenDecoder(tokenizer)
    assert [decoder.add(token) for token in ids[:2]] == ["a", ""] and decoder.pending == "\n" == decoder.finish()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_without_a_token(name):
    """A model's vocabulary may be longer than its tokenizer's. Catches a decoder that raises, and text that is lost
    with what cannot be decoded."""
    tokenizer = TOKENIZERS[name]()
    good = [5, 6, 7 % len(tokenizer)]
    broken = [5, len(tokenizer) + 5, 6, -1, 2**70, 7 % len(tokenizer)]
    assert "".join(pieces(tokenizer, broken, broken)) == "".join(pieces(tokenizer, good, good))


def test_a_token_costs_the_same_in_a_long_text():
    """Catches a window that grows with the text."""
    tokenizer, lengths = metaspace_tokenizer(), []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **options: lengths.append(len(ids)) or decode(ids, **options)
    pieces(tokenizer, [5] * 500, [6] * 100)
    assert lengths[0] == 100 and lengths[1] == 101 and max(lengths[3:]) <= 2
