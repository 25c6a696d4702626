"""Requests of OpenAI's completion endpoints, and how they are read."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal, TypeVar

from fastapi import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect

from tide_compile.serving.errors import ApiError
from tide_compile.serving.parameters import describe_unsupported, refuse_unsupported

_GREEDY = 1e-5  # temperatures below: logits divided by them are no longer finite
_SHOWN = 5  # errors in one message


class StreamOptions(BaseModel):
    """``include_obfuscation`` is let pass: nothing is obfuscated."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


_NO_CONTENT = PydanticCustomError("content", "Input should be a string or a list of text parts")


def _as_parts(content: object) -> object:
    if content is not None and not isinstance(content, str | list):
        raise _NO_CONTENT
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    """One turn of a chat; all of it is handed to the chat template. Only turns that call tools, or refuse, may be
    without content."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    name: str | None = None
    tool_calls: list[dict[str, JsonValue]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, JsonValue] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    content: Annotated[
        list[TextPart] | None, BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart] | None)
    ] = Field(None, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, message: object) -> object:
        return {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message

    @field_validator("content")
    @classmethod
    def _is_there(cls, content: list[TextPart] | None, others: ValidationInfo) -> list[TextPart] | None:
        if content is None and not any(others.data.get(n) for n in ("tool_calls", "function_call", "refusal")):
            raise _NO_CONTENT
        return content

    def for_template(self) -> dict[str, object]:
        text = "".join(part.text for part in self.content or [])
        return {**self.model_dump(exclude={"content"}, exclude_none=True), "content": text}


class GenerationRequest(BaseModel):
    """What both endpoints understand. Other fields are refused if they would change the reply.

    Attributes:
        temperature, top_p: neither given: as the model's own generation config says; temperature 0: greedy.
        max_tokens: of the reply; not given: up to 16 for completions, what is left of the server's limit for chats.
        stop: up to four strings; the reply ends before the first that appears.
        seed: of sampling; the same request gives the same reply.
        exit_threshold: 0..1, in the place of the server's for this request; 1: no token leaves early.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, json_schema_extra=describe_unsupported)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        Field(max_length=4),
        BeforeValidator(
            lambda stop: [] if stop is None else [stop] if isinstance(stop, str) else stop,
            json_schema_input_type=str | list[str] | None,
        ),
    ] = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    exit_threshold: float | None = Field(None, ge=0, le=1)

    @field_validator("stream_options")
    @classmethod
    def _streams(cls, options: StreamOptions | None, others: ValidationInfo) -> StreamOptions | None:
        if options is not None and not others.data.get("stream"):
            raise PydanticCustomError("stream_options", "Only streams have these options: send stream as true")
        return options

    @property
    def wanted(self) -> int | None:
        """Tokens of the reply, or None: none were named."""
        return self.max_tokens

    def sampling(self) -> dict[str, object]:
        """Arguments of ``generate``."""
        if self.temperature is None and self.top_p is None:
            return {}
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature < _GREEDY:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": temperature, "top_p": self.top_p or 1.0, "top_k": 0}


def _one_prompt(prompt: object) -> object:
    if isinstance(prompt, list) and len(prompt) > 1 and not all(isinstance(p, int) for p in prompt):
        found = f"{len(prompt)} prompts in one request are not supported: send one request for each"
        raise PydanticCustomError("prompts", found)
    prompt = prompt[0] if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else prompt
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(p) is int for p in prompt)):
        raise PydanticCustomError("prompt", "Input should be a string or a list of token ids")
    if not prompt:
        raise PydanticCustomError("empty", "The prompt is empty: send some text")
    return prompt


class CompletionRequest(GenerationRequest):
    """``prompt``: one text, or the token ids of one."""

    prompt: Annotated[
        str | list[int],
        BeforeValidator(_one_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @field_validator("max_completion_tokens")
    @classmethod
    def _agrees(cls, tokens: int | None, others: ValidationInfo) -> int | None:
        if tokens is not None and others.data.get("max_tokens") not in (None, tokens):
            raise PydanticCustomError("max_tokens", "max_tokens says otherwise: send one of them")
        return tokens

    @property
    def wanted(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


Body = TypeVar("Body", bound=GenerationRequest)


async def read_request(request: Request, kind: type[Body], max_bytes: int, seconds: float) -> Body:
    """The body of a request, checked.

    Raises:
        ApiError: 415 not JSON, 413 too large, 408 not there after ``seconds``, 400 with the names of the fields that
            are wrong or not supported, or because the client has hung up.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json.")
    try:
        async with asyncio.timeout(seconds):
            content = await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body was not there after {seconds:g} s.", Connection="close") from None
    except ClientDisconnect:
        raise ApiError(400, "the client has hung up.") from None  # which nobody reads
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)[:_SHOWN]
        params = [".".join(str(part)[:64] for part in e["loc"]) or None for e in errors]
        found = "; ".join(f"{param or 'body'}: {e['msg']}" for param, e in zip(params, errors, strict=True))
        raise ApiError(400, f"{found}.", param=params[0]) from None
    refuse_unsupported(body.model_extra or {})
    return body


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes: send less text.", Connection="close")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:16]) > max_bytes:
        raise too_large
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise too_large
    return bytes(content)
