import json

import httpx
import pytest

from deploy.status import State, ask, lines_of

METRICS = """
# TYPE headrace_worker_up gauge
headrace_worker_up{worker="prefill-0",role="prefill"} 1.0
headrace_worker_up{worker="decode-0/1",role="decode"} 1.0
# TYPE headrace_worker_blocks gauge
headrace_worker_blocks{worker="decode-0/1",role="decode",state="free"} 90.0
headrace_worker_blocks{worker="decode-0/1",role="decode",state="total"} 100.0
# TYPE headrace_gateway_waiting_requests gauge
headrace_gateway_waiting_requests 3.0
"""


def a_gateway(*, ready: bool = True) -> httpx.Client:
    answers = {
        "/ready": (200 if ready else 503, json.dumps({"ready": ready, "reason": "no canary yet"})),
        "/health": (200, "{}"),
        "/v1/models": (200, json.dumps({"data": [{"id": "tiny"}]})),
        "/metrics": (200, METRICS),
    }

    def answer(request: httpx.Request) -> httpx.Response:
        status, text = answers[request.url.path]
        return httpx.Response(status, text=text)

    return httpx.Client(transport=httpx.MockTransport(answer))


def test_the_state_is_what_the_gateway_says() -> None:
    with a_gateway() as client:
        state = ask(client, "http://h")
    assert (state.healthy, state.ready, state.models) == (True, True, ["tiny"])
    assert state.workers["decode-0/1"] == {
        "role": "decode",
        "up": 1.0,
        "blocks_free": 90.0,
        "blocks_total": 100.0,
    }


def test_the_table_has_a_row_for_each_worker() -> None:
    with a_gateway(ready=False) as client:
        lines = lines_of(ask(client, "http://h"))
    assert lines[0] == "http://h  not ready: no canary yet"
    assert [line.split()[0] for line in lines[3:]] == ["worker", "decode-0/1", "prefill-0"]


def test_the_table_says_how_many_of_a_groups_ranks_are_there() -> None:
    figures: dict[str, str | float] = {"role": "decode", "ranks": 3.0}
    prefill: dict[str, str | float] = {"role": "prefill", "ranks": 2.0}  # one row for all ranks
    there = {"decode-0/0": figures, "decode-0/2": figures, "prefill-0": prefill}
    state = State(url="", healthy=True, ready=True, reason="", models=[], workers=there)
    header, *rows = lines_of(state)[3:]
    at = header.index("ranks")
    assert [row[at:].split("  ")[0] for row in rows] == ["2 of 3", "2 of 3", "2"]


@pytest.mark.parametrize("content", [b"[1]", b"<html>not found</html>", b""])
def test_another_server_is_not_taken_for_a_gateway(content: bytes) -> None:
    other = httpx.MockTransport(lambda _: httpx.Response(404, content=content))
    with (
        httpx.Client(transport=other) as client,
        pytest.raises(ValueError, match="not a gateway of headrace"),
    ):
        ask(client, "http://h")
