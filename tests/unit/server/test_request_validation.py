"""Bad input over the real application: the right status, the named field, nothing echoed."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import anyio
import httpx
import pytest

from server.app import create_app
from server.settings import GatewaySettings, LimitSettings
from server.text.chat_template import ChatTemplate
from server.text.model_text import ModelText
from tests.support.generator import ScriptedGenerator
from tests.support.model_text import byte_model_text

TEXT = byte_model_text(temperature=0.6, top_k=20)
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
LEAKS = re.compile(r"Traceback|0x[0-9a-f]{4}|/[a-z]+/[a-z]+\.py|site-packages|Error\(")


def request(
    method: str,
    path: str,
    *,
    generator: ScriptedGenerator | None = None,
    settings: GatewaySettings | None = None,
    text: ModelText = TEXT,
    **arguments: Any,
) -> httpx.Response:
    generator = generator or ScriptedGenerator(text=text)
    app = create_app(generator, text, settings or GatewaySettings())

    async def exchange() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, **arguments)

    response = anyio.run(exchange)
    assert generator.opened == generator.closed
    return response


def post(path: str, body: Mapping[str, Any] | bytes, **arguments: Any) -> httpx.Response:
    headers = {"content-type": "application/json", **arguments.pop("headers", {})}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request("POST", path, content=content, headers=headers, **arguments)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": USER, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", **fields}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer that must be one, in the only shape that clients understand."""
    assert response.status_code == status, response.text
    assert len(response.content) <= 4096 + 200
    assert LEAKS.search(response.text) is None
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": "3"}, "n"),
        ({"n": True}, "n"),
        ({"n": 2.0}, "n"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": 10**30}, "n"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"cache_salt": "a/b"}, "cache_salt"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [*USER, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
        ),
        ({"messages": USER * 4097}, "messages"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"json": 1}}, "structured_outputs.json"),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_" + "x" * 99: {}}, "guided_*"),
        ({"response_schema": {}}, "response_schema"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"bootstrap_room": 1}, "bootstrap_room"),
        ({"rid": "x"}, "rid"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"model": None}, "model"),
        ({"model": 1}, "model"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_bad_chat_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = error_of(post(CHAT, chat(**fields)), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1, 100_000]]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_bad_completion_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert error_of(post(COMPLETIONS, completion(**fields)), 400)["param"] == param


def raw_chat(member: bytes) -> bytes:
    return b'{"model":"tiny","messages":[{"role":"user","content":"hi"}],' + member + b"}"


@pytest.mark.parametrize(
    "number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 5000]
)
def test_a_number_that_is_not_finite_is_refused_by_name(number: bytes) -> None:
    error = error_of(post(CHAT, raw_chat(b'"temperature": ' + number)), 400)
    assert (error["param"], error["type"]) == ("temperature", "invalid_request_error")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b"\xff\xfe",
        raw_chat(b'"user":"\xff"'),
        raw_chat(b'"user":"\\ud800"'),
        raw_chat(b'"x":' + b"[" * 65 + b"]" * 65),
        b"[" * 100_000,
        raw_chat(b'"x":' + b'{"a":' * 100_000),
    ],
    ids=lambda body: repr(body[:16] + body[-16:]),
)
def test_a_body_that_is_not_a_json_object_is_a_plain_400(body: bytes) -> None:
    assert error_of(post(CHAT, body), 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("members", "name"),
    [
        (b'"top_k":5,"top_k":5', "top_k"),
        (b'"top_k" :5,"user":":x","top_k":5', "top_k"),
        (b'"\\u0074op_k":5,"top_k":5', "top_k"),
        (b'"metadata":{"x":[1,{"a":1,"a":1}]},"user":"\\":"', "a"),
        (b'"metadata":{"a\\\\":1,"b":"\\\\","c":[{"\\"":1,"\\"":2}]}', None),
        (b'\n  "top_k": 5,\n  "top_k": 9', "top_k"),
    ],
    ids=repr,
)
def test_a_member_that_is_there_twice_is_refused_by_name(members: bytes, name: str | None) -> None:
    error = error_of(post(CHAT, raw_chat(members)), 400)
    assert error["param"] == name
    assert "twice" in error["message"]


@pytest.mark.parametrize(
    "members",
    [
        b'"metadata":{"a":{"a":1},"b":[{"a":1},{"a":1}]}',
        b'"user":":\\":\\\\\\":\\":", "top_k" : 5',
        b'"metadata":{"a\\\\":1,"a":2,"":3,":":4,"\\":":5}',
    ],
    ids=repr,
)
def test_equal_names_in_other_objects_and_colons_in_texts_are_no_repetition(
    members: bytes,
) -> None:
    assert post(CHAT, raw_chat(members)).status_code == 200


