"""A server that stops while it is at work, and clients that leave it at that: what is told, and what the log says."""

import json
import socket
import threading
import time

import httpx
import pytest

from bench.serve import serving
from tests.support.held import until
from tide_compile.serving.app import build_app

TOTAL = 128
URL = "/v1/completions"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


def connect(url):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30)


def unfinished(url):
    return httpx.get(f"{url}/health").json()["unfinished"]


def read_all(client):
    return b"".join(iter(lambda: client.recv(4096), b""))


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


@pytest.mark.parametrize("running", ["stream", "whole"])
def test_stopped_beyond_its_grace(held, tokenizer, logged, running):
    """Whoever runs, waits or still sends is told: 503 in JSON, or an event and the end of the stream. Catches plain
    text, streams that break off, ones that end as if they were complete, and tracebacks in the log."""
    app = build_app(held, tokenizer, "tiny", total_tokens=TOTAL, warmup=False)
    replies = []

    def ask(stream):
        body = {"prompt": "x", "max_tokens": 100, "stream": stream}
        replies.append(httpx.post(f"{url}{URL}", json=body, timeout=60))

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    first, second = threads if running == "stream" else reversed(threads)
    with serving(app, grace=1) as url:
        first.start()
        until(lambda: held.steps)
        second.start()
        sending = connect(url)
        sending.sendall(HEAD % (100, b"{"))
        until(lambda: unfinished(url) == 2)
        threading.Timer(2, held.gate.set).start()
    for thread in threads:
        thread.join()
    for reply in replies:
        error = {"message": "the server is stopping: ask again when it is back.", "param": None}
        error |= {"type": "server_error", "code": "server_stopping"}
        if reply.headers["content-type"] == "application/json":
            assert reply.status_code == 503 and reply.json() == {"error": error}
        else:
            assert json.loads(reply.text.rpartition("data: ")[2]) == {"error": error}
    assert sorted(reply.status_code for reply in replies) == [200, 503]
    assert read_all(sending).startswith(b"HTTP/1.1 503 ")
    assert not [r for r in logged if r.exc_info] and len(logged) == 1  # uvicorn's own: how many it has cancelled


def test_finished_within_its_grace(held, tokenizer, logged):
    """Catches a server that gives up what it still has the time for."""
    app = build_app(held, tokenizer, "tiny", total_tokens=TOTAL, warmup=False)
    replies = []
    ask = threading.Thread(
        target=lambda: replies.append(httpx.post(f"{url}{URL}", json={"prompt": "x", "max_tokens": 9}, timeout=60))
    )
    with serving(app, grace=30) as url:
        ask.start()
        until(lambda: held.steps)
        threading.Timer(1, held.gate.set).start()
    ask.join()
    assert replies[0].status_code == 200 and replies[0].json()["choices"][0]["finish_reason"] in ("stop", "length")
    assert not logged


@pytest.mark.parametrize("when", ["sending", "waiting", "reading"])
def test_clients_that_hang_up(held, tokenizer, logged, when):
    """While they send, wait for a reply or read a stream: the log has nothing to say, and their place is free.
    Catches a traceback for each."""
    app = build_app(held, tokenizer, "tiny", total_tokens=TOTAL, warmup=False)
    body = json.dumps({"prompt": "x", "max_tokens": 60, "stream": when == "reading"}).encode()
    with serving(app) as url:
        for _ in range(3):
            client = connect(url)
            client.sendall(HEAD % (len(body) + (when == "sending"), body))
            if when != "sending":
                until(lambda: unfinished(url))
            if when == "reading":
                assert client.recv(100)
            time.sleep(0.1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # not even a farewell
            client.close()
        time.sleep(0.2)
        held.gate.set()
        until(lambda: unfinished(url) == 0)
        assert httpx.post(f"{url}{URL}", json={"prompt": "x", "max_tokens": 3}, timeout=60).status_code == 200
    assert not logged


def test_a_body_that_never_comes(held, tokenizer, logged):
    """408, and the connection ends; a slow drip does not help. Catches a place that is taken for ever."""
    app = build_app(held, tokenizer, "tiny", total_tokens=TOTAL, body_seconds=0.5, warmup=False)
    with serving(app) as url:
        for drip in (b"", b" "):
            client, started = connect(url), time.monotonic()
            client.sendall(HEAD % (1000, b"{"))
            for _ in range(4):
                client.sendall(drip)
                time.sleep(0.1)
            reply = read_all(client)
            assert reply.startswith(b"HTTP/1.1 408 ") and 0.4 < time.monotonic() - started < 5
            assert (
                json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"] == "the body was not there after 0.5 s."
            )
    assert not logged
