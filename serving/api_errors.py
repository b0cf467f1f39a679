"""Errors of the HTTP API: OpenAI's error object with its status, and what each failure becomes.

In: an exception of any kind. Out: an `ApiError`. Its text never repeats what the user sent: it ends up in clients'
logs. Shapes: https://platform.openai.com/docs/guides/error-codes/api-errors.
"""

from __future__ import annotations

import logging
import re
import traceback
from typing import Any

from cluster.errors import UserError
from serving.asking import GenerationFailedError
from serving.interfaces import FeedbackOffError, FeedbackUnavailableError, StreamBrokenError, UnknownRequestError
from serving.strategies import StrategyNotAllowedError

logger = logging.getLogger(__name__)

CLOSED_BY_CLIENT = 499
NOT_READY_RETRY_S = 5

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error with its HTTP status and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: int = 0
    ) -> None:
        """`code` is for programs; the error's type follows from the status. `retry_after_s` above 0 is sent as
        Retry-After, in whole seconds."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        found = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        if self.status == 504:  # OpenAI's clients would ask twice more, and treble the load of a slow server
            found["x-should-retry"] = "false"
        return found


def invalid(param: str, reason: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {reason}", code=code, param=param)


def api_error(error: Exception, request_id: str, unavailable: tuple[type[Exception], ...]) -> ApiError:
    """What `error` is to the caller; what nobody expected is logged, with its place and without its message, which may
    hold the user's text."""
    match error:
        case ApiError():
            return error
        case GenerationFailedError():
            return _generation_error(error)
        case StreamBrokenError():
            return ApiError(503, "the answer broke off: a replica died; ask again", code="stream_broken")
        case UnknownRequestError():
            message = "request_id: there is no such answer to rate; it may be too old, or another key's"
            return ApiError(404, message, code="unknown_request", param="request_id")
        case FeedbackOffError():
            return ApiError(503, "this server takes no feedback", code="feedback_off")
        case FeedbackUnavailableError():
            return ApiError(
                503,
                "feedback cannot be stored now; try again",
                code="feedback_unavailable",
                retry_after_s=NOT_READY_RETRY_S,
            )
        case StrategyNotAllowedError():
            return ApiError(403, str(error), code="model_not_allowed", param="model")
        case UserError():
            return ApiError(400, without_values(str(error)), code="invalid_request")
    if isinstance(error, unavailable):
        logger.warning("%s: a part of the graph is unavailable: %s", request_id, type(error).__name__)
        return ApiError(503, "a part of the server is not ready", code="not_ready", retry_after_s=NOT_READY_RETRY_S)
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed: %s\n%s", request_id, type(error).__name__, where)
    return ApiError(500, "internal error", code="internal_error")


def without_values(reason: str) -> str:
    """A sentence of ours without the value that it quotes, which is the user's."""
    return re.sub(r"got (['\"]).*\1", "got other text", reason)


def _generation_error(error: GenerationFailedError) -> ApiError:
    code, text = error.completion.error_code, error.completion.error
    if code == "context_length_exceeded":
        return ApiError(400, text, code=code, param="messages")
    if code == "unknown_adapter":
        return ApiError(400, text, code=code, param="model")
    if code == "cancelled":
        return ApiError(CLOSED_BY_CLIENT, text, code=code)
    if code == "closed":
        return ApiError(503, text, code="not_ready", retry_after_s=NOT_READY_RETRY_S)
    return ApiError(500, "generation failed", code="internal_error")
