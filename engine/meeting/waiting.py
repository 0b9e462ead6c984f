"""The deadline of a meeting, and the reports on the way to it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import DeadlineExceeded

_REPORT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FormingProgress:
    """What a rank waits for while its group forms."""

    missing_ranks: tuple[int, ...]  # known to the leader only; empty elsewhere
    last_failure: str
    waited_s: float


class Waiting:
    def __init__(
        self,
        deadline_s: float,
        on_progress: Callable[[FormingProgress], None],
        *,
        role: str = "decode",
    ) -> None:
        self._start = time.monotonic()
        self._deadline_s = deadline_s
        self._on_progress = on_progress
        self._role = role
        self._reported_s = 0.0
        self.missing_ranks: tuple[int, ...] = ()
        self.last_failure = ""

    def waited_s(self) -> float:
        return time.monotonic() - self._start

    def left_s(self) -> float:
        return self._deadline_s - self.waited_s()

    def check(self) -> None:
        """Report about once a second.

        Raises:
            DeadlineExceeded: it is over.
        """
        waited_s = self.waited_s()
        if waited_s >= self._deadline_s:
            missing = ", ".join(map(str, self.missing_ranks)) or "not known here"
            raise DeadlineExceeded(
                f"the {self._role} ranks did not meet within {self._deadline_s:g} s; "
                f"missing ranks: {missing}; last failure: {self.last_failure or 'none'}",
                stage="decode",
            )
        if waited_s - self._reported_s >= _REPORT_S:
            self._reported_s = waited_s
            self._on_progress(
                FormingProgress(
                    missing_ranks=self.missing_ranks,
                    last_failure=self.last_failure,
                    waited_s=waited_s,
                )
            )

    def pause(self, seconds: float) -> None:
        self.check()
        time.sleep(seconds)
