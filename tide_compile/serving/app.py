"""build_app: an OpenAI-compatible HTTP application around one engine.

The engine has one cache, so requests are generated one after the other, by one thread; those that come meanwhile wait
in a bounded line. Weights, compiled code and cache are shared by all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from transformers import PreTrainedTokenizerBase

from tide_compile.errors import ConfigError, MissingExtraError
from tide_compile.generation.engine import TIDE

try:
    from fastapi import FastAPI, Request, Response
    from openai.types import Completion, Model
    from openai.types.chat import ChatCompletion
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise MissingExtraError(f"serving needs more packages ({error}): pip install 'tide-compile[serve]'") from error

from tide_compile.serving.description import described_by, request_body
from tide_compile.serving.errors import ApiError
from tide_compile.serving.requests import ChatRequest, CompletionRequest, read_request
from tide_compile.serving.service import Service
from tide_compile.serving.stopping import AnswerCancelled

log = logging.getLogger("tide_compile")


def build_app(
    engine: TIDE,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    waiting: int = 64,
    total_tokens: int = 2048,
    max_bytes: int = 1 << 18,
    body_seconds: float = 30,
    warmup: bool = True,
    pool: ThreadPoolExecutor | None = None,
) -> FastAPI:
    """The application: ``/v1/completions``, ``/v1/chat/completions``, ``/v1/models``, ``/health``, ``/metrics``, and
    ``/openapi.json``, which describes them.

    Args:
        engine: that generates.
        tokenizer: of transformers, fast or not; chats need its chat template.
        name: of the model, for clients and as the label ``engine`` of its metrics.
        waiting: requests that may wait while one runs; further ones get 429.
        total_tokens: of prompt and reply together; the cache is as long, and every token looks at all of it.
        max_bytes: of a request's body.
        body_seconds: in which a request's body must have come.
        warmup: compile everything before the first request is taken.
        pool: ``one_thread()`` in which the model was loaded, for full speed on a CPU. It is shut down with the app.

    Raises:
        ConfigError: the tokenizer is none, or a limit is below what a request needs.
    """
    if total_tokens < 8 or waiting < 0 or max_bytes < 1 or body_seconds <= 0:
        found = f"{total_tokens=}, {waiting=}, {max_bytes=}, {body_seconds=}"
        raise ConfigError(f"{found}: give at least 8, 0, 1 and more than 0.")
    positions = getattr(engine.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    total_tokens = min(total_tokens, positions or total_tokens)  # of a model without a limit: None
    service = Service(engine, tokenizer, name, waiting, total_tokens, pool)
    answering: set[asyncio.Task] = set()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if warmup:
            seconds = await asyncio.to_thread(service.worker.warmup, total_tokens)
            log.info("compiled for requests of up to %d tokens in %.1f s", total_tokens, seconds)
        yield
        await asyncio.to_thread(service.worker.close)
        if answering:
            await asyncio.wait(answering, timeout=1)  # what was cancelled is told so

    app = FastAPI(title=name, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(AnswerCancelled, answering=answering)
    app.add_exception_handler(ApiError, lambda _, error: service.refuse(error))
    app.add_exception_handler(HTTPException, lambda request, error: service.refuse(_no_endpoint(request, error)))
    app.add_exception_handler(Exception, lambda *_: service.refuse(ApiError(500, "a flaw of the server; see its log.")))

    @app.post("/v1/completions", response_model=Completion, openapi_extra=request_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = await read_request(request, CompletionRequest, max_bytes, body_seconds)
        return await service.complete(request, body)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, openapi_extra=request_body(ChatRequest))
    async def chat(request: Request) -> Response:
        body = await read_request(request, ChatRequest, max_bytes, body_seconds)
        return await service.chat(request, body)

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [service.model.model_dump(exclude_unset=True)]}

    @app.get("/v1/models/{model:path}", response_model=Model, response_model_exclude_unset=True)
    async def model(model: str) -> Model:
        return service.find_model(model)

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "unfinished": service.worker.unfinished}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    app.openapi = described_by(app, CompletionRequest, ChatRequest)
    return app


def _no_endpoint(request: Request, error: HTTPException) -> ApiError:
    found = f"{request.method} {request.url.path[:64]}: {str(error.detail).lower()}."
    return ApiError(error.status_code, found, **error.headers or {})
