"""The line before the thread that generates: when it is full, when clients leave, when the server stops or fails."""

import asyncio
import json
import threading
import time

import httpx
import pytest

from bench.serve import serving
from tide_compile.serving.app import build_app

TOTAL = 128
URL = "/v1/completions"


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.01)


class Held:
    """An engine whose calls wait at a gate before every token."""

    def __init__(self, engine):
        self._engine, self.gate, self.steps = engine, threading.Event(), 0
        self.model, self.config, self.stats, self.warmup = engine.model, engine.config, engine.stats, engine.warmup

    def generate(self, *args, stopping_criteria, **kwargs):
        job = stopping_criteria[0]

        def held(ids, scores, **rest):
            self.steps += 1
            assert self.gate.wait(60)
            return job(ids, scores, **rest)

        return self._engine.generate(*args, stopping_criteria=type(stopping_criteria)([held]), **kwargs)


@pytest.fixture
def held(engine):
    held = Held(engine)
    yield held
    held.gate.set()


def test_a_full_line(held, tokenizer):
    """429 with Retry-After, and those in the line are served. Catches a line without an end."""
    app = build_app(held, tokenizer, "tiny", waiting=2, total_tokens=TOTAL, warmup=False)
    replies = []

    def ask():
        replies.append(httpx.post(f"{url}{URL}", json={"prompt": "x", "max_tokens": 2}, timeout=60).status_code)

    with serving(app) as url:
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: httpx.get(f"{url}/health").json()["unfinished"] == 3)
        reply = httpx.post(f"{url}{URL}", json={"prompt": "x"})
        assert reply.status_code == 429 and int(reply.headers["Retry-After"]) >= 1
        assert reply.json()["error"]["code"] == "queue_full"
        held.gate.set()
        for thread in threads:
            thread.join()
    assert replies == [200] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(held, tokenizer, stream):
    """Frees its place, in the line at once, when running after the token being computed. Catches generation for
    nobody."""
    app = build_app(held, tokenizer, "tiny", waiting=1, total_tokens=TOTAL, warmup=False)
    body = {"prompt": "x", "max_tokens": 100, "stream": stream}

    async def ask_and_leave(both_there):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            first = asyncio.create_task(client.post(URL, json=body))
            while not held.steps:
                await asyncio.sleep(0.01)
            second = asyncio.create_task(client.post(URL, json=body))
            while (await client.get("/health")).json()["unfinished"] != both_there:
                await asyncio.sleep(0.01)
            second.cancel()  # it waits: its place is free while the first is still held
            while (await client.get("/health")).json()["unfinished"] != 1:
                await asyncio.sleep(0.01)
            first.cancel()
            await asyncio.sleep(0.2)

    with serving(app) as url:
        asyncio.run(asyncio.wait_for(ask_and_leave(2), 30))
        steps = held.steps
        held.gate.set()
        until(lambda: httpx.get(f"{url}/health").json()["unfinished"] == 0)
        assert held.steps <= steps + 1
        counted = httpx.get(f"{url}/metrics").text
        assert 'tide_requests_total{outcome="cancelled"} 2.0' in counted
        again = httpx.post(f"{url}{URL}", json={"prompt": "x", "max_tokens": 3}, timeout=60)
        assert again.status_code == 200


def test_shutdown_with_work_left(held, tokenizer):
    """The server ends when a request is still being generated and another waits. Catches a thread that stays."""
    app = build_app(held, tokenizer, "tiny", total_tokens=TOTAL, warmup=False)
    outcomes = []

    def ask():
        try:
            outcomes.append(httpx.post(f"{url}{URL}", json={"prompt": "x", "max_tokens": 100}, timeout=60).status_code)
        except httpx.HTTPError as error:
            outcomes.append(type(error).__name__)

    before = set(threading.enumerate())
    threads = [threading.Thread(target=ask) for _ in range(2)]
    with serving(app, grace=1) as url:
        for thread in threads:
            thread.start()
        until(lambda: held.steps and httpx.get(f"{url}/health").json()["unfinished"] == 2)
        threading.Timer(2, held.gate.set).start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 2 and 200 not in outcomes
    assert not [t.name for t in set(threading.enumerate()) - before if t.name.startswith("tide-generate")]


def test_a_failure_is_told(engine, tokenizer):
    """In both ways of replying, and the next request is served. Catches a worker that dies with a request."""

    class Broken(Held):
        def generate(self, *args, **kwargs):
            self.steps += 1
            if self.steps <= 2:
                raise RuntimeError("broken")
            return self._engine.generate(*args, **kwargs)

    with serving(build_app(Broken(engine), tokenizer, "tiny", total_tokens=TOTAL, warmup=False)) as url:
        reply = httpx.post(f"{url}{URL}", json={"prompt": "x"})
        assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
        assert "broken" not in reply.text
        event = httpx.post(f"{url}{URL}", json={"prompt": "x", "stream": True}).text
        assert json.loads(event.removeprefix("data: "))["error"]["type"] == "server_error"
        assert httpx.post(f"{url}{URL}", json={"prompt": "x"}, timeout=60).status_code == 200
