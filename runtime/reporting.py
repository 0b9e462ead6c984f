"""What a role tells the process that started it: one JSON object a line on an inherited pipe.

    {"event": "listening", "address": "http://127.0.0.1:8000"}
    {"event": "weights", "done": 41943040, "total": 98361344}
    {"event": "ready", "address": "tcp://127.0.0.1:41234"}
    {"event": "failed", "message": "no file model.gguf"}

Without a launcher nothing is written. A report never fails: the worker does not depend on whoever
watches it. A line is no longer than a pipe's atomic write, so threads need no lock.
"""

import json
import os
import time
from collections.abc import Callable

from runtime.settings import REPORT_FD, inherited_fd

REPORT_EVERY_S = 0.2
MAX_FIELD_CHARS = 500  # a line stays below PIPE_BUF, 4096 on Linux, even if all is escaped


def report(event: str, **fields: str | float | None) -> None:
    """Tell the launcher, if there is one. ``weights`` has ``done`` and ``total`` in bytes."""
    file = inherited_fd(REPORT_FD)
    if file is None:
        return
    short = {
        name: value[:MAX_FIELD_CHARS] if isinstance(value, str) else value
        for name, value in fields.items()
    }
    line = json.dumps({"event": event, **short}).encode() + b"\n"
    try:
        os.write(file, line)
    except OSError:
        return  # the launcher is gone; runtime.parent ends this process


def weights_progress() -> Callable[[int, int], None]:
    """A callback for loaders: reports ``weights`` a few times a second, and the end always."""
    last = float("-inf")

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < REPORT_EVERY_S:
            return
        last = now
        report("weights", done=done, total=total)

    return progress
