"""ApiError: a reply that is an error, in OpenAI's shape."""

from __future__ import annotations


class ApiError(Exception):
    """A reply that is an error.

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


def server_closes() -> ApiError:
    return ApiError(503, "the server is stopping: ask again when it is back.", code="server_stopping")