def test_sixty_four_levels_of_nesting_are_enough() -> None:
    body = raw_chat(b'"x":' + b"[" * 63 + b"]" * 63)
    assert post(CHAT, body).headers["x-ignored-params"] == "x"


def test_bad_input_is_not_echoed() -> None:
    messages = [{"role": "SECRET", "content": [{"type": "SECRET"}]}] * 200
    response = post(CHAT, chat(messages=messages, model="SECRET"))
    assert "SECRET" not in response.text
    assert len(response.content) < 4096
    assert "SECRET" not in post(CHAT, chat(model="SECRET")).text
    assert "SECRET" not in post(CHAT, chat(guided_SECRET="\n")).text.replace("guided_SECRET", "")


@pytest.mark.parametrize("item", [{}, None, [None], 1.5, True, {"a": [{}]}], ids=repr)
def test_many_wrong_items_make_one_short_error(item: Any) -> None:
    error = error_of(post(COMPLETIONS, completion(prompt=[item] * 2000)), 400)
    assert error["param"].startswith("prompt[0]")


def test_an_unknown_model_is_404() -> None:
    error = error_of(post(CHAT, chat(model="gpt-5")), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "tiny" in error["message"]


def test_without_any_worker_the_answer_is_503_with_retry_after() -> None:
    response = post(CHAT, chat(), generator=ScriptedGenerator(text=TEXT, model_ids=()))
    assert error_of(response, 503)["code"] == "no_worker_available"
    assert int(response.headers["retry-after"]) >= 1


def test_beyond_the_open_requests_the_answer_is_503_with_retry_after() -> None:
    settings = GatewaySettings(max_open_requests=1)
    app = create_app(ScriptedGenerator(text=TEXT, block_at=0), TEXT, settings)

    async def exchange() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://gateway") as client,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(lambda: client.post(CHAT, json=chat()))
            await anyio.wait_all_tasks_blocked()
            response = await client.post(CHAT, json=chat())
            tasks.cancel_scope.cancel()
        return response

    response = anyio.run(exchange)
    assert error_of(response, 503)["code"] == "overloaded"
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("max_tokens", "numbers"), [(None, ("530", "512")), (500, ("21", "500", "512", "491"))]
)
def test_context_overflow_is_400_with_the_numbers(
    max_tokens: int | None, numbers: tuple[str, ...]
) -> None:
    content = "hi" if max_tokens else "x" * 511
    messages = [{"role": "user", "content": content}]
    error = error_of(post(CHAT, chat(messages=messages, max_tokens=max_tokens)), 400)
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in numbers)


def test_a_hopelessly_long_prompt_is_refused_before_tokenising() -> None:
    error = error_of(post(COMPLETIONS, completion(prompt="x" * (512 * 32 + 1))), 400)
    assert error["code"] == "context_length_exceeded"


def test_without_max_tokens_chat_may_fill_the_context() -> None:
    generator = ScriptedGenerator(text=TEXT)
    post(CHAT, chat(), generator=generator)
    assert generator.requests[0].max_total_tokens == 512


def test_the_models_defaults_apply_where_the_caller_is_silent() -> None:
    generator = ScriptedGenerator(text=TEXT)
    post(CHAT, chat(top_k=-1, min_p=None), generator=generator)
    post(CHAT, chat(temperature=0, top_k=5), generator=generator)
    first, second = (request.sampling for request in generator.requests)
    assert (first.temperature, first.top_k, first.min_p) == (0.6, 0, 0.0)
    assert (second.temperature, second.top_k) == (0, 5)


def test_choices_differ_by_their_random_stream_only() -> None:
    generator = ScriptedGenerator(text=TEXT)
    post(CHAT, chat(n=3, seed=-7), generator=generator)
    sampled = [request.sampling for request in generator.requests]
    assert [s.choice for s in sampled] == [0, 1, 2]
    assert {s.seed for s in sampled} == {-7 & (2**63 - 1)}
    assert len({request.request_id for request in generator.requests}) == 3


def test_without_a_seed_each_request_gets_its_own() -> None:
    generator = ScriptedGenerator(text=TEXT)
    for _ in range(2):
        post(CHAT, chat(), generator=generator)
    first, second = generator.requests
    assert first.sampling.seed != second.sampling.seed


def test_ignored_fields_are_listed_and_harmless_values_accepted() -> None:
    fields = {"user": "u", "metadata": {}, "tools": [], "store": False, "tool_choice": "auto"}
    response = post(CHAT, chat(**fields, typo=1, audio=None, max_tokens=3, max_completion_tokens=4))
    assert response.status_code == 200
    ignored = response.headers["x-ignored-params"].split(",")
    assert ignored == ["user", "metadata", "store", "typo", "max_tokens", "tools"]


