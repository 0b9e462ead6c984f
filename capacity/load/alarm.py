"""An alarm that rings at a nanosecond of the monotonic clock, give or take the kernel's slack.

Event loops round timers to milliseconds, which is as long as some of the latencies measured here.
On Linux a timerfd wakes the loop instead; elsewhere the loop's own timer does.
"""

import asyncio
import ctypes
import os
import sys
from time import monotonic_ns

_CLOCK_MONOTONIC = 1
_ABSOLUTE = 1
_SECOND = 1_000_000_000


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _Time), ("value", _Time))


class Alarm:
    """One waiter at a time. Close it when done."""

    def __init__(self) -> None:
        self._file = -1
        self._waiter: asyncio.Future[None] | None = None
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            flags = os.O_NONBLOCK | os.O_CLOEXEC
            self._file = self._libc.timerfd_create(_CLOCK_MONOTONIC, flags)
        if self._file >= 0:
            asyncio.get_running_loop().add_reader(self._file, self._ring)

    async def until(self, due_ns: int) -> None:
        """Return at ``due_ns`` or as soon after it as the loop can; at once if that is past."""
        while (remaining := due_ns - monotonic_ns()) > 0:
            if self._file < 0:
                await asyncio.sleep(remaining / _SECOND)
                continue
            self._waiter = asyncio.get_running_loop().create_future()
            setting = _Setting(_Time(0, 0), _Time(*divmod(due_ns, _SECOND)))
            if self._libc.timerfd_settime(self._file, _ABSOLUTE, ctypes.byref(setting), None):
                raise OSError(ctypes.get_errno(), "timerfd_settime")
            await self._waiter

    def close(self) -> None:
        if self._file >= 0:
            asyncio.get_running_loop().remove_reader(self._file)
            os.close(self._file)
            self._file = -1

    def _ring(self) -> None:
        os.read(self._file, 8)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
