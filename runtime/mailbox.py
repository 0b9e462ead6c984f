"""How an engine thread and its process's event loop talk: two queues, each with one owner.

Whatever an engine thread owns (pools, schedulers, tensors) is touched by that thread alone; the
event loop and the transport threads only post to its ``Inbox``.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Into the engine thread, from any thread."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._filled = threading.Event()

    def put(self, item: T) -> None:
        self._items.append(item)
        self._filled.set()

    def drain(self) -> list[T]:
        """Everything posted so far, oldest first. Only the engine thread calls this."""
        if not self._items:
            return []
        self._filled.clear()  # before reading: what is posted in between sets it again
        items: list[T] = []
        while self._items:
            items.append(self._items.popleft())
        return items

    def wait(self, timeout_s: float) -> None:
        """Return when something is there to drain, at the latest after ``timeout_s``."""
        self._filled.wait(timeout_s)


class Outbox(Generic[T]):
    """Out of the engine thread: iterate it on the event loop that made it. The iteration ends when
    it is closed and everything that was put there before has been taken.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()
        self._filled = asyncio.Event()
        self._closed = False

    def close(self) -> None:
        """Nothing will be put here any more. On the event loop."""
        self._closed = True
        self._filled.set()

    def put(self, items: Iterable[T]) -> None:
        """Thread-safe; one wake-up of the event loop, however many items."""
        self._items.extend(items)
        try:
            self._loop.call_soon_threadsafe(self._filled.set)
        except RuntimeError:
            self._items.clear()  # the loop has ended: nobody is left to tell

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            self._filled.clear()
            await self._filled.wait()
        return self._items.popleft()
