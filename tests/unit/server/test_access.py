import hashlib
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio.abc import TaskGroup

from protocol.errors import ConfigError, RateLimited
from server.access import ApiKeys
from server.app import create_app
from server.quotas import KeyLimits, Quota
from server.settings import GatewaySettings
from tests.support.generator import ScriptedGenerator
from tests.support.model_text import byte_model_text

TEXT = byte_model_text()
BODY: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 4}


def keys_file(folder: Path, *lines: str) -> Path:
    file = folder / "keys"
    file.write_text("\n".join(("# comment", "", *lines)))
    return file


def send(
    file: Path,
    *requests: tuple[str, dict[str, str]],
    path: str = "/v1/completions",
    generator: ScriptedGenerator | None = None,
) -> list[httpx.Response]:
    """Requests one after another to one application: (key, more headers)."""
    settings = GatewaySettings(api_keys_file=file)
    app = create_app(generator or ScriptedGenerator(text=TEXT), TEXT, settings)

    async def exchange() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            answers = []
            for key, headers in requests:
                given = {"authorization": f"Bearer {key}"} if key else {}
                answers.append(await client.post(path, json=BODY, headers={**given, **headers}))
            return answers

    return anyio.run(exchange)


def test_keys_may_be_written_as_digests_and_brought_in_two_ways(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    file = keys_file(tmp_path, f"sha256:{digest} name=team", "plain-key")
    answers = send(
        file,
        ("secret", {}),
        ("plain-key", {}),
        ("", {"x-api-key": "secret"}),
        ("wrong", {}),
        (digest, {}),
        ("", {}),
    )
    assert [answer.status_code for answer in answers] == [200, 200, 200, 401, 401, 401]
    assert answers[3].json()["error"]["code"] == "invalid_api_key"
    assert answers[3].headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/metrics",
        "/tokenize",
        "/v1/responses/x",
        "/v1/messages",
        "/nothing",
        "/status",
    ],
)
def test_every_path_that_is_not_public_needs_a_key(path: str, tmp_path: Path) -> None:
    (answer,) = send(keys_file(tmp_path, "k"), ("", {}), path=path)
    assert answer.status_code == 401


def test_callers_do_not_share_cached_prompts(tmp_path: Path) -> None:
    generator = ScriptedGenerator(text=TEXT)
    file = keys_file(tmp_path, "one name=a priority=2", "two name=b")
    send(file, ("one", {}), ("two", {}), ("one", {}), generator=generator)
    namespaces = [request.namespace for request in generator.requests]
    assert namespaces == ["key:a", "key:b", "key:a"]
    assert [(r.caller, r.priority) for r in generator.requests[:2]] == [("a", 2), ("b", 0)]


def test_a_request_limit_answers_429_and_says_when_to_come_back(tmp_path: Path) -> None:
    file = keys_file(tmp_path, "k requests_per_minute=2", "other")
    answers = send(file, ("k", {}), ("k", {}), ("k", {}), ("other", {}))
    assert [answer.status_code for answer in answers] == [200, 200, 429, 200]
    remaining = [answer.headers.get("x-ratelimit-remaining-requests") for answer in answers]
    assert remaining == ["1", "0", "0", None]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].json()["error"]["type"] == "rate_limit_error"


def test_a_token_limit_counts_what_was_used_in_the_end(tmp_path: Path) -> None:
    file = keys_file(tmp_path, "k tokens_per_minute=13")
    answers = send(file, ("k", {}), ("k", {}), ("k", {}))  # each uses 2 + 4
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[1].headers["x-ratelimit-limit-tokens"] == "13"


def test_a_refused_request_uses_no_tokens(tmp_path: Path) -> None:
    file = keys_file(tmp_path, "k tokens_per_minute=13")
    wrong = ("k", {"x-request-timeout": "soon"})
    answers = send(file, wrong, wrong, wrong, ("k", {}))
    assert [answer.status_code for answer in answers] == [400, 400, 400, 200]


def test_a_background_response_that_cannot_be_begun_uses_no_tokens(tmp_path: Path) -> None:
    settings = GatewaySettings(api_keys_file=keys_file(tmp_path, "k tokens_per_minute=500"))

    async def remaining() -> int:
        app = create_app(ScriptedGenerator(text=TEXT), TEXT, settings)  # without tasks to run it in
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            body = {"model": "tiny", "input": "hi", "background": True, "max_output_tokens": 400}
            headers = {"authorization": "Bearer k"}
            refused = await client.post("/v1/responses", json=body, headers=headers)
            assert refused.status_code == 400
            return int(refused.headers["x-ratelimit-remaining-tokens"])

    assert anyio.run(remaining) == 500


