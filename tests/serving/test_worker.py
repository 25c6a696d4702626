"""The line before the thread that generates: when it is full, when clients leave, when the server stops or fails."""

import asyncio
import json
import threading

import httpx
import pytest

from bench.serve import serving
from tests.support.held import Held, until
from tide_compile.serving.app import build_app

TOTAL = 128
URL = "/v1/completions"


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
