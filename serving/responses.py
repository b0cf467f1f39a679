"""JSON as it leaves the server.

In: JSON-ready values, `ApiError`s. Out: responses in UTF-8.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from serving.api_errors import ApiError

JSON = "application/json"


def json_bytes(content: Any) -> bytes:
    """JSON in UTF-8; a lone surrogate, which UTF-8 cannot say, becomes `?`."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(content: Any) -> Response:
    """A 200."""
    return Response(json_bytes(content), media_type=JSON)


def error_response(error: ApiError) -> Response:
    """An error in OpenAI's shape, with its status and headers."""
    return Response(json_bytes(error.body()), status_code=error.status, headers=error.headers(), media_type=JSON)
