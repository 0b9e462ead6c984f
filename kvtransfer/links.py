"""What each link to a decode rank is, and what has gone over it since it came up.

One ``Link`` is written by its channel's thread and read by others. A probe's figure and a
transfer's are bytes in a second of writing: waiting for something to send does not count.
"""

import threading
import time

from kvtransfer.choice import FAR_BELOW, NEAR, Route, expected_bytes_per_s, is_far_below
from protocol.ids import WorkerId
from protocol.workers import LinkReport
from runtime.log import get_log

_log = get_log(__name__)
PROBE_FRAME_BYTES = 256 * 1024
MEASUREMENTS = 3
"""A slow one may only mean that something else had the cores for a moment; the best one counts."""
_ADVICE = {
    True: "harmless where other programs keep this machine busy; else give the workers more cores",
    False: "check which interface the workers use, and whether something else fills the network",
}


class Link:
    def __init__(self, prefill: WorkerId, decode: WorkerId) -> None:
        self._prefill = prefill
        self._decode = decode
        self._lock = threading.Lock()
        self._route: Route | None = None
        self._probe_started = 0.0
        self._probes_left = 0
        self._probe_bytes = 0
        self._measured = 0.0
        self._measurements = 0
        self._bytes = 0
        self._seconds = 0.0
        self._lost = 0

    def up(self, route: Route) -> None:
        with self._lock:
            self._route = route
            self._measured, self._measurements = 0.0, 0
        _log.info(
            "kv link is up",
            to=self._decode,
            transport=route.transport,
            why=route.reason,
        )

    def moved(self, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self._bytes += num_bytes
            self._seconds += seconds

    def lost(self) -> None:
        with self._lock:
            self._lost += 1

    def probing(self, count: int, frame_bytes: int) -> None:
        """So many frames are sent from now on. The time until the last answer counts: answers may
        have been waiting for a look, so the time between them says nothing.
        """
        self._probe_started = time.monotonic()
        self._probes_left, self._probe_bytes = count, count * frame_bytes

    def probed(self) -> bool:
        """The decode rank has taken one more probe. The answer is as that of ``measured``."""
        self._probes_left -= 1
        if self._probes_left == 0:
            took = max(time.monotonic() - self._probe_started, 1e-9)
            return self.measured(self._probe_bytes / took)
        return False

    def measured(self, bytes_per_s: float) -> bool:
        """True where the link seems slow and had better be measured once more."""
        with self._lock:
            best = self._measured = max(self._measured, bytes_per_s)
            self._measurements += 1
            route, count = self._route, self._measurements
        if route is None or not is_far_below(best, route.transport, route.place):
            return False
        if count < MEASUREMENTS:
            return True
        expected = expected_bytes_per_s(route.transport, route.place)
        _log.warning(
            "kv link is slow",
            to=self._decode,
            transport=route.transport,
            place=route.place,
            measured_mb_s=round(best / 1e6),
            best_of=count,
            expected_mb_s=round(expected / 1e6),
            warned_below_mb_s=round(FAR_BELOW * expected / 1e6),
            advice=_ADVICE[route.place in NEAR],
        )
        return False

    def report(self) -> LinkReport | None:
        """None before the link has come up."""
        with self._lock:
            route = self._route
            if route is None:
                return None
            return LinkReport(
                prefill=self._prefill,
                decode=self._decode,
                transport=route.transport,
                reason=route.reason,
                bytes=self._bytes,
                seconds=self._seconds,
                measured_bytes_per_s=self._measured,
                expected_bytes_per_s=expected_bytes_per_s(route.transport, route.place),
                lost=self._lost,
            )