def test_an_ignored_member_of_stream_options_is_listed() -> None:
    options = {"include_usage": True, "include_obfuscation": True, "chunk": None}
    response = post(CHAT, chat(stream=True, stream_options=options))
    assert response.headers["x-ignored-params"] == "stream_options.include_obfuscation"


def test_effort_turns_reasoning_on_or_off_where_the_template_can_do_no_more() -> None:
    generator = ScriptedGenerator(text=TEXT)
    for effort in ("none", "high"):
        response = post(CHAT, chat(reasoning_effort=effort), generator=generator)
        assert "x-ignored-params" not in response.headers
    off, on = (
        b"".join(map(TEXT.tokenizer.piece, asked.prompt_token_ids)) for asked in generator.requests
    )
    assert on.endswith(b"<think>")
    assert not off.endswith(b"<think>")


def test_effort_that_no_template_knows_is_listed_or_refused() -> None:
    plain = replace(TEXT, template=ChatTemplate("{{ messages }}", special_tokens={}))
    response = post(CHAT, chat(reasoning_effort="low"), text=plain)
    assert response.headers["x-ignored-params"] == "reasoning_effort"
    strict = GatewaySettings(limits=LimitSettings(strict_params=True))
    refused = post(CHAT, chat(reasoning_effort="low"), text=plain, settings=strict)
    assert error_of(refused, 400)["param"] == "reasoning_effort"
    unknown = error_of(post(CHAT, chat(reasoning_effort="my secret")), 400)
    assert unknown["param"] == "reasoning_effort"
    assert "secret" not in unknown["message"]


def test_hostile_field_names_do_not_reach_the_headers() -> None:
    response = post(CHAT, chat(**{"a\r\nset-cookie: x": 1, "é": 1, "x" * 65: 1, "fine": 1}))
    assert response.headers["x-ignored-params"] == "fine"
    assert "set-cookie" not in response.headers


def test_end_tokens_are_stop_tokens_unless_ignored() -> None:
    generator = ScriptedGenerator(text=TEXT)
    post(CHAT, chat(stop_token_ids=[7]), generator=generator)
    post(CHAT, chat(ignore_eos=True), generator=generator)
    end = TEXT.defaults.end_token_ids[0]
    assert [request.stop.stop_token_ids for request in generator.requests] == [(end, 7), ()]


def test_a_cache_salt_keeps_prefixes_apart() -> None:
    generator = ScriptedGenerator(text=TEXT)
    post(CHAT, chat(cache_salt="mine"), generator=generator)
    post(CHAT, chat(), generator=generator)
    assert len({request.namespace for request in generator.requests}) == 2


def test_developer_messages_are_system_messages_and_parts_are_joined() -> None:
    generator = ScriptedGenerator(text=TEXT)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    post(CHAT, chat(messages=[{"role": "developer", "content": parts}]), generator=generator)
    prompt = b"".join(map(TEXT.tokenizer.piece, generator.requests[0].prompt_token_ids))
    assert prompt == b"<|im_start|>system\na\nb<|im_end|>\n<|im_start|>assistant\n"


def test_template_options_reach_the_template() -> None:
    generator = ScriptedGenerator(text=TEXT)
    post(CHAT, chat(chat_template_kwargs={"enable_thinking": True}), generator=generator)
    prompt = b"".join(map(TEXT.tokenizer.piece, generator.requests[0].prompt_token_ids))
    assert prompt.endswith(b"<think>")


def test_a_body_that_announces_too_much_is_413() -> None:
    error_of(post(CHAT, b" " * (8 * 2**20 + 1)), 413)


def test_a_body_that_grows_too_large_is_413() -> None:
    async def chunks() -> Any:
        for _ in range(9):
            yield b" " * 2**20

    headers = {"content-type": "application/json"}
    error_of(request("POST", CHAT, content=chunks(), headers=headers), 413)


@pytest.mark.parametrize(
    "headers",
    [{f"x-{i}": "1" for i in range(70)}, {"x-large": "1" * 17_000}],
    ids=["many", "large"],
)
def test_too_many_headers_are_431(headers: dict[str, str]) -> None:
    error_of(request("GET", "/health", headers=headers), 431)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
    ],
    ids=str,
)
def test_another_content_type_is_415(headers: dict[str, str]) -> None:
    error_of(post(CHAT, chat(), headers=headers), 415)


