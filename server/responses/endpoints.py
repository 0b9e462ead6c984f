"""Stored responses: ask for one again, delete it, cancel one that runs in the background."""

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from protocol.errors import InvalidRequest
from server.callers import ANYONE, Caller
from server.json_response import json_response
from server.openai.errors import HttpError
from server.responses.store import ResponseNotFound, ResponseStore, StoredResponse


class StoredResponseEndpoints:
    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def show_or_delete(self, request: Request) -> Response:
        """One route for both, so that a wrong method is told of both."""
        return await (self.delete if request.method == "DELETE" else self.retrieve)(request)

    async def retrieve(self, request: Request) -> Response:
        return json_response(self._find(request).shown)

    async def delete(self, request: Request) -> Response:
        found = self._find(request)
        if found.running is not None:
            found.running.cancel()
        self._store.delete(found.shown["id"], _caller(request).name)
        return json_response({"id": found.shown["id"], "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        found = self._find(request)
        if not found.shown["background"]:
            raise InvalidRequest("only a response with background: true can be cancelled")
        if found.running is not None:
            found.running.cancel()
            found.running = None
            found.shown["status"] = "cancelled"
        return json_response(found.shown)

    def _find(self, request: Request) -> StoredResponse:
        try:
            return self._store.get(request.path_params["id"], _caller(request).name)
        except ResponseNotFound as error:
            raise HttpError(HTTPStatus.NOT_FOUND, str(error)) from None


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope["state"].get("caller", ANYONE)
    return caller
