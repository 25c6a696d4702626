"""Replies to jobs that ended in one way or another."""

import asyncio
import json

import pytest

from tide_compile.serving.errors import ApiError
from tide_compile.serving.replies import ChatReply, CompletionReply
from tide_compile.serving.reply_text import ReplyText


class Job:
    """One that has ended: its text, how, and the error that iterating raises."""

    def __init__(self, tokenizer, finish_reason, error=None):
        self.prompt, self.text = [5, 6], ReplyText(tokenizer, [])
        self.finish_reason, self._error = finish_reason, error

    async def __aiter__(self):
        yield "some "
        if self._error is not None:
            raise self._error
        yield "text"


def events_of(reply, with_usage=False):
    async def collect():
        return [event.removeprefix("data: ").strip() async for event in reply.events(with_usage)]

    return asyncio.run(collect())


@pytest.mark.parametrize("kind", [CompletionReply, ChatReply])
@pytest.mark.parametrize(
    ("reason", "error", "status", "code"),
    [(None, None, 503, "server_stopping"), (None, RuntimeError("secret"), 500, None)],
)
def test_what_was_not_finished(tokenizer, kind, reason, error, status, code):
    """An error, whole or as the last event. Catches a reply that was given up and looks complete, and one whose error
    tells what the log alone should."""
    *_, last = events_of(kind("tiny", Job(tokenizer, reason, error)))
    assert json.loads(last)["error"]["code"] == code and json.loads(last)["error"]["type"] == "server_error"
    with pytest.raises(ApiError) as raised:
        asyncio.run(kind("tiny", Job(tokenizer, reason, error)).whole())
    assert raised.value.status == status and "secret" not in last + str(raised.value)


def test_what_was_finished(tokenizer):
    """Catches an end without its reason, and counts that nobody has asked for."""
    for with_usage in (False, True):
        *chunks, done = events_of(ChatReply("tiny", Job(tokenizer, "length")), with_usage)
        chunks = [json.loads(chunk) for chunk in chunks]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert deltas == [{"role": "assistant", "content": ""}, {"content": "some "}, {"content": "text"}, {}]
        assert done == "[DONE]" and ("usage" in chunks[-1]) == with_usage
        assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]] == [None, None, None, "length"]