def test_a_compressed_body_is_415_and_the_answer_says_what_is_wrong_with_it() -> None:
    refused = post(CHAT, chat(), headers={"content-encoding": "gzip"})
    assert "without content-encoding" in error_of(refused, 415)["message"]
    assert refused.headers["accept-encoding"] == "identity"
    assert post(CHAT, chat(), headers={"content-encoding": "identity"}).status_code == 200


def test_json_with_a_charset_is_json() -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    assert post(CHAT, chat(), headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/chat/completions/", "/docs"])
def test_an_unknown_path_is_404_in_the_envelope(path: str) -> None:
    assert error_of(request("GET", path), 404)["type"] == "not_found_error"


def test_a_wrong_method_is_405_and_says_which_is_right() -> None:
    response = request("GET", CHAT)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    several = request("PUT", "/v1/responses/resp_1")
    error_of(several, 405)
    assert set(several.headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}


def test_a_fault_is_a_500_that_tells_nothing_but_the_request_id() -> None:
    generator = ScriptedGenerator(text=TEXT, fail_at=0, error=KeyError("/secret 0x7f00"))
    response = post(CHAT, chat(), generator=generator, headers={"x-request-id": "mine-1"})
    assert "secret" not in error_of(response, 500)["message"]
    assert response.headers["x-request-id"] == "mine-1"


def test_a_decent_request_id_is_echoed_and_never_used_as_a_key() -> None:
    generator = ScriptedGenerator(text=TEXT)
    response = post(CHAT, chat(), generator=generator, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert "mine-1" not in generator.requests[0].request_id
    forged = post(CHAT, chat(), headers={"x-request-id": "a b"})
    assert re.fullmatch(r"[0-9a-f]{24}", forged.headers["x-request-id"])
    assert forged.json()["id"] == f"chatcmpl-{forged.headers['x-request-id']}"


def test_where_keys_are_set_every_other_path_needs_one(tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret-1\nsecret-2\n")
    settings = GatewaySettings(api_keys_file=keys)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret-1"}):
        response = request("GET", "/v1/models", settings=settings, headers=headers)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    right = {"authorization": "Bearer secret-2"}
    assert request("GET", "/v1/models", settings=settings, headers=right).status_code == 200
    assert request("GET", "/metrics", settings=settings).status_code == 401
    assert request("GET", "/health", settings=settings).status_code == 200


def test_ready_says_what_is_missing() -> None:
    assert request("GET", "/ready").status_code == 200
    response = request("GET", "/ready", generator=ScriptedGenerator(text=TEXT, ready=False))
    assert response.status_code == 503
    assert response.json()["reason"] == "no decode worker has announced itself"
    assert request("GET", "/health", generator=ScriptedGenerator(text=TEXT, ready=False)).is_success


def test_strict_params_refuse_what_would_be_ignored() -> None:
    strict = GatewaySettings(limits=LimitSettings(strict_params=True))
    error = error_of(post(CHAT, chat(user="me", unheard_of=1), settings=strict), 400)
    assert error["param"] in ("user", "unheard_of")
    assert post(CHAT, chat(), settings=strict).status_code == 200


def test_texts_and_chats_are_tokenised_as_they_would_be_for_an_answer() -> None:
    plain = post("/tokenize", {"prompt": "hi", "return_token_strs": True}).json()
    assert plain["tokens"] == TEXT.tokenizer.encode("hi", add_special_tokens=True)
    assert (plain["count"], plain["max_model_len"]) == (2, 512)
    assert plain["token_strs"] == ["h", "i"]
    generator = ScriptedGenerator(text=TEXT)
    post(CHAT, chat(), generator=generator)
    asked = post("/tokenize", chat()).json()
    assert tuple(asked["tokens"]) == generator.requests[0].prompt_token_ids
    back = post("/detokenize", {"model": "tiny", "tokens": asked["tokens"]}).json()
    assert back["prompt"].startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [99_999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [5] * 513}, "tokens"),
    ],
)
def test_what_cannot_be_tokenised_is_refused_by_name(
    path: str, body: dict[str, Any], param: str
) -> None:
    assert error_of(post(path, body), 400)["param"] == param


def test_the_api_describes_its_request_bodies() -> None:
    document = request("GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    assert {"messages", "model"} <= set(schemas["ChatRequest"]["required"])
    assert schemas["ChatRequest"]["properties"]["n"]["anyOf"][0]["minimum"] == 1
    text = json.dumps(document)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in schemas
    operations = [one for path in document["paths"].values() for one in path.values()]
    assert len({one["operationId"] for one in operations}) == len(operations) > 15
    assert "delete" in document["paths"]["/v1/responses/{id}"]
