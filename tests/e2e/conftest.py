"""Whole systems as users start them; each kind is started once per session and shared."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from benchmarks.local_system import LocalSystem, running_system

Start = Callable[..., LocalSystem]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start systems that live as long as the module; the same arguments give the same system."""
    with contextlib.ExitStack() as stack:
        running: dict[tuple[str, ...], LocalSystem] = {}

        def start_system(model: object, *flags: str) -> LocalSystem:
            key = (str(model), *flags)
            if key not in running:
                running[key] = stack.enter_context(running_system(*key))
            return running[key]

        yield start_system
