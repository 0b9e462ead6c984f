"""A process that must not outlive the one that started it.

The launcher holds the writing end of a pipe and never writes. The kernel closes it however the
launcher ends, kill -9 included, and a thread that waits for that ends this process. Where Linux
offers a death signal it is asked for too: it works even while this process holds its own lock.
"""

import ctypes
import os
import signal
import sys
import threading

from runtime.settings import PARENT_FD, inherited_fd

ORPHANED = 1
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """End this process at once when its launcher ends. Without a launcher: do nothing.

    Call it first thing in the main thread. KV memory is anonymous, so nothing is left to clean.
    """
    file = inherited_fd(PARENT_FD)
    if file is None:
        return
    os.set_inheritable(file, False)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait_for_end, args=(file,), name="parent-watch", daemon=True).start()


def _wait_for_end(file: int) -> None:
    while os.read(file, 1):
        pass
    os._exit(ORPHANED)
