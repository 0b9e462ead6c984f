"""Prompts too long to be read in the gateway's own process: in a child that may be killed.

Tokenising costs up to some microseconds a character, and callers choose the characters: megabytes
of one kind hold a core for half a minute, in a thread that nobody can stop. The child has the same
model's files and does nothing else.

Invariant: a text costs at most ``PATIENCE_S`` once it has its turn, and nothing once its caller has
gone.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import anyio.to_thread
from anyio import CapacityLimiter

from protocol.errors import InvalidRequest, Overloaded, ServingError
from runtime.log import get_log
from server.child_frames import answer_of, end, pipe_of, write_frame
from server.text.long_text_process import Job, Tokenised
from server.text.model_text import ChatPrompt

log = get_log(__name__)

LONG_CHARS = 262_144  # a second's work at worst; anything shorter is done in a thread
PATIENCE_S = 10.0
START_S = 60.0
MAX_WAITING = 8


class LongTexts:
    """One child process, started with the first long text. ``close`` ends it; use it as a context
    manager.
    """

    def __init__(self, model: Path) -> None:
        self._model = model
        self._child: subprocess.Popen[bytes] | None = None
        self._turn = CapacityLimiter(1)

    def __enter__(self) -> "LongTexts":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def tokenise(self, job: Job, *, param: str) -> ChatPrompt:
        """
        Raises:
            InvalidRequest: it takes too long, or the model's template refuses it.
            Overloaded: too many others wait for their turn.
        """
        if self._turn.statistics().tasks_waiting >= MAX_WAITING:
            raise Overloaded("too many long prompts wait to be tokenised", stage="queue")
        async with self._turn:
            try:
                result = await anyio.to_thread.run_sync(
                    partial(self._ask, job, param), abandon_on_cancel=True
                )
            except anyio.get_cancelled_exc_class():
                child, self._child = self._child, None
                if child is not None:
                    child.kill()  # which ends the thread's wait
                raise
        if result.token_ids is None:
            raise InvalidRequest(result.reason, param=param)
        return ChatPrompt(result.token_ids, result.reasons)

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            end(child)

    def _ask(self, job: Job, param: str) -> Tokenised:
        child = self._child or self._start()
        try:
            write_frame(pipe_of(child.stdin), job)
            return answer_of(child, PATIENCE_S, Tokenised)
        except (TimeoutError, OSError, EOFError) as error:
            log.info("long text given up", reason=type(error).__name__)
            end(child)
            if self._child is child:
                self._child = None
            reason = f"{param}: takes more than {PATIENCE_S:g} s to tokenise: shorten it"
            return Tokenised(reason=reason)

    def _start(self) -> subprocess.Popen[bytes]:
        """
        Raises:
            ServingError: the process cannot be started; the next text tries again.
        """
        child = self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "server.text.long_text_process", str(self._model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            answer_of(child, START_S, Tokenised)
        except (TimeoutError, OSError, EOFError) as error:
            self.close()
            raise ServingError("the process for long prompts did not start") from error
        return child
