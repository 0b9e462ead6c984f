"""Service level objectives: limits that each request must hold, and the share that must hold them.

A request is *good* when it succeeded within all limits. Latency counts from the intended time, and
attempts that failed are attempts: nothing that the client saw is left out of the denominator.
"""

import math
import re
from itertools import pairwise

import msgspec

from capacity.load.errors import WrongOption
from capacity.load.records import Record

DEFAULT_SHARE = 0.99
_SECONDS = {"ms": 1e-3, "s": 1.0, "us": 1e-6}
_NAMES = ("ttft", "tpot", "icl", "e2e")
_TERM = re.compile(r"([a-z0-9]+)\s*(?:=|<=|<)\s*([0-9.]+)\s*(ms|us|s|%)")
_EXAMPLE = "write for example ttft=500ms,tpot=50ms,share=99%"


class Objectives(msgspec.Struct, frozen=True, kw_only=True):
    """``limits_s`` by measure: ttft, tpot (mean after the first token), icl (longest gap between
    chunks) and e2e.
    """

    limits_s: dict[str, float]
    share: float = DEFAULT_SHARE

    @property
    def text(self) -> str:
        terms = [f"{name} {limit_text(limit)}" for name, limit in self.limits_s.items()]
        return f"{', '.join(terms)} for {self.share * 100:g} % of requests"

    def good(self, record: Record) -> bool:
        return record.succeeded and all(
            measure_ns(record, name) <= limit * 1e9 for name, limit in self.limits_s.items()
        )


class Attainment(msgspec.Struct, frozen=True, kw_only=True):
    """``low`` and ``high``: the 95 % interval of the true share (Wilson score)."""

    good: int
    attempts: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.good / self.attempts if self.attempts else 0.0


def attainment(good: int, attempts: int, z: float = 1.96) -> Attainment:
    """Source: E. B. Wilson, Probable inference, JASA 22 (1927)."""
    if not attempts:
        return Attainment(good=0, attempts=0, low=0.0, high=1.0)
    share, square = good / attempts, z * z / attempts
    centre = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / attempts + square / (4 * attempts)) / (1 + square)
    return Attainment(
        good=good, attempts=attempts, low=max(0.0, centre - half), high=min(1.0, centre + half)
    )


def measure_ns(record: Record, name: str) -> float:
    """A measure of a request; infinite where it is not known, so that no limit holds."""
    value: float | None
    if name == "icl":
        chunks = pairwise(record.chunks_ns)
        value = max((later - earlier for earlier, later in chunks), default=0)
    elif name == "tpot":
        value = 0.0 if record.output_tokens == 1 else record.tpot_ns
    else:
        value = record.ttft_ns if name == "ttft" else record.end_to_end_ns
    return math.inf if value is None else value


def parse_objectives(written: str) -> Objectives:
    """
    Raises:
        WrongOption: a term is not understood, or there is no limit at all.
    """
    limits: dict[str, float] = {}
    share = DEFAULT_SHARE
    for term in written.split(","):
        found = _TERM.fullmatch(term.strip().lower())
        if found is None:
            raise WrongOption(f"--slo: {term.strip()!r} is not understood; {_EXAMPLE}")
        name, number, unit = found.groups()
        try:
            value = float(number)
        except ValueError:
            raise WrongOption(f"--slo: {number!r} is not a number; {_EXAMPLE}") from None
        if name == "share" and unit == "%" and 0 < value <= 100:  # noqa: PLR2004
            share = value / 100
        elif name in _NAMES and unit in _SECONDS and value > 0:
            limits[name] = value * _SECONDS[unit]
        else:
            raise WrongOption(
                f"--slo: {term.strip()!r} is not understood; measures are {', '.join(_NAMES)} in "
                f"ms or s, and share in %; {_EXAMPLE}"
            )
    if not limits:
        raise WrongOption(f"--slo {written!r} has no limit; {_EXAMPLE}")
    return Objectives(limits_s=limits, share=share)


def limit_text(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms"
