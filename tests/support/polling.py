"""Waiting for what happens in another task or process, with a bound."""

from collections.abc import Callable

import anyio


async def eventually(condition: Callable[[], bool], what: str, *, timeout_s: float = 10.0) -> None:
    """Return when ``condition`` holds; fail, naming ``what``, when it does not come to hold."""
    with anyio.move_on_after(timeout_s):
        while not condition():  # noqa: ASYNC110  what is waited for is in another process or task
            await anyio.sleep(0.002)
        return
    raise AssertionError(f"not within {timeout_s} s: {what}")
