"""Responses that are generated while nobody waits for them.

Invariant: a stored response that is in progress has a task that will finish it, fail it or be
cancelled; the task lives in the gateway's own task group.
"""

from collections.abc import Awaitable, Callable
from functools import partial

import anyio
from anyio.abc import TaskGroup

from protocol.errors import InvalidRequest, Overloaded, ServingError
from runtime.log import get_log
from server.openai.answer import Answer
from server.openai.errors import describe
from server.responses.form import ResponsesForm

log = get_log(__name__)

MAX_RUNNING = 64
Collect = Callable[[list[str]], Awaitable[None]]


class BackgroundResponses:
    """``tasks`` None: there is nowhere to run them."""

    def __init__(self, tasks: TaskGroup | None) -> None:
        self._tasks = tasks
        self.running = 0

    def begin(self, answer: Answer, form: ResponsesForm, collect: Collect) -> bytes:
        """The response as it is now; ``collect`` fills in its text from here on.

        Raises:
            Overloaded: too many are running.
        """
        if self._tasks is None:
            raise InvalidRequest("background: this server does not run any", param="background")
        if self.running >= MAX_RUNNING:
            raise Overloaded(f"{MAX_RUNNING} background responses are running", stage="queue")
        scope = anyio.CancelScope()
        shown = form.begin(answer, scope)
        self.running += 1
        self._tasks.start_soon(partial(self._run, answer, form, collect, scope))
        return shown

    async def _run(
        self, answer: Answer, form: ResponsesForm, collect: Collect, scope: anyio.CancelScope
    ) -> None:
        texts: list[str] = []
        try:
            with scope:
                await collect(texts)
                answer.body(texts)  # stores it
        except Exception as error:
            if not isinstance(error, ServingError):
                log.exception("background response failed")
            form.fail(answer, describe(error))
        finally:
            self.running -= 1
