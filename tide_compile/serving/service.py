"""Service: what the endpoints share. It checks requests, queues them and counts how they end."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from openai.types import Model
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from transformers import PreTrainedTokenizerBase

from tide_compile.generation.engine import TIDE
from tide_compile.metrics import EngineCollector
from tide_compile.serving.errors import ApiError, server_closes
from tide_compile.serving.prompts import Prompts
from tide_compile.serving.replies import ChatReply, CompletionReply, error_event
from tide_compile.serving.requests import ChatRequest, CompletionRequest, GenerationRequest
from tide_compile.serving.stopping import EventStream
from tide_compile.serving.worker import ClosedError, Job, QueueFullError, ReplyText, Worker

_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chats may use what is left


class Service:
    """See ``build_app`` for the arguments.

    Attributes:
        worker: that generates.
        model: as clients are told of it.
        registry: of the metrics.
    """

    def __init__(
        self,
        engine: TIDE,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        waiting: int,
        total_tokens: int,
        pool: ThreadPoolExecutor | None,
    ) -> None:
        self.worker = Worker(engine, tokenizer, waiting, self._count, pool)
        self.model = Model(id=name, created=int(time.time()), object="model", owned_by="tide_compile")
        self._tokenizer, self._prompts, self._total_tokens = tokenizer, Prompts(tokenizer), total_tokens
        self._vocabulary = engine.model.config.get_text_config(decoder=True).vocab_size
        self._has_exits = engine.config.exit_threshold != 1
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, name))
        common = {"registry": self.registry}
        self._requests = Counter("tide_requests", "Requests by outcome", ["outcome"], **common)
        self._tokens = Counter("tide_request_tokens", "Tokens of requests that ended, by kind", ["kind"], **common)
        self._seconds = Histogram("tide_request_seconds", "Seconds of completed requests, waiting included", **common)
        unfinished = Gauge("tide_requests_unfinished", "Requests that wait or run", **common)
        unfinished.set_function(lambda: self.worker.unfinished)

    def find_model(self, name: str) -> Model:
        """Raises ApiError (404) for a name that is not the model's."""
        if name != self.model.id:
            found = f"the model {name[:64]!r} is not here: this server has {self.model.id!r}."
            raise ApiError(404, found, param="model", code="model_not_found")
        return self.model

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        """Raises ApiError, as all of these do."""
        prompt = body.prompt if isinstance(body.prompt, list) else self._prompts.of_text(body.prompt)
        return await self._answer(request, body, prompt, "prompt", CompletionReply)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        return await self._answer(request, body, self._prompts.of_chat(body.messages), "messages", ChatReply)

    def refuse(self, error: ApiError) -> JSONResponse:
        """The reply that is an error. Those of requests that reached the worker are counted there."""
        if error.status < 500:
            self._requests.labels("refused").inc()
        return JSONResponse(error.body(), error.status, error.headers)

    async def _answer(
        self, request: Request, body: GenerationRequest, prompt: list[int], field: str, kind: type[CompletionReply]
    ) -> Response:
        """Queue a request and reply when it is its turn. ``field``: that the prompt came from."""
        self._check(body, prompt, field)
        left = self._total_tokens - len(prompt)
        default = left if kind is ChatReply else min(left, _COMPLETION_TOKENS)
        text = ReplyText(self._tokenizer, body.stop, prompt)
        job = Job(prompt, text, body.wanted or default, body.sampling(), body.exit_threshold, body.seed)
        try:
            self.worker.submit(job)
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full", **{"Retry-After": str(error.retry_after)}) from None
        except ClosedError:
            raise server_closes() from None
        watch = asyncio.create_task(_give_up_when_gone(request, job))
        job.future.add_done_callback(lambda _: job.on_loop(watch.cancel))
        reply = kind(self.model.id, job)
        if body.stream:
            with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return EventStream(reply.events(with_usage), error_event(server_closes()))
        return Response(await reply.whole(), media_type="application/json")

    def _check(self, body: GenerationRequest, prompt: list[int], field: str) -> None:
        if body.model is not None:
            self.find_model(body.model)
        if not prompt:
            raise ApiError(400, f"{field}: there are no tokens, send some text.", param=field)
        if not all(0 <= token < self._vocabulary for token in prompt):
            raise ApiError(400, f"{field}: token ids go from 0 to {self._vocabulary - 1}.", param=field)
        if len(prompt) >= self._total_tokens:
            raise ApiError(
                400,
                f"{field}: {len(prompt)} tokens leave no place for a reply within this server's limit of "
                f"{self._total_tokens}, send less.",
                param=field,
                code="context_length_exceeded",
            )
        if len(prompt) + (body.wanted or 1) > self._total_tokens:
            raise ApiError(
                400,
                f"max_tokens: {len(prompt)} tokens of prompt and {body.wanted} of reply are more than this server's "
                f"limit of {self._total_tokens}, send a shorter prompt or a smaller number.",
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
