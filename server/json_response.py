"""An answer in JSON, written by orjson."""

from http import HTTPStatus
from typing import Any

import orjson
from starlette.responses import Response


def json_response(body: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
