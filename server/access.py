"""API keys: who may call, and how much each caller may ask for.

A key's line in the file is the key itself, or ``sha256:`` and its digest in hex, then options:

    sha256:9f86d0...  name=search  requests_per_minute=60  tokens_per_minute=20000
    sha256:60303a...  name=batch   concurrency=4  priority=-1

Keys are compared by digest, and with every key of the file, so that the time taken tells nothing.
"""

import hashlib
import hmac
import re
from pathlib import Path

import msgspec

from protocol.errors import ConfigError
from server.callers import Caller
from server.quotas import KeyLimits, Quota

_BEARER = b"bearer "
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


class KeyOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str | None = None
    priority: int = 0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


class ApiKey:
    """One line of the file; ``quota`` is shared by all requests that bring the key."""

    def __init__(self, digest: bytes, caller: Caller, limits: KeyLimits) -> None:
        self.digest = digest
        self.caller = caller
        self.quota = Quota(limits)


class ApiKeys:
    def __init__(self, keys: list[ApiKey]) -> None:
        self._keys = keys

    @classmethod
    def read(cls, path: Path) -> "ApiKeys":
        """
        Raises:
            ConfigError: the file cannot be read, has no key, or one that is not valid.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_keys_file {path} cannot be read: {error}") from error
        keys = [
            _read_key(line.split(), where=f"api_keys_file {path} line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        if not keys:
            raise ConfigError(f"api_keys_file {path} has no key: write one a line")
        names = [key.caller.name for key in keys]
        if len(set(names)) < len(names):
            raise ConfigError(f"api_keys_file {path}: two keys have the same name, or are the same")
        return cls(keys)

    def find(self, headers: dict[bytes, bytes]) -> ApiKey | None:
        """The key that a request brings as its bearer token, or as ``x-api-key``."""
        given = headers.get(b"authorization", b"")
        if given[: len(_BEARER)].lower() == _BEARER:
            given = given[len(_BEARER) :]
        else:
            given = headers.get(b"x-api-key", b"")
        digest = hashlib.sha256(given.strip()).digest()
        found = [key for key in self._keys if hmac.compare_digest(digest, key.digest)]
        return found[0] if found and given else None


def _read_key(words: list[str], *, where: str) -> ApiKey:
    secret, *options = words
    hashed = _DIGEST.match(secret)
    digest = bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(secret.encode()).digest()
    given: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name in given:
            raise ConfigError(f"{where}: options are NAME=VALUE, each once")
        given[name] = value
    try:
        read = msgspec.convert(given, KeyOptions, strict=False)
        limits = KeyLimits(
            requests_per_minute=read.requests_per_minute,
            tokens_per_minute=read.tokens_per_minute,
            concurrency=read.concurrency,
        )
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
    name = read.name or digest.hex()[:12]
    if not _NAME.match(name):
        raise ConfigError(f"{where}: a name has 1 to 64 letters, digits, dots, _ or -")
    return ApiKey(digest, Caller(name=name, priority=read.priority), limits)
