"""Turns callers' constraints into grammars for workers, in a process that may be killed.

Invariant: whatever a caller sends, an answer comes within ``TRIAL_S`` of its turn, and the event
loop never waits for it. A grammar that was too slow here never reaches a worker.
"""

import subprocess
import sys
from collections import OrderedDict
from functools import partial

import anyio.to_thread
from anyio import CapacityLimiter

from protocol.errors import InvalidRequest, Overloaded, ServingError
from runtime.log import get_log
from runtime.vocabulary import Vocabulary
from server.child_frames import answer_of, end, pipe_of, write_frame
from server.structured.compile_process import Trial, Verdict
from server.structured.constraints import Constraint

log = get_log(__name__)

TRIAL_S = 2.0
START_S = 20.0
MAX_WAITING = 32
MAX_CACHED = 512
MAX_CACHED_BYTES = 8 << 20
_TOO_SLOW = f"it takes more than {TRIAL_S:g} s to compile: make it smaller"
_TOO_LARGE = "it takes too much memory to compile: make it smaller"
_PERHAPS_THE_MACHINE = (_TOO_SLOW, _TOO_LARGE)  # which had no time or no room just then


class GrammarCompiler:
    """One child process, started with the first constraint. ``close`` ends it; use it as a
    context manager.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._child: subprocess.Popen[bytes] | None = None
        self._turn = CapacityLimiter(1)
        self._verdicts: OrderedDict[Constraint, Verdict] = OrderedDict()
        self._cached_bytes = 0

    def __enter__(self) -> "GrammarCompiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def compile(self, constraint: Constraint) -> str:
        """The grammar for ``SamplingParams``.

        Raises:
            InvalidRequest: it is not valid, or too slow; ``param`` is the constraint's.
            Overloaded: too many others wait to be compiled.
        """
        verdict = self._verdicts.get(constraint)
        if verdict is None:
            if self._turn.statistics().tasks_waiting >= MAX_WAITING:
                raise Overloaded("too many grammars wait to be compiled", stage="queue")
            verdict = await anyio.to_thread.run_sync(
                partial(self._try, constraint), limiter=self._turn
            )
            if verdict.reason not in _PERHAPS_THE_MACHINE:
                self._keep(constraint, verdict)
        if verdict.grammar is None:
            raise InvalidRequest(f"{constraint.param}: {verdict.reason}", param=constraint.param)
        return verdict.grammar

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            end(child)

    # In the one thread that has the turn ---------------------------------------------------------

    def _try(self, constraint: Constraint) -> Verdict:
        child = self._child or self._start()
        trial = Trial(kind=constraint.kind, source=constraint.source, lenient=constraint.lenient)
        try:
            write_frame(pipe_of(child.stdin), trial)
            return answer_of(child, TRIAL_S, Verdict)
        except (TimeoutError, OSError, EOFError) as error:
            log.info("grammar refused", reason=type(error).__name__, bytes=len(constraint.source))
            self.close()
            late = isinstance(error, TimeoutError)
            return Verdict(grammar=None, reason=_TOO_SLOW if late else _TOO_LARGE)

    def _start(self) -> subprocess.Popen[bytes]:
        """
        Raises:
            ServingError: the process cannot be started; the next constraint tries again.
        """
        child = self._child = subprocess.Popen(
            [sys.executable, "-m", "server.structured.compile_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            write_frame(pipe_of(child.stdin), self._vocabulary)
            answer_of(child, START_S, Verdict)
        except (TimeoutError, OSError, EOFError) as error:
            self.close()
            raise ServingError("the grammar compiler did not start") from error
        return child

    # On the event loop ---------------------------------------------------------------------------

    def _keep(self, constraint: Constraint, verdict: Verdict) -> None:
        if constraint in self._verdicts:
            return
        self._verdicts[constraint] = verdict
        self._cached_bytes += len(constraint.source)
        while len(self._verdicts) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES:
            dropped, _ = self._verdicts.popitem(last=False)
            self._cached_bytes -= len(dropped.source)
