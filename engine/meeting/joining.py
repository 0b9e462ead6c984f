"""How the engine loop comes by its group: what it asks for, and how the settings answer it."""

from collections.abc import Callable, Collection
from typing import Protocol

from engine.collectives import StepGroup
from engine.meeting.waiting import FormingProgress
from engine.rendezvous import Rendezvous
from protocol.errors import Cancelled
from runtime.log import get_log

log = get_log(__name__)

QUIET_S = 5.0  # ranks start at different speeds; only a longer wait is worth a line
BRIEFLY_S = 10.0


def tell_others(
    failure: str, make_rendezvous: Callable[[], Rendezvous], *, deadline_s: float
) -> None:
    """Say why this rank cannot take part: the others would wait for it for as long as they may."""
    log.error("this rank cannot serve, and tells the others", reason=failure)
    make_rendezvous().tell(failure, deadline_s=deadline_s)


class Meeting(Protocol):
    @property
    def newcomers(self) -> bool:
        """Somebody wants to join the group; read before every step."""
        ...

    def form(
        self, given_up: Callable[[], bool], leaving: Collection[int], *, briefly: bool
    ) -> StepGroup:
        """The next group, without the seats that are ``leaving``.

        ``briefly``: clients wait, and would better go on elsewhere than for long.

        Raises:
            DeadlineExceeded: too few came.
            Cancelled: ``given_up`` became true.
            ConfigError: this rank does not fit in; it must end.
        """
        ...

    def close(self) -> None: ...


class RankMeeting:
    """Waits for ``patience_s`` where no client does."""

    def __init__(self, rendezvous: Rendezvous, *, patience_s: float) -> None:
        self._rendezvous = rendezvous
        self._patience_s = patience_s

    @property
    def newcomers(self) -> bool:
        return self._rendezvous.newcomers

    def form(
        self, given_up: Callable[[], bool], leaving: Collection[int], *, briefly: bool
    ) -> StepGroup:
        def progress(forming: FormingProgress) -> None:
            if given_up():
                raise Cancelled("the rank was told to stop")
            if forming.waited_s > QUIET_S:
                missing = ",".join(map(str, forming.missing_ranks))
                log.info("waiting for the other ranks", missing=missing, waited_s=forming.waited_s)

        return self._rendezvous.form(
            deadline_s=min(BRIEFLY_S, self._patience_s) if briefly else self._patience_s,
            leaving=leaving,
            on_progress=progress,
        )

    def close(self) -> None:
        self._rendezvous.close()
