"""Requests of OpenAI's completion endpoints: what is understood, what is refused, and what is let pass."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

# Fields that would change the reply and are not supported, with the values that leave it as it is. None always does.
_REFUSED = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},),
    "top_k": (), "min_p": (0,), "reasoning_effort": (), "verbosity": (),
}  # fmt: skip


class ApiError(Exception):
    """A reply that is an error, in OpenAI's shape.

    Args:
        status: of HTTP.
        message: what was found and what to do.
        param: the field that is wrong.
        code: for programs, such as ``"context_length_exceeded"``.
        headers: of the reply.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, dict[str, str | None]]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_exceeded" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    include_usage: bool = False


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


def _as_parts(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    """One turn of a chat; further fields are handed to the chat template."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]

    def for_template(self) -> dict[str, object]:
        return {**self.model_dump(exclude={"content"}), "content": "".join(part.text for part in self.content)}


class GenerationRequest(BaseModel):
    """What both endpoints understand. Unknown fields are accepted, unsupported ones that change the reply are not.

    Attributes:
        temperature, top_p: neither given: as the model's own generation config says; temperature 0: greedy.
        max_tokens: of the reply; not given: 16 for completions, what is left of the server's limit for chats.
        stop: up to four strings; the reply ends before the first that appears.
        seed: of sampling; the same request gives the same reply.
        exit_threshold: 0..1, in the place of the server's for this request; 1: no token leaves early.
    """

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        Field(max_length=4),
        BeforeValidator(lambda stop: [] if stop is None else [stop] if isinstance(stop, str) else stop),
    ] = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    exit_threshold: float | None = Field(None, ge=0, le=1)

    def sampling(self) -> dict[str, object]:
        """Arguments of ``generate``."""
        if self.temperature is None and self.top_p is None:
            return {}
        if self.temperature == 0:
            return {"do_sample": False}
        temperature = 1.0 if self.temperature is None else self.temperature
        return {"do_sample": True, "temperature": temperature, "top_p": self.top_p or 1.0, "top_k": 0}


def _one_prompt(prompt: object) -> object:
    if isinstance(prompt, list) and len(prompt) > 1 and not all(isinstance(p, int) for p in prompt):
        found = f"{len(prompt)} prompts in one request: send one request for each"
        raise PydanticCustomError("prompts", found)
    prompt = prompt[0] if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else prompt
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(p) is int for p in prompt)):
        raise PydanticCustomError("prompt", "Input should be a string or a list of token ids")
    return prompt


class CompletionRequest(GenerationRequest):
    """``prompt``: one text, or the token ids of one."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


Body = TypeVar("Body", bound=GenerationRequest)


async def read_request(request: Request, kind: type[Body], max_bytes: int) -> Body:
    """The body of a request, checked.

    Raises:
        ApiError: 415 not JSON, 413 too large, 400 with the name of the field that is wrong or not supported.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json.")
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes: send less text.")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise too_large
    try:
        body = kind.model_validate_json(bytes(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        raise ApiError(400, f"{param or 'body'}: {first['msg']}", param=param) from None
    _refuse_unsupported(body)
    return body


def _refuse_unsupported(body: GenerationRequest) -> None:
    for name, value in (body.model_extra or {}).items():
        harmless = _REFUSED.get(name)
        if harmless is None or value is None:
            continue
        if not any(value == h and isinstance(value, bool) == isinstance(h, bool) for h in harmless):
            only = f": leave it out or send {harmless[0]!r}." if harmless else ": leave it out."
            raise ApiError(400, f"{name} is not supported{only}", param=name, code="unsupported_parameter")
