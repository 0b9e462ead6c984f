"""Typed reading of one configuration file: every complaint names the file, the key and the fix.

Knows nothing about models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Fields:
    """The keys of ``source``, a file's name for messages. A null value counts as absent.

    All methods raise ``ConfigError`` when a key is absent without a default, or of another type.
    """

    source: str
    values: Mapping[str, object]

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ConfigError(f"{self.source}: key '{key}' {problem}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def first_of(self, *keys: str) -> str:
        """The first of ``keys`` that is there, or else the first."""
        return next((key for key in keys if self.has(key)), keys[0])

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, f"must be a positive integer, not {value!r}")
        return value

    def token_id(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.fail(key, f"must be a token id, not {value!r}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of ids; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return ()
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, int) and entry >= 0 for entry in entries):
            self.fail(key, f"must be a token id or a list of token ids, not {value!r}")
        return tuple(entries)

    def counts(self, key: str) -> tuple[int, ...]:
        """A list of integers from 0; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, Sequence) or not all(isinstance(v, int) for v in value):
            self.fail(key, f"must be a list of integers, not {value!r}")
        return tuple(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.fail(key, f"must be a number, not {value!r}")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if not 0.0 < value < float("inf"):
            self.fail(key, f"must be a number above 0, not {value!r}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"must be true or false, not {value!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            self.fail(key, f"must be a string, not {value!r}")
        return value

    def inside(self, key: str) -> "Fields | None":
        """The object under ``key``, or None where there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.fail(key, f"must be an object, not {value!r}")
        return Fields(f"{self.source}: {key}", value)

    def require(self, key: str, value: object, *, default: object) -> None:
        """Refuse any other value of a key whose variations are not implemented."""
        found = self.values.get(key)
        if (default if found is None else found) != value:
            self.fail(key, f"is {found!r}; only {value!r} is supported")

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            self.fail(key, "is missing")
        return value
