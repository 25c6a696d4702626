"""What a server that stops still answers: requests that it cancels, 503; streams, an event that says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tide_compile.serving.errors import server_closes


class AnswerCancelled:
    """ASGI middleware. A server whose time to stop is over cancels what it is at; left alone, its clients would get
    plain text or nothing, and its log a traceback for each.

    Args:
        app: that is wrapped.
        answering: the tasks that are at a request, kept up to date.
    """

    def __init__(self, app: ASGIApp, answering: set[asyncio.Task]) -> None:
        self._app, self._answering = app, answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, task = False, asyncio.current_task()

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        self._answering.add(task)
        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            if not started:
                error = server_closes()
                await JSONResponse(error.body(), error.status, {"Connection": "close"})(scope, receive, send)
        finally:
            self._answering.discard(task)


class EventStream(Response):
    """Server-sent events. Starlette's own streams cannot be ended by an event once they are cancelled.

    Args:
        events: as they are sent.
        last: sent in the place of those to come when the server stops.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], last: str) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._events, self._last = events, last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        except asyncio.CancelledError:
            await send({"type": "http.response.body", "body": self._last.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
