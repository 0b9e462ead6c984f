"""What clients and the other processes see when a process is killed in mid-request."""

import json
import signal
import threading
import time
from collections.abc import Callable

import httpx
import openai
import psutil
import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start

pytestmark = pytest.mark.timeout(300)
FLAGS = ("--decode-ranks", "2", "--kv-cache", "128MiB", "--dtype", "float32")
LONG = {
    "model": "smollm2",
    "prompt": "Once upon a time",
    "max_tokens": 80,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}
SOON_S = 60.0


@pytest.fixture
def system(start: Start) -> LocalSystem:
    return start("smollm2", *FLAGS)


def eventually(condition: Callable[[], bool], what: str, within_s: float = SOON_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.05)


def ready(system: LocalSystem) -> bool:
    return httpx.get(f"{system.url}/ready", timeout=5).status_code == httpx.codes.OK


def short_request_succeeds(system: LocalSystem) -> bool:
    body = {"model": "smollm2", "prompt": "Hello", "max_tokens": 4}
    answer = httpx.post(f"{system.url}/v1/completions", json=body, timeout=60)
    return answer.status_code == httpx.codes.OK


def attempts_in_flight(system: LocalSystem) -> float:
    name = "headrace_gateway_attempts_in_flight "
    lines = httpx.get(f"{system.url}/metrics", timeout=5).text.splitlines()
    return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def stream_lines(system: LocalSystem, on_chunk: Callable[[int], None]) -> list[str]:
    lines: list[str] = []
    url = f"{system.url}/v1/completions"
    try:
        with httpx.stream("POST", url, json=LONG, timeout=60) as answer:
            assert answer.status_code == httpx.codes.OK
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    lines.append(line.removeprefix("data: "))
                    on_chunk(len(lines))
    except httpx.RemoteProtocolError:
        pass  # the connection is cut after the error event: an unfinished stream must not end well
    return lines


def text_of(lines: list[str]) -> str:
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_stream_outlives_a_killed_worker(system: LocalSystem, role: str) -> None:
    eventually(lambda: ready(system), "ready")
    undisturbed = text_of(stream_lines(system, lambda _: None))
    victim = system.processes(role)[-1]
    others = {
        process.pid
        for name in ("gateway", "prefill", "decode")
        for process in system.processes(name)
    } - {victim.pid}

    def kill(count: int) -> None:
        if count == 3:
            victim.send_signal(signal.SIGKILL)

    lines = stream_lines(system, kill)
    assert lines[-1] == "[DONE]"
    assert text_of(lines) == undisturbed
    eventually(lambda: len(system.processes(role)) > 0 and ready(system), "ready again")
    assert short_request_succeeds(system)
    assert all(psutil.pid_exists(pid) for pid in others)


@pytest.fixture
def impatient(start: Start) -> LocalSystem:
    return start("smollm2", *FLAGS, "--set", "gateway.migration_patience_s=0")


def test_a_stream_that_cannot_go_on_ends_with_an_error_event(impatient: LocalSystem) -> None:
    eventually(lambda: ready(impatient), "ready")
    victim = impatient.processes("decode")[-1]

    def kill(count: int) -> None:
        if count == 3:
            victim.send_signal(signal.SIGKILL)

    lines = stream_lines(impatient, kill)
    assert "[DONE]" not in lines
    error = json.loads(lines[-1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(
        choice["finish_reason"] is None
        for line in lines[:-1]
        for choice in json.loads(line)["choices"]
    )
    eventually(lambda: ready(impatient) and short_request_succeeds(impatient), "serving again")


def test_the_official_client_sees_an_error_when_its_stream_breaks(
    impatient: LocalSystem,
) -> None:
    eventually(lambda: ready(impatient), "ready")
    with openai.OpenAI(base_url=f"{impatient.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="smollm2",
            prompt="Once upon a time",
            max_tokens=80,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with pytest.raises(openai.APIError), stream:  # noqa: PT012  the loop is what raises
            for count, _ in enumerate(stream):
                if count == 3:
                    impatient.processes("decode")[0].send_signal(signal.SIGKILL)
    eventually(lambda: ready(impatient) and short_request_succeeds(impatient), "serving again")


def test_a_prefill_worker_killed_while_it_computes_costs_only_time(system: LocalSystem) -> None:
    eventually(lambda: ready(system), "ready")
    body = {"model": "smollm2", "prompt": [5 + n % 9000 for n in range(2000)], "max_tokens": 4}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{system.url}/v1/completions", json=body, timeout=120))

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: attempts_in_flight(system) > 0, "the prompt is with the workers")
    system.processes("prefill")[0].send_signal(signal.SIGKILL)
    asking.join(120)
    # One prefill worker only: either its successor was there in time, or a clean refusal.
    assert answers[0].status_code in (httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE)
    if answers[0].status_code == httpx.codes.SERVICE_UNAVAILABLE:
        assert "retry-after" in answers[0].headers
    eventually(lambda: ready(system) and short_request_succeeds(system), "serving again")
