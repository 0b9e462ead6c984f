"""Whole systems as users start them. One lives at a time: tests that want the same share it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from benchmarks.local_system import LocalSystem, running_system

Start = Callable[..., LocalSystem]


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    """``start(model, *flags)``: that system, ready. Asking for another one stops it."""
    key: tuple[str, ...] = ()
    current: AbstractContextManager[LocalSystem] | None = None
    system: LocalSystem | None = None

    def stop() -> None:
        nonlocal current
        ending, current = current, None
        if ending is not None:
            ending.__exit__(None, None, None)

    def start_system(model: object, *flags: str) -> LocalSystem:
        nonlocal key, current, system
        wanted = (str(model), *flags)
        if current is None or system is None or wanted != key:
            stop()
            current, key = running_system(*wanted), wanted
            system = current.__enter__()
        return system

    yield start_system
    stop()
