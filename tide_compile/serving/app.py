"""build_app: an OpenAI-compatible HTTP application around one engine.

The engine has one cache, so requests are generated one after the other, by one thread; those that come meanwhile wait
in a bounded line. Weights, compiled code and cache are shared by all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from transformers import PreTrainedTokenizerBase

from tide_compile.errors import ConfigError, MissingExtraError
from tide_compile.generation.engine import TIDE

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, StreamingResponse
    from openai.types import Model
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise MissingExtraError(f"serving needs more packages ({error}): pip install 'tide-compile[serve]'") from error

from tide_compile.metrics import EngineCollector
from tide_compile.serving.replies import ChatReply, CompletionReply
from tide_compile.serving.requests import ApiError, ChatRequest, CompletionRequest, GenerationRequest, read_request
from tide_compile.serving.worker import Job, QueueFullError, ReplyText, Worker

log = logging.getLogger("tide_compile")
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chats may use what is left


def build_app(
    engine: TIDE,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    waiting: int = 64,
    total_tokens: int = 2048,
    max_bytes: int = 1 << 18,
    warmup: bool = True,
    pool: ThreadPoolExecutor | None = None,
) -> FastAPI:
    """The application: ``/v1/completions``, ``/v1/chat/completions``, ``/v1/models``, ``/health``, ``/metrics``.

    Args:
        engine: that generates.
        tokenizer: a fast one; chats need its chat template.
        name: of the model, for clients.
        waiting: requests that may wait while one runs; further ones get 429.
        total_tokens: of prompt and reply together; the cache is as long, and every token looks at all of it.
        max_bytes: of a request's body.
        warmup: compile everything before the first request is taken.
        pool: ``one_thread()`` in which the model was loaded, for full speed on a CPU. It is shut down with the app.

    Raises:
        ConfigError: the tokenizer is not a fast one, or a limit is below what a request needs.
    """
    if total_tokens < 8 or waiting < 0 or max_bytes < 1:
        raise ConfigError(f"{total_tokens=}, {waiting=}, {max_bytes=}: give at least 8, 0 and 1.")
    positions = getattr(engine.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    total_tokens = min(total_tokens, positions or total_tokens)  # of a model without a limit: None
    service = _Service(engine, tokenizer, name, waiting, total_tokens, pool)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if warmup:
            seconds = await asyncio.to_thread(service.worker.warmup, total_tokens)
            log.info("compiled for requests of up to %d tokens in %.1f s", total_tokens, seconds)
        yield
        await asyncio.to_thread(service.worker.close)

    app = FastAPI(title=name, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, lambda _, error: service.refuse(error))
    app.add_exception_handler(
        HTTPException, lambda _, error: service.refuse(ApiError(error.status_code, str(error.detail)))
    )
    app.add_exception_handler(Exception, lambda *_: service.refuse(ApiError(500, "a flaw of the server; see its log.")))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_request(request, CompletionRequest, max_bytes)
        prompt = body.prompt if isinstance(body.prompt, list) else service.tokenize(body.prompt)
        return await service.answer(request, body, prompt, body.max_tokens or _COMPLETION_TOKENS, CompletionReply)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read_request(request, ChatRequest, max_bytes)
        wanted = body.max_completion_tokens or body.max_tokens
        return await service.answer(request, body, service.render(body), wanted, ChatReply)

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        model = Model(id=name, created=service.created, object="model", owned_by="tide_compile")
        return {"object": "list", "data": [model.model_dump(exclude_unset=True)]}

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "unfinished": service.worker.unfinished}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _Service:
    """What the endpoints share."""

    def __init__(
        self,
        engine: TIDE,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        waiting: int,
        total_tokens: int,
        pool: ThreadPoolExecutor | None,
    ) -> None:
        self.name, self.created = name, int(time.time())
        self._tokenizer, self._total_tokens = tokenizer, total_tokens
        self._vocabulary = engine.model.config.get_text_config(decoder=True).vocab_size
        self._has_exits = engine.config.exit_threshold != 1
        self.worker = Worker(engine, tokenizer, waiting, self._count, pool)
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        common = {"registry": self.registry}
        self._requests = Counter("tide_requests", "Requests by outcome", ["outcome"], **common)
        self._tokens = Counter("tide_request_tokens", "Tokens of requests that ended, by kind", ["kind"], **common)
        self._seconds = Histogram("tide_request_seconds", "Seconds of completed requests, waiting included", **common)
        unfinished = Gauge("tide_requests_unfinished", "Requests that wait or run", **common)
        unfinished.set_function(lambda: self.worker.unfinished)

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]

    def render(self, body: ChatRequest) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise ApiError(400, f"{self.name} has no chat template: use /v1/completions.", param="messages")
        turns = [message.for_template() for message in body.messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template raises what it likes: roles in the wrong order, unknown ones, ...
            raise ApiError(400, f"the model's chat template refuses this: {error}", param="messages") from error
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    async def answer(
        self,
        request: Request,
        body: GenerationRequest,
        prompt: list[int],
        wanted: int | None,
        kind: type[CompletionReply],
    ) -> Response:
        """Queue a request and reply when it is its turn; ``wanted``: tokens, None: what is left."""
        self._check(body, prompt, wanted)
        job = Job(
            prompt,
            ReplyText(self._tokenizer, body.stop),
            wanted or self._total_tokens - len(prompt),
            body.sampling(),
            body.exit_threshold,
            body.seed,
        )
        try:
            self.worker.submit(job)
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full", **{"Retry-After": str(error.retry_after)}) from None
        watch = asyncio.create_task(_give_up_when_gone(request, job))
        job.future.add_done_callback(lambda _: watch.get_loop().call_soon_threadsafe(watch.cancel))
        reply = kind(self.name, job)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(reply.events(with_usage), media_type="text/event-stream")
        return Response(await reply.whole(), media_type="application/json")

    def refuse(self, error: ApiError) -> JSONResponse:
        """The reply that is an error. Those of requests that reached the worker are counted there."""
        if error.status < 500:
            self._requests.labels("refused").inc()
        return JSONResponse(error.body(), error.status, error.headers)

    def _check(self, body: GenerationRequest, prompt: list[int], wanted: int | None) -> None:
        if body.model not in (None, self.name):
            found = f"the model {body.model!r} is not here: this server has {self.name!r}."
            raise ApiError(404, found, param="model", code="model_not_found")
        if not prompt:
            raise ApiError(400, "the prompt has no tokens: send some text.", param="prompt")
        if not all(0 <= token < self._vocabulary for token in prompt):
            raise ApiError(400, f"token ids go from 0 to {self._vocabulary - 1}.", param="prompt")
        if len(prompt) + (wanted or 1) > self._total_tokens:
            raise ApiError(
                400,
                f"{len(prompt)} tokens of prompt and {wanted or 'at least 1'} of reply are more than this server's "
                f"limit of {self._total_tokens}: send a shorter prompt or a smaller max_tokens.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if body.exit_threshold not in (None, 1) and not self._has_exits:
            raise ApiError(400, "this server runs without exits: leave exit_threshold out.", param="exit_threshold")

    def _count(self, job: Job, outcome: str) -> None:
        self._requests.labels(outcome).inc()
        self._tokens.labels("prompt").inc(len(job.prompt))
        self._tokens.labels("reply").inc(len(job.text.tokens))
        if outcome == "completed":
            self._seconds.observe(time.perf_counter() - job.created)


async def _give_up_when_gone(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.give_up()
