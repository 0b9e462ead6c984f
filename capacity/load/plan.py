"""What a person asked for, complete and checked, before anything is sent."""

from dataclasses import dataclass
from pathlib import Path

from capacity.load.address import Address
from capacity.load.api import Api
from capacity.load.arrivals import Arrivals, Ramp
from capacity.load.errors import WrongOption
from capacity.load.faults import Fault
from capacity.load.messages import ClosedLoop, Load, OpenLoop, Replay
from capacity.load.objectives import Objectives
from capacity.load.workload import WorkloadSpec

QUICK_USERS = (1, 4, 16)
QUICK_S = 12.0
STAGE_S = 15.0  # of a sweep
SINGLE_S = 30.0
SLOW_TOKEN_S = 0.05  # from here on the default output is the brief one
BRIEF_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    label: str
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``warmup_s`` None: a tenth of the load's time. ``sessions`` bounds a stage besides its
    duration. ``settings`` is what the report shows, as it was typed.
    """

    address: Address
    api: Api
    stages: tuple[StagePlan, ...]
    duration_s: float
    workload: WorkloadSpec
    settings: dict[str, str]
    out: Path
    sessions: int | None = None
    warmup_s: float | None = None
    grace_s: float = 60.0
    timeout_s: float = 120.0
    objectives: Objectives | None = None
    search: bool = False
    faults: tuple[Fault, ...] = ()
    gpus: int | None = None
    workers: int = 1
    parquet: bool = False
    brief_if_slow: bool = False  # ask a slow server for short answers, since nobody said how long


def parse_users(written: str) -> list[StagePlan]:
    """``8``, a sweep ``1,4,16``, or ``1..32``: one more user at a time during one stage."""
    first, dots, last = written.partition("..")
    if dots:
        least, most = _whole(first, "--concurrency"), _whole(last, "--concurrency")
        if least > most:
            raise WrongOption(f"--concurrency {written}: write the smaller number first")
        return [StagePlan(label=f"concurrency {written}", load=ClosedLoop(users=most, ramp_s=-1.0))]
    users = [_whole(word, "--concurrency") for word in written.split(",")]
    return [StagePlan(label=f"concurrency {n}", load=ClosedLoop(users=n)) for n in users]


def parse_rates(written: str, arrivals: Arrivals) -> list[StagePlan]:
    """``4.5``, a sweep ``1,2,4`` or a ramp ``1..20``, in requests per second."""
    first, dots, last = written.partition("..")
    if dots:
        ramp = Ramp(_rate(first), _rate(last))
        return [StagePlan(label=f"{written} req/s", load=OpenLoop(rate=ramp, arrivals=arrivals))]
    rates = [_rate(word) for word in written.split(",")]
    return [rate_stage(rate, arrivals) for rate in rates]


def rate_stage(rate: float, arrivals: Arrivals) -> StagePlan:
    return StagePlan(
        label=f"{rate:g} req/s", load=OpenLoop(rate=Ramp(rate, rate), arrivals=arrivals)
    )


def replay_stage(speed: float) -> StagePlan:
    label = "trace" if speed == 1 else f"trace, {speed:g} times as fast"
    return StagePlan(label=label, load=Replay(speed=speed))


def _whole(text: str, option: str) -> int:
    if not text.strip().isdigit() or not int(text):
        raise WrongOption(f"{option}: {text!r} is no whole number of at least 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise WrongOption(f"--rate: {text!r} is no number above 0")
    return rate
