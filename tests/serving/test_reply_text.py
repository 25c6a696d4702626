"""The text of a reply, and what ends it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tokenizers import TOKENIZERS, byte_fallback_tokenizer, byte_tokenizer
from tide_compile.serving.reply_text import ReplyText


def test_text_comes_in_order(tokenizer):
    """Pieces add up to the text, whatever bytes there are. Catches text that is lost or repeated around characters of
    several bytes, and a held-back beginning of a stop string that is forgotten."""
    generator = torch.Generator().manual_seed(0)
    for stop in ([], ["abc", "bd"], ["~~~~~~~"]):
        for _ in range(30):
            ids = torch.randint(0, 128, (40,), generator=generator).tolist()
            text = ReplyText(tokenizer, stop)
            pieces = [text.add(token) for token in ids]
            want = tokenizer.decode(ids, skip_special_tokens=True)
            assert "".join(pieces) + text.finish() == want
    text = ReplyText(tokenizer, ["abc"])
    assert [text.add(token) for token in tokenizer("xabab")["input_ids"]] == ["x", "", "", "ab", ""]
    assert text.add(*tokenizer("c")["input_ids"]) == "" and text.stopped and text.finish() == ""


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_stop_string_cuts_the_text(name, data):
    """At its first place in the text of the whole, however it is split into tokens. Catches one that is missed or sent
    in part, and one that is seen where none is."""
    tokenizer = TOKENIZERS[name]()
    ids = data.draw(st.lists(st.integers(2, min(60, len(tokenizer) - 1)), min_size=1, max_size=12))
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    at = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[at : at + data.draw(st.integers(1, 4))].strip("\ufffd") or "never"
    text = ReplyText(tokenizer, [stop])
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.stopped:
            break
    got = "".join(pieces) + text.finish()
    assert got == (whole[: whole.index(stop)] if stop in whole else whole)
    assert text.stopped == (stop in whole)


@pytest.mark.parametrize("stop", ["<pad>", "b<pad>", "<pad>c", "b<pad>c"])
def test_a_stop_string_with_a_special_token(tokenizer, stop):
    """Special tokens are no text, but end it. Catches one that never stops a reply, one that is sent, and one that
    stands in the text of a reply that goes on."""
    text = ReplyText(tokenizer, [stop])
    pieces = [text.add(token) for token in tokenizer("ab<end>ab<pad>cd")["input_ids"]]
    assert "".join(pieces) == ("aba" if stop[0] == "b" else "abab") and text.stopped and not text.finish()
    text = ReplyText(tokenizer, [stop + "!"])
    pieces = [text.add(token) for token in tokenizer("ab<end>ab<pad>cd")["input_ids"]]
    assert "".join(pieces) + text.finish() == "ababcd" and not text.stopped


def test_a_stop_string_ends_at_once():
    """Bytes are certain only when others follow, which are not waited for. Catches a newline that ends a reply one
    token late."""
    tokenizer = byte_fallback_tokenizer()
    text = ReplyText(tokenizer, ["\n", "\ufffd"])
    ids = tokenizer.convert_tokens_to_ids(["a", "<0xC3>", "<0xA9>", "<0x0A>"])
    assert [text.add(token) for token in ids] == ["a", "", "", "é"] and text.stopped and text.finish() == ""


def test_a_stop_string_that_is_text_and_token():
    """Catches a special token that is found in text which only looks like it, twice or not at all."""
    tokenizer = byte_tokenizer()
    text = ReplyText(tokenizer, ["<pad>"])
    ids = tokenizer("a<pad>", split_special_tokens=True)["input_ids"]
    assert "".join(text.add(token) for token in ids) == "a" and text.stopped
