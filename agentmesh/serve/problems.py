"""Requests that end with an error, in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any, final

from agentmesh.errors import AgentmeshError, NodeError, RemoteError, RequestTooLongError, UsageError

INVALID = "invalid_request_error"
OVERLOADED = "overloaded_error"
SERVER = "server_error"


@final
class RefusedError(AgentmeshError):
    """A request that ends with an error.

    Attributes:
        status: the HTTP status.
        kind: OpenAI's word for the kind of error.
        param: the parameter that is wrong, where one is.
        code: a word for programs.
        retry_after: seconds after which it may be tried again; 0 where trying again does not help.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = INVALID, param: str = "", code: str = "", retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        facts = {"type": self.kind, "param": _sendable(self.param) or None, "code": self.code or None}
        return {"error": {"message": _sendable(str(self)), **facts}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that say when to try again; OpenAI's clients would try a failed run again by themselves."""
        if self.retry_after:
            return {"Retry-After": str(self.retry_after)}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


def _sendable(text: str) -> str:
    """A text without halves of characters, which JSON can bring in and UTF-8 cannot carry out again."""
    return text.encode("utf-8", "replace").decode()


def busy(message: str, retry_after: int) -> RefusedError:
    """There is no room now."""
    return RefusedError(429, message, kind=OVERLOADED, code="overloaded", retry_after=retry_after)


def refusal(error: BaseException) -> RefusedError:
    """What a run that ended with an error is for the one who asked for it."""
    if isinstance(error, RefusedError):
        return error
    cause = error.__cause__ if isinstance(error, NodeError) else error
    if isinstance(cause, UsageError):
        code = "context_length_exceeded" if isinstance(cause, RequestTooLongError) else "invalid_input"
        return RefusedError(400, str(error), code=code)
    if isinstance(cause, RemoteError):
        return RefusedError(502, str(error), kind=SERVER, code="endpoint_failed")
    if isinstance(error, AgentmeshError):
        return RefusedError(500, str(error), kind=SERVER, code="run_failed")
    return RefusedError(500, "the run failed for a reason of the server's own; its log says more", kind=SERVER)
