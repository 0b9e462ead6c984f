"""Looks for lower ranks from a group that is led by another than rank 0."""

import threading
from collections.abc import Sequence

from engine.meeting.visit import answers

_EVERY_S = 1.0


class Lookout:
    """``found``: one of ``addresses`` answers, so the group should meet there."""

    def __init__(self, addresses: Sequence[str], group: str) -> None:
        self._addresses = addresses
        self._group = group
        self._stopped = threading.Event()
        self.found = False
        threading.Thread(target=self._look, name="lookout", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _look(self) -> None:
        while not self.found and not self._stopped.wait(_EVERY_S):
            self.found = any(answers(address, self._group) for address in self._addresses)
