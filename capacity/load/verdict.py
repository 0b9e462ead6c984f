"""Whether a measurement can be believed, and whether the objectives were met.

A verdict is *invalid* when the figures would be the client's rather than the server's: it sent
late, its event loop or its core was full, or the requests were not those that were asked for. The
exit code says it too: 0 valid and met (or nothing asked), 1 missed, 2 invalid.
"""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from capacity.load.figures import Figures
from capacity.load.objectives import Objectives
from capacity.load.records import Failure

MET, MISSED, INVALID = 0, 1, 2

MOST_LAG_MS = 5.0  # of the schedule at p99, or one percent of the median time to first token
MOST_LOOP_LAG_MS = 10.0
MOST_CPU = 0.8
MOST_DRIFT = 0.05
MOST_SHORT = 0.01
MOST_WITHOUT_USAGE = 0.01
MOST_TOKENS_PER_CHUNK = 1.1


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """How the load workers fared: the busiest one's share of a core, all their loop lags."""

    workers: int
    busiest_cpu: float
    loop_lag_p99_ms: float
    capped: bool = False


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """``invalid`` and ``notes`` are sentences; ``slo_met`` is None where nothing was asked."""

    exit_code: int
    valid: bool
    slo_met: bool | None
    invalid: list[str]
    notes: list[str]

    @property
    def text(self) -> str:
        if not self.valid:
            return "INVALID MEASUREMENT: " + "; ".join(self.invalid)
        if self.slo_met is None:
            return "valid"
        return "valid, SLO met" if self.slo_met else "valid, SLO MISSED"


def client_of(
    cpu_s: Sequence[float], wall_s: Sequence[float], lags_ns: Sequence[int], *, capped: bool
) -> Client:
    """From each worker's CPU and wall time over the load."""
    shares = [cpu / wall if wall > 0 else 0.0 for cpu, wall in zip(cpu_s, wall_s, strict=True)]
    return Client(
        workers=len(shares),
        busiest_cpu=max(shares, default=0.0),
        loop_lag_p99_ms=float(np.percentile(lags_ns, 99)) / 1e6 if lags_ns else 0.0,
        capped=capped,
    )


def doubts(figures: Figures, client: Client, *, exact_length: bool) -> tuple[list[str], list[str]]:
    """What makes a stage invalid, and what a reader should know."""
    if not figures.attempts:
        return ["no request fell into the steady window; let the test run longer"], []
    invalid = doubts_of_client(figures, client)
    notes: list[str] = []
    if not figures.succeeded:
        error = next(iter(figures.errors), "no answer")
        invalid.append(f"no request succeeded ({error})")
    if figures.input_drift is not None and abs(figures.input_drift) > MOST_DRIFT:
        invalid.append(
            f"prompts had {figures.input_drift:+.1%} tokens against what was asked for "
            "(a chat template may alone be longer than --input)"
        )
    if figures.short_outputs is not None and figures.short_outputs > MOST_SHORT:
        text = f"{figures.short_outputs:.0%} of the answers ended before the wanted length"
        if exact_length:
            invalid.append(text)
        else:
            notes.append(f"{text}; the server takes no ignore_eos")
    if figures.without_usage:
        notes.append(f"{figures.without_usage} answers had no usage, so their tokens are not known")
    if figures.tokens_per_chunk is not None and figures.tokens_per_chunk > MOST_TOKENS_PER_CHUNK:
        notes.append(
            f"a chunk had {figures.tokens_per_chunk:.2f} tokens, so ICL is not time per token"
        )
    if figures.errors:
        told = ", ".join(f"{count} {error}" for error, count in figures.errors.items())
        notes.append(f"errors: {told}")
    return invalid, notes


def doubts_of_client(figures: Figures, client: Client) -> list[str]:
    """Where the figures may be the client's own."""
    return list(_client_doubts(figures, client))


def _client_doubts(figures: Figures, client: Client) -> Iterator[str]:
    most_lag = max(MOST_LAG_MS, 0.01 * (figures.ttft.at("p50") or figures.ttft.mean))
    if figures.schedule_lag_p99_ms > most_lag:
        yield (
            f"requests left {figures.schedule_lag_p99_ms:.1f} ms after they were due (p99; at most "
            f"{most_lag:.1f}): use more --workers or another machine"
        )
    if client.busiest_cpu > MOST_CPU:
        yield (
            f"a load worker used {client.busiest_cpu:.0%} of its core (at most {MOST_CPU:.0%}): "
            "use more --workers"
        )
    if client.loop_lag_p99_ms > MOST_LOOP_LAG_MS:
        yield (
            f"the client's event loop lagged {client.loop_lag_p99_ms:.1f} ms at p99 (at most "
            f"{MOST_LOOP_LAG_MS:g}): this machine is too busy"
        )
    if client.capped or Failure.EXHAUSTED in figures.errors:
        yield "the client ran out of connections: raise `ulimit -n` or use more --workers"


def judge(
    stages: Sequence[tuple[str, Figures, Client]],
    objectives: Objectives | None,
    *,
    exact_length: bool,
    interrupted: bool,
) -> Verdict:
    """The verdict on a whole run; a stage's doubts are told under its label."""
    invalid: list[str] = []
    notes: list[str] = []
    for label, figures, client in stages:
        before = f"{label}: " if len(stages) > 1 else ""
        doubtful, told = doubts(figures, client, exact_length=exact_length)
        invalid += [before + text for text in doubtful]
        notes += [before + text for text in told]
    if interrupted:
        notes.append("stopped before its end: a partial report")
    if not stages:
        invalid.append("nothing was measured")
    met = None
    if objectives is not None and "tpot" in objectives.limits_s:
        invalid += [
            f"{label}: an objective for tpot cannot be judged: {figures.without_usage} answers had "
            "no usage"
            for label, figures, _ in stages
            if figures.without_usage > MOST_WITHOUT_USAGE * figures.succeeded
        ]
    if objectives is not None:
        met = all(
            figures.attainment is not None and figures.attainment.share >= objectives.share
            for _, figures, _ in stages
        )
    return Verdict(
        exit_code=exit_code(valid=not invalid, slo_met=met),
        valid=not invalid,
        slo_met=met,
        invalid=invalid,
        notes=notes,
    )


def exit_code(*, valid: bool, slo_met: bool | None) -> int:
    if not valid:
        return INVALID
    return MISSED if slo_met is False else MET
