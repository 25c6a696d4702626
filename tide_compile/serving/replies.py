"""Replies of OpenAI's completion endpoints, whole and as events, built from the types of the openai package."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import ClassVar

from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tide_compile.serving.errors import ApiError, server_closes
from tide_compile.serving.worker import Job


class CompletionReply:
    """To a request of ``/v1/completions``.

    Args:
        model: its name.
        job: submitted.
    """

    prefix: ClassVar[str] = "cmpl"

    def __init__(self, model: str, job: Job) -> None:
        self._job = job
        self._common = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self) -> str:
        """JSON of the reply, when it is there.

        Raises:
            ApiError: generation failed (500), or the server stops (503).
        """
        try:
            text = "".join([piece async for piece in self._job])
        except Exception as error:
            raise _failed() from error
        if self._job.finish_reason is None:
            raise server_closes()
        return self._whole(text).model_dump_json(exclude_unset=True)

    async def events(self, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events: chunks of text, one with the reason it ended, with ``with_usage`` one with counts. An
        error is the last event."""
        try:
            for chunk in self._opening():
                yield _event(chunk)
            async for piece in self._job:
                yield _event(self._chunk(piece))
        except Exception:
            yield error_event(_failed())
            return
        if self._job.finish_reason is None:
            yield error_event(server_closes())
            return
        yield _event(self._chunk("", self._job.finish_reason))
        if with_usage:
            yield _event(self._counts())
        yield "data: [DONE]\n\n"

    def _whole(self, text: str) -> BaseModel:
        choice = {"index": 0, "text": text, "finish_reason": self._job.finish_reason}
        return Completion(**self._common, object="text_completion", choices=[choice], usage=_usage(self._job))

    def _opening(self) -> list[BaseModel]:
        return []

    def _chunk(self, piece: str, reason: str | None = None) -> BaseModel:
        choice = {"index": 0, "text": piece, "finish_reason": reason}  # null until the end, which the type forbids
        return Completion.model_construct(**self._common, object="text_completion", choices=[choice])

    def _counts(self) -> BaseModel:
        return Completion(**self._common, object="text_completion", choices=[], usage=_usage(self._job))


class ChatReply(CompletionReply):
    """To a request of ``/v1/chat/completions``."""

    prefix = "chatcmpl"

    def _whole(self, text: str) -> BaseModel:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": self._job.finish_reason}
        return ChatCompletion(**self._common, object="chat.completion", choices=[choice], usage=_usage(self._job))

    def _opening(self) -> list[BaseModel]:
        return [self._delta({"role": "assistant", "content": ""})]

    def _chunk(self, piece: str, reason: str | None = None) -> BaseModel:
        return self._delta({"content": piece} if piece else {}, reason)

    def _delta(self, delta: dict[str, str], reason: str | None = None) -> BaseModel:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return ChatCompletionChunk(**self._common, object="chat.completion.chunk", choices=[choice])

    def _counts(self) -> BaseModel:
        usage = _usage(self._job)
        return ChatCompletionChunk(**self._common, object="chat.completion.chunk", choices=[], usage=usage)


def error_event(error: ApiError) -> str:
    return f"data: {json.dumps(error.body())}\n\n"


def _usage(job: Job) -> CompletionUsage:
    prompt, reply = len(job.prompt), len(job.text.tokens)
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=reply, total_tokens=prompt + reply)


def _event(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def _failed() -> ApiError:
    return ApiError(500, "generation failed; the server's log says why.")
