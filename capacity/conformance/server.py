"""The server under test, seen as the official clients see it: one base URL, one key, one model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

Body = Mapping[str, Any]
MAX_SHOWN_CHARS = 200
_OK = httpx.codes.OK


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """All of a streamed answer. ``events`` are the JSON of its data lines, without ``[DONE]``."""

    status: int
    headers: httpx.Headers
    lines: tuple[str, ...]
    events: tuple[dict[str, Any], ...]
    done: int  # how often [DONE] came
    done_last: bool
    text: str  # of the whole body


class Server:
    """
    Raises, from every call:
        httpx.HTTPError: the server cannot be reached, or not in time.
    """

    def __init__(self, client: httpx.Client, model: str) -> None:
        self._client = client
        self.model = model

    def send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return self._client.request(method, path, **arguments)

    def post(self, path: str, body: Body) -> httpx.Response:
        return self._client.post(path, json={"model": self.model, **body})

    def post_bytes(self, path: str, body: bytes) -> httpx.Response:
        return self._client.post(path, content=body, headers={"content-type": "application/json"})

    def chat(self, **fields: Any) -> dict[str, Any]:
        """The whole answer of a short, greedy chat.

        Raises:
            ValueError: the answer is not a success; the text shows it.
        """
        return _object(self.post("chat/completions", a_chat(**fields)))

    def complete(self, **fields: Any) -> dict[str, Any]:
        """As ``chat``, of a completion."""
        body = {"prompt": "The sea is", "max_tokens": 8, "temperature": 0, **fields}
        return _object(self.post("completions", body))

    def stream_chat(self, **fields: Any) -> Stream:
        return self.stream("chat/completions", a_chat(**fields, stream=True))

    def stream(self, path: str, body: Body) -> Stream:
        with self._client.stream("POST", path, json={"model": self.model, **body}) as answer:
            text = b"".join(answer.iter_bytes()).decode()
        lines = tuple(line for line in text.splitlines() if line.startswith("data:"))
        data = [line.removeprefix("data:").strip() for line in lines]
        return Stream(
            status=answer.status_code,
            headers=answer.headers,
            lines=lines,
            events=tuple(json.loads(item) for item in data if item != "[DONE]"),
            done=data.count("[DONE]"),
            done_last=bool(data) and data[-1] == "[DONE]",
            text=text,
        )


def a_chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Name one colour."}]
    return {"messages": messages, "max_tokens": 8, "temperature": 0, **fields}


def _object(answer: httpx.Response) -> dict[str, Any]:
    if answer.status_code != _OK:
        raise ValueError(f"HTTP {answer.status_code}: {answer.text[:MAX_SHOWN_CHARS]}")
    whole: dict[str, Any] = answer.json()
    return whole
