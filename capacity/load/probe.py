"""What is found out about a server before any load: its model, its dialect, its token count.

A few small requests: the list of models, one generation that tells whether the extensions for exact
output lengths are taken, and one longer prompt that tells how words become tokens.
"""

from dataclasses import dataclass
from time import monotonic_ns

import msgspec
import orjson

from capacity.load.address import Address
from capacity.load.api import Api
from capacity.load.client import Client
from capacity.load.connection import Broken
from capacity.load.errors import ServerUnusable
from capacity.load.records import Failure, Record
from capacity.load.text import Calibration, Text
from capacity.load.workload import nonce_words

_OK = 200
_UNAUTHORISED = (401, 403)
_REFUSES_FIELDS = ("http 400", "http 422")
_SHORT_WORDS, _LONG_WORDS = 16, 144
_LIST_WITHIN_S = 10.0  # nothing is computed for it
_ANSWER_WITHIN_S = 60.0  # a cold server compiles kernels for its first one


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """``token_s``: a guess from two tokens at the pace of one user, 0 where there was no stream."""

    token_s: float
    api: Api
    calibration: Calibration
    models: tuple[str, ...]


async def probe(address: Address, wanted: Api, *, with_nonce: bool) -> Found:
    """
    Raises:
        ServerUnusable: it does not answer, or not as an OpenAI-compatible server would.
    """
    models = await _models(address, wanted)
    client = Client(address, wanted, timeout_s=_ANSWER_WITHIN_S)
    try:
        model = wanted.model or models[0]
        if models and model not in models and wanted.model:
            raise ServerUnusable(f"no model {model!r} at {address.url}; it has {', '.join(models)}")
        client.api = msgspec.structs.replace(wanted, model=model)
        short = await ask_briefly(client, _SHORT_WORDS, with_nonce=with_nonce)
        if short.error in _REFUSES_FIELDS and wanted.exact_length:
            client.api = msgspec.structs.replace(client.api, exact_length=False)
            short = await ask_briefly(client, _SHORT_WORDS, with_nonce=with_nonce)
        if short.error:
            raise ServerUnusable(f"{address.url}{client.api.path}: {short.error}: {short.message}")
        long = await ask_briefly(client, _LONG_WORDS, with_nonce=with_nonce)
    finally:
        client.pool.close()
    return Found(
        token_s=(long.last_token_ns - long.first_token_ns) / 1e9,
        api=client.api,
        calibration=_calibration(short.input_tokens, long.input_tokens),
        models=models,
    )


async def _models(address: Address, wanted: Api) -> tuple[str, ...]:
    client = Client(address, wanted, timeout_s=_LIST_WITHIN_S)
    try:
        status, body = await client.get("/v1/models")
    except Broken as broken:
        hint = "; is it an https URL, or --ca-file missing?" if _speaks_tls(broken) else ""
        raise ServerUnusable(f"{address.url}: {broken.failure}: {broken}{hint}") from None
    finally:
        client.pool.close()
    if status in _UNAUTHORISED:
        raise ServerUnusable(f"{address.url} wants an API key (http {status}): --api-key-file FILE")
    models: list[str] = []
    if status == _OK:
        try:
            models = [str(model["id"]) for model in orjson.loads(body)["data"]]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            models = []
    if not models and not wanted.model:
        raise ServerUnusable(
            f"{address.url}/v1/models lists no model (http {status}); is this an OpenAI-compatible "
            "server? If it is, name the model: --model NAME"
        )
    return tuple(models)


async def ask_briefly(client: Client, words: int = _SHORT_WORDS, *, with_nonce: bool) -> Record:
    """One small request that belongs to no stage, with a prompt that no cache has seen."""
    text = Text()
    prompt = text.words(words, "probe", monotonic_ns())
    if with_nonce:
        prompt = f"{nonce_words(text, 'probe', monotonic_ns())} {prompt}"
    record = Record(index=0, stage=-1, intended_ns=monotonic_ns())
    # Two tokens: some servers' streams of a single token differ from all others.
    request = client.request(client.api.body(prompt, 2))
    await client.ask(request, record)
    return record


def _speaks_tls(broken: Broken) -> bool:
    return "TLS" in str(broken) or broken.failure in (Failure.CLOSED, Failure.MALFORMED)


def _calibration(short: int | None, long: int | None) -> Calibration:
    """One token a word where the server does not count."""
    if short is None or long is None or long <= short:
        return Calibration()
    per_word = (long - short) / (_LONG_WORDS - _SHORT_WORDS)
    return Calibration(overhead=short - per_word * _SHORT_WORDS, per_word=per_word)