def caller_with_a_key(
    generator: ScriptedGenerator, settings: GatewaySettings, tasks: TaskGroup
) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=create_app(generator, TEXT, settings, tasks=tasks)),
        base_url="http://gateway",
        headers={"authorization": "Bearer k"},
    )


def test_a_background_response_gives_back_the_tokens_that_it_did_not_use(tmp_path: Path) -> None:
    settings = GatewaySettings(api_keys_file=keys_file(tmp_path, "k tokens_per_minute=500"))
    generator = ScriptedGenerator(text=TEXT, reply="Hello")

    async def remaining() -> int:
        async with (
            anyio.create_task_group() as tasks,
            caller_with_a_key(generator, settings, tasks) as client,
        ):
            body = {"model": "tiny", "input": "hi", "background": True}
            begun = await client.post("/v1/responses", json={**body, "max_output_tokens": 400})
            assert int(begun.headers["x-ratelimit-remaining-tokens"]) < 100
            with anyio.fail_after(10):
                while not generator.closed:
                    await anyio.lowlevel.checkpoint()
            after = await client.get("/v1/models")
        return int(after.headers["x-ratelimit-remaining-tokens"])

    assert anyio.run(remaining) > 400


def test_a_background_response_counts_as_open_until_it_ends(tmp_path: Path) -> None:
    settings = GatewaySettings(api_keys_file=keys_file(tmp_path, "k concurrency=1"))
    generator = ScriptedGenerator(text=TEXT, reply="Hello", block_at=2)

    async def statuses() -> list[int]:
        async with (
            anyio.create_task_group() as tasks,
            caller_with_a_key(generator, settings, tasks) as client,
        ):
            body = {"model": "tiny", "input": "hi", "background": True}
            answers = [await client.post("/v1/responses", json=body) for _ in range(2)]
            begun = answers[0].json()["id"]
            answers.append(await client.post(f"/v1/responses/{begun}/cancel"))
            with anyio.fail_after(10):
                while not generator.closed:
                    await anyio.lowlevel.checkpoint()
            answers.append(await client.post("/v1/responses", json=body))
            tasks.cancel_scope.cancel()
        return [answer.status_code for answer in answers]

    assert anyio.run(statuses) == [200, 429, 200, 200]


def test_requests_at_a_time_are_counted_until_they_end() -> None:
    quota = Quota(KeyLimits(concurrency=2))
    quota.begin(0.0)
    quota.begin(0.0)
    with pytest.raises(RateLimited, match="2 requests open"):
        quota.begin(0.0)
    quota.end()
    quota.begin(0.0)


def test_buckets_fill_evenly() -> None:
    quota = Quota(KeyLimits(requests_per_minute=60, tokens_per_minute=600))
    for _ in range(60):
        quota.begin(100.0)
    with pytest.raises(RateLimited) as refused:
        quota.begin(100.25)
    assert refused.value.retry_after_s == pytest.approx(0.75)
    quota.begin(101.01)
    quota.take_tokens(900, 101.0)  # more than the bucket holds may go when it is full
    with pytest.raises(RateLimited):
        quota.take_tokens(1, 110.0)
    quota.give_back_tokens(890, 110.0)
    quota.take_tokens(500, 110.0)


@pytest.mark.parametrize(
    "line",
    ["k name=a/b", "k rpm=1", "k requests_per_minute=x", "k concurrency=0", "k name", "k a=1 a=2"],
)
def test_a_wrong_line_is_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 3"):
        ApiKeys.read(keys_file(tmp_path, line))


def test_names_are_unique(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same name"):
        ApiKeys.read(keys_file(tmp_path, "a name=x", "b name=x"))


@pytest.mark.parametrize(
    ("given", "status"), [("2.5", 200), ("0", 400), ("-1", 400), ("nan", 400), ("1e9", 400)]
)
def test_a_request_may_bring_its_own_timeout(given: str, status: int, tmp_path: Path) -> None:
    generator = ScriptedGenerator(text=TEXT)
    file = keys_file(tmp_path, "k")
    (answer,) = send(file, ("k", {"x-request-timeout": given}), generator=generator)
    assert answer.status_code == status
    if status == 200:
        assert 2.0 < generator.deadlines_s[0] <= 2.5
