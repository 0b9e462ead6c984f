"""Who sent a request, as far as serving it depends on that."""

from dataclasses import dataclass

from protocol.requests import DEFAULT_NAMESPACE


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The holder of an API key. Where there are no keys everybody is ``ANYONE``.

    Requests of another ``name`` never share cached prompts, and see no stored responses. Higher
    ``priority`` waits less.
    """

    name: str
    priority: int = 0

    def namespace(self, cache_salt: str | None) -> str:
        """Of the prefix cache."""
        own = f"key:{self.name}" if self.name else DEFAULT_NAMESPACE
        return own if cache_salt is None else f"{own}/salt:{cache_salt}"


ANYONE = Caller(name="")
