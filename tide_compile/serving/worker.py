"""Worker: one thread that generates for many clients, a bounded line before it, and jobs that can be given up."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tide_compile.errors import ConfigError
from tide_compile.generation.engine import TIDE
from tide_compile.runtime.overrides import exit_threshold
from tide_compile.serving.reply_text import ReplyText

log = logging.getLogger("tide_compile")


class QueueFullError(Exception):
    """The line is full. ``retry_after``: seconds after which a place is likely to be free."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"all places are taken: try again in {retry_after} s.")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The worker takes no more jobs."""


class Job(BaseStreamer, StoppingCriteria):
    """One request. Iterating over it gives its text as it comes and, where generation failed, raises the error.

    Args:
        prompt: token ids.
        text: takes the new tokens.
        max_tokens: that are generated at most.
        sampling: further arguments of ``generate``.
        threshold: exit threshold of this request, or None.
        seed: of sampling, or None.

    Attributes:
        finish_reason: ``"stop"`` or ``"length"``; None until it has ended, and where it was given up.
    """

    def __init__(
        self,
        prompt: list[int],
        text: ReplyText,
        max_tokens: int,
        sampling: dict[str, object],
        threshold: float | None = None,
        seed: int | None = None,
    ) -> None:
        self.prompt, self.text, self.max_tokens = prompt, text, max_tokens
        self.sampling, self.threshold, self.seed = sampling, threshold, seed
        self.created = time.perf_counter()
        self.finish_reason: str | None = None
        self.future: Future | None = None
        self._given_up = threading.Event()
        self._prompt_seen = False
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue()

    def give_up(self) -> None:
        """Nobody waits for it any more: it leaves the line, or stops after the token that is being computed."""
        self._given_up.set()
        self.future.cancel()

    @property
    def given_up(self) -> bool:
        return self._given_up.is_set()

    def put(self, value: Tensor) -> None:
        """Called by ``generate`` with the prompt, then with every token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.tolist():
            self.send(self.text.add(token))

    def end(self) -> None:
        """Called by ``generate``; the worker goes by its return."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """[B] bool: whether to stop; asked by ``generate`` after every token."""
        stop = self.given_up or self.text.stopped
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)

    def send(self, piece: str | None) -> None:
        """Hand text to who iterates; None ends it."""
        if piece != "":
            self.on_loop(self._pieces.put_nowait, piece)

    def on_loop(self, call: Callable[..., object], *arguments: object) -> None:
        """Have the event loop call it, from any thread. A loop that is closed, because the server has gone without
        waiting, calls nothing."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)

    async def __aiter__(self) -> AsyncIterator[str]:
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if not self.future.cancelled():
            self.future.result()


def one_thread() -> ThreadPoolExecutor:
    """For everything that computes, from loading the model on. libgomp gives every thread that computes helpers of its
    own, and once there are more than cores they sleep between two loops instead of waiting: a model that was loaded in
    another thread decodes at little more than half of the speed."""
    return ThreadPoolExecutor(1, thread_name_prefix="tide-generate")


class Worker:
    """Runs jobs one after the other: the engine has one cache.

    Args:
        waiting: jobs that may wait while one runs.
        finished: called in whichever thread with every job that has ended and its outcome: ``completed``, ``cancelled``
            or ``failed``.
        pool: see ``build_app``.
    """

    def __init__(
        self,
        engine: TIDE,
        tokenizer: PreTrainedTokenizerBase,
        waiting: int,
        finished: Callable[[Job, str], None] = lambda *_: None,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(f"{type(tokenizer).__name__} is no tokenizer of transformers: load one by AutoTokenizer.")
        self._engine, self._waiting, self._finished = engine, waiting, finished
        self._jobs: set[Job] = set()
        self._lock, self._closed = threading.Lock(), False
        self._pool = pool or one_thread()
        self._seconds = 1.0  # of a job, lately
        pads = (engine.model.generation_config.pad_token_id, tokenizer.pad_token_id, 0)
        self._fixed = {
            "pad_token_id": next(p for p in pads if p is not None),
            "num_beams": 1,
            "num_return_sequences": 1,
        }

    @property
    def unfinished(self) -> int:
        """Jobs that wait or run."""
        return len(self._jobs)

    def warmup(self, total_tokens: int) -> float:
        """Compile for requests of up to ``total_tokens`` (prompt and reply); returns the seconds it took."""
        prompt = min(16, total_tokens // 2)
        future = self._pool.submit(self._engine.warmup, prompt_length=prompt, max_new_tokens=total_tokens - prompt)
        return future.result()

    def submit(self, job: Job) -> None:
        """Put a job into the line.

        Raises:
            QueueFullError: there is no place.
            ClosedError: after ``close``.
        """
        with self._lock:
            if self._closed:
                raise ClosedError
            if len(self._jobs) > self._waiting:
                raise QueueFullError(max(1, round(self._seconds)))
            job.future = self._pool.submit(self._run, job)
            self._jobs.add(job)
        job.future.add_done_callback(lambda _: self._ended(job))

    def close(self) -> None:
        """Give all jobs up and wait for the thread to end."""
        with self._lock:
            self._closed = True
            jobs = list(self._jobs)
        for job in jobs:
            job.give_up()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, job: Job) -> None:
        started = time.perf_counter()
        ids = torch.tensor([job.prompt], device=self._engine.model.device)
        if job.seed is None:
            torch.seed()  # what a seeded request has left behind is no chance
        else:
            torch.manual_seed(job.seed)
        with nullcontext() if job.threshold is None else exit_threshold(job.threshold):
            self._engine.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=job,
                stopping_criteria=StoppingCriteriaList([job]),
                max_new_tokens=job.max_tokens,
                **self._fixed,
                **job.sampling,
            )
        if job.given_up:
            return
        job.send(job.text.finish())
        ends = self._engine.model.generation_config.eos_token_id
        ended = job.text.tokens[-1] in (ends if isinstance(ends, list) else [ends])
        job.finish_reason = "stop" if ended or job.text.stopped else "length"
        self._seconds += (time.perf_counter() - started - self._seconds) / 4

    def _ended(self, job: Job) -> None:
        with self._lock:
            self._jobs.discard(job)
        outcome = "completed"
        try:
            job.future.result()
            outcome = "cancelled" if job.given_up else "completed"
        except CancelledError:
            outcome = "cancelled"
        except Exception:
            outcome = "failed"
            log.exception("a request failed")
        self._finished(job, outcome)
        job.send(None)
