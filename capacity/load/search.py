"""The highest rate at which the objectives hold, found by bracketing.

Each probe sends Poisson traffic at one rate and ends as soon as its outcome is certain: as soon as
more requests are late than the objectives allow over the whole probe. The rate doubles until a
probe fails (or halves until one holds), then the bracket is halved on a logarithmic scale until its
ends are within ten percent. A probe whose 95 % interval does not settle the matter is repeated with
other arrivals and counted together with the first. Pure: it is told outcomes and says what is next.
"""

import math

import msgspec

from capacity.load.objectives import Attainment, attainment

CLOSE_ENOUGH = 1.1
_MOST_REPEATS = 2
_LEAST_RATE, _MOST_RATE = 0.01, 100_000.0
_MOST_PROBES = 24


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """``held``: the share that was good is what the objectives want, or more."""

    rate: float
    attainment: Attainment
    held: bool
    certain: bool  # the interval does not contain the wanted share
    output_tokens_per_s: float = 0.0


class SearchResult(msgspec.Struct, frozen=True, kw_only=True):
    """``highest`` held and ``lowest`` did not; None where no such rate was tried."""

    share: float
    highest: float | None
    lowest: float | None
    probes: list[Probe]

    @property
    def text(self) -> str:
        if self.highest is None:
            if self.lowest is None:
                return "no rate was tried to its end"
            return f"the objectives do not hold even at {self.lowest:g} requests/s"
        above = "and no failing rate was found"
        if self.lowest is not None:
            above = f"but not at {self.lowest:g} ({self._told(self.lowest)})"
        return (
            f"the objectives hold at {self.highest:g} requests/s ({self._told(self.highest)}), "
            f"{above}"
        )

    def _told(self, rate: float) -> str:
        reached = next(probe.attainment for probe in self.probes if probe.rate == rate)
        return (
            f"{reached.good} of {reached.attempts} good, 95 % interval of the share "
            f"{reached.low:.1%} to {reached.high:.1%}"
        )


class RateSearch:
    """``next_rate`` is None when the search is over."""

    def __init__(self, first: float, share: float) -> None:
        self._share = share
        self._rate = first
        self._probes: dict[float, Probe] = {}
        self._repeats: dict[float, int] = {}
        self._total = 0

    def next_rate(self) -> float | None:
        return self._rate if self._total < _MOST_PROBES and self._rate else None

    def outcome(
        self,
        good: int,
        attempts: int,
        *,
        hopeless: bool = False,
        output_tokens_per_s: float = 0.0,
    ) -> Probe:
        """Of the probe at ``next_rate``; ``hopeless``: it was stopped because it had failed."""
        rate = self._rate
        earlier = self._probes.get(rate)
        if earlier is not None:
            good += earlier.attainment.good
            attempts += earlier.attainment.attempts
        reached = attainment(good, attempts)
        probe = Probe(
            rate=rate,
            attainment=reached,
            held=not hopeless and attempts > 0 and reached.share >= self._share,
            certain=hopeless or not reached.low <= self._share <= reached.high,
            output_tokens_per_s=output_tokens_per_s,
        )
        self._probes[rate] = probe
        self._total += 1
        self._repeats[rate] = self._repeats.get(rate, 0) + 1
        if probe.certain or self._repeats[rate] > _MOST_REPEATS or not self._borderline(reached):
            self._rate = self._choose()
        return probe

    def result(self) -> SearchResult:
        held, failed = self._ends()
        return SearchResult(
            share=self._share,
            highest=held,
            lowest=failed,
            probes=sorted(self._probes.values(), key=lambda probe: probe.rate),
        )

    def _borderline(self, reached: Attainment) -> bool:
        """Perfect so far is no case for repeating: more of the same would change nothing."""
        return reached.good < reached.attempts

    def _ends(self) -> tuple[float | None, float | None]:
        failed = min((p.rate for p in self._probes.values() if not p.held), default=None)
        held = max(
            (p.rate for p in self._probes.values() if p.held and (not failed or p.rate < failed)),
            default=None,
        )
        return held, failed

    def _choose(self) -> float:
        """The next rate to try, 0 for none."""
        held, failed = self._ends()
        if failed is None:
            assert held is not None
            return _rounded(held * 2) if held * 2 <= _MOST_RATE else 0.0
        if held is None:
            return _rounded(failed / 2) if failed / 2 >= _LEAST_RATE else 0.0
        return _rounded(math.sqrt(held * failed)) if failed / held > CLOSE_ENOUGH else 0.0


def requests_wanted(share: float) -> float:
    """So many that, were all of them good, the true share is the wanted one with 95 % confidence.

    Source: the rule of three (J. A. Hanley, A. Lippman-Hand, JAMA 249, 1983).
    """
    return 3 / max(1e-6, 1 - share)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def certain_failure(bad: int, planned: float, share: float) -> bool:
    """Whether ``bad`` requests already break the share, were all others of ``planned`` good.

    Three standard deviations of the Poisson number of requests are conceded.
    """
    return bad > (1 - share) * (planned + 3 * math.sqrt(planned)) + 1
