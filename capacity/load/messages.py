"""What the command and its worker processes say to each other over pipes.

Every frame is four bytes of length and a msgpack message. All times are nanoseconds of the
monotonic clock, which processes of one machine share.
"""

import msgspec

from capacity.load.address import Address
from capacity.load.api import Api
from capacity.load.arrivals import Arrivals, Ramp
from capacity.load.records import Record
from capacity.load.text import Calibration
from capacity.load.workload import WorkloadSpec

LENGTH_BYTES = 4


class ClosedLoop(msgspec.Struct, frozen=True, kw_only=True, tag="closed"):
    """Each of ``users`` sends its next request when it has the answer to the last; they begin
    evenly over ``ramp_s``.
    """

    users: int
    ramp_s: float = 0.0


class OpenLoop(msgspec.Struct, frozen=True, kw_only=True, tag="open"):
    """Sessions begin on a schedule, whatever the server does."""

    rate: Ramp
    arrivals: Arrivals


class Replay(msgspec.Struct, frozen=True, kw_only=True, tag="replay"):
    """Sessions begin at the trace's times, divided by ``speed``."""

    speed: float = 1.0


Load = ClosedLoop | OpenLoop | Replay


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag="setup"):
    """``worker`` makes the sessions whose number modulo ``workers`` is its own."""

    address: Address
    api: Api
    workload: WorkloadSpec
    calibration: Calibration
    timeout_s: float
    worker: int
    workers: int
    zero_ns: int  # records count from here


class Stage(msgspec.Struct, frozen=True, kw_only=True, tag="stage"):
    """Load from ``start_ns`` for ``duration_s`` or ``sessions``, whichever ends first; then what
    is under way has ``grace_s``. Sessions are numbered from ``first_session``.
    """

    number: int
    load: Load
    start_ns: int
    duration_s: float
    grace_s: float
    first_session: int = 0
    sessions: int | None = None
    late_after_ns: int = 0  # a first token that takes longer is too late, 0: never


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the stage now; what is under way is abandoned."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """What has happened since the last one. ``late``: under way, and the first token already later
    than ``Stage.late_after_ns``.
    """

    worker: int
    records: list[Record]
    under_way: int
    late: int
    chunks: int
    cpu_s: float
    wall_s: float
    lags_ns: list[int]  # how late the event loop ran its own timer
    capped: bool  # there were more requests at a time than this worker may have


class StageEnd(msgspec.Struct, frozen=True, kw_only=True, tag="end"):
    """``load_end_ns``: since when nothing new was sent, counted from the run's zero."""

    worker: int
    sessions: int
    load_end_ns: int


class Trouble(msgspec.Struct, frozen=True, kw_only=True, tag="trouble"):
    """The worker cannot go on."""

    worker: int
    message: str


Order = Setup | Stage | Stop
News = Progress | StageEnd | Trouble


def frame(message: Order | News) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body
