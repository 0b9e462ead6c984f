"""When requests are meant to be sent: schedules of an open loop, pure and repeatable.

A schedule is made by stretching time. Arrivals of rate one are drawn first (evenly spaced,
exponential or gamma gaps); then each is put where the integral of the wanted rate reaches it, so
that constant, Poisson and bursty traffic can all ramp. Nothing is rescaled to end at a certain
moment: that would remove the variance that makes queues.
"""

import math
from collections.abc import Iterator
from random import Random

import msgspec

from capacity.load.errors import WrongOption


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """``shape`` is that of the gamma distribution of gaps: below one is burstier than Poisson,
    one is Poisson, infinity evenly spaced. The coefficient of variation is 1 / sqrt(shape).
    """

    kind: str = "poisson"
    shape: float = 1.0

    def gaps(self, source: Random) -> Iterator[float]:
        """Gaps of mean one, without end."""
        if math.isinf(self.shape):
            while True:
                yield 1.0
        while True:
            yield source.gammavariate(self.shape, 1.0 / self.shape)


class Ramp(msgspec.Struct, frozen=True):
    """Requests per second, from ``start`` to ``end`` in a straight line."""

    start: float
    end: float

    @property
    def mean(self) -> float:
        return (self.start + self.end) / 2


def parse_arrivals(written: str) -> Arrivals:
    """``poisson``, ``constant`` or ``gamma:SHAPE``.

    Raises:
        WrongOption: it is none of them.
    """
    kind, colon, number = written.partition(":")
    if kind == "poisson" and not colon:
        return Arrivals()
    if kind == "constant" and not colon:
        return Arrivals(kind=kind, shape=math.inf)
    if kind == "gamma":
        try:
            shape = float(number or "0.25")
        except ValueError:
            shape = 0.0
        if shape > 0:
            return Arrivals(kind=kind, shape=shape)
    raise WrongOption(
        f"--arrivals {written!r}: write poisson, constant or gamma:SHAPE with a shape above 0"
    )


def schedule(arrivals: Arrivals, rate: Ramp, duration_s: float, source: Random) -> Iterator[float]:
    """Seconds since the start at which requests are due, ascending, below ``duration_s``.

    The first gap is drawn like the others, so a Poisson schedule has no request at 0 by rule.
    """
    slope = (rate.end - rate.start) / duration_s
    area = 0.0
    for gap in arrivals.gaps(source):
        area += gap
        due = _reached(area, rate.start, slope)
        if due is None or due >= duration_s:
            return
        yield due


def _reached(area: float, start: float, slope: float) -> float | None:
    """When the integral of ``start + slope * t`` reaches ``area``; None for never."""
    if slope == 0.0:
        return area / start if start > 0 else None
    inside = start * start + 2.0 * slope * area
    return None if inside < 0 else (math.sqrt(inside) - start) / slope
