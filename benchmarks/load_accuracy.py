"""How near the load test's figures come to what a server did that remembers when it wrote what.

    python -m benchmarks.load_accuracy [--json] [--quick] [--runs N]

The scripted server answers the first token after 50 ms and one every 10 ms, with four cases: plain,
with stalls of one second at known times, with three tokens in a chunk, and with errors of every
class. ``headrace bench`` loads it with Poisson arrivals; each percentile in its summary is compared
with the same percentile of the server's own times. A deviation is told as a share of what is
allowed, which is 2 % or 0.5 ms, whichever is more. After a stall every request that was due
meanwhile must show it, from the time at which it was intended.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Bar, Figure, print_report
from capacity.load.verdict import INVALID
from tests.support.scripted_server import Script, scripted_server
from tests.support.two_sides import (
    SAME_PROMPTS,
    Sides,
    both_sides,
    command,
    due_in,
    summary_in,
    told_and_true,
)

SECOND = 1_000_000_000
RATE = "15"
SHARE, LEAST_MS = 0.02, 0.5
STALL_S = 1.0
TIMER_NS = 1_000_000  # the server's timers have milliseconds: a stall may end so much sooner
STALLS_AT = (2.0, 5.0)
# Request n of the run: an HTTP status, or how its stream fails.
FAILS: dict[int, int | str] = {4: 503, 11: "event", 23: "cut", 31: "reset", 47: 429}
CASES = {
    "plain": Script(),
    "stalls": Script(stalls=[(at, STALL_S) for at in STALLS_AT]),
    "coalesced": Script(per_chunk=3),
    "errors": Script(fails=FAILS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``worst`` is the largest deviation as a share of what is allowed, ``where`` it was."""

    worst: float
    where: str
    requests: int
    valid: bool
    unseen: int  # requests due in a stall that do not show it
    errors: int


def measure(script: Script, duration_s: int, folder: Path) -> Outcome:
    """One run of the command against the script.

    Raises:
        RuntimeError: the command made no summary.
    """
    options = ("--rate", RATE, "--duration", str(duration_s), "--warmup", "0", *SAME_PROMPTS)
    with scripted_server(script) as reference:
        ended = subprocess.run(
            command(reference.url, folder, *options), check=False, capture_output=True, text=True
        )
    if not (folder / "summary.json").exists():
        raise RuntimeError(ended.stderr)
    sides = both_sides(reference, folder)
    figures = summary_in(folder)["stages"][0]["figures"]
    deviations = [
        (
            abs(told - true) / max(SHARE * true, LEAST_MS),
            f"{name} {quantile}: {told:.2f} ms told, {true:.2f} ms true",
        )
        for name, quantile, told, true in told_and_true(figures, sides)
    ]
    worst, where = max(deviations)
    return Outcome(
        worst=worst,
        where=where,
        requests=len(sides),
        valid=ended.returncode != INVALID,
        unseen=_unseen(script, sides),
        errors=sum(figures["errors"].values()),
    )


def _unseen(script: Script, sides: Sides) -> int:
    """Requests that were due in a stall and have a first token before its end."""
    first_ns = min(sent.arrived_ns for _, sent in sides)
    count = 0
    for at_s, lasting_s in script.stalls:
        begin = first_ns + round(at_s * SECOND)
        end = begin + round(lasting_s * SECOND)
        count += sum(
            record["first_token_ns"] < end - TIMER_NS
            for record, _ in due_in(sides, begin, end - round(script.first_token_s * SECOND))
        )
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    parser.add_argument("--quick", action="store_true", help="one short run of each case")
    parser.add_argument("--runs", type=int, help="of each case (default: 3, quick: 1)")
    chosen = parser.parse_args()
    figures: dict[str, Figure] = {}
    bars = []
    for name, script in CASES.items():
        outcomes = []
        for _ in range(chosen.runs or (1 if chosen.quick else 3)):
            with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
                outcomes.append(measure(script, 8 if chosen.quick else 15, Path(folder)))
        worst = max(outcomes, key=lambda outcome: outcome.worst)
        figures[f"{name}_requests"] = sum(outcome.requests for outcome in outcomes)
        figures[f"{name}_worst_percentile"] = worst.where
        figures[f"{name}_valid_runs"] = sum(outcome.valid for outcome in outcomes)
        told = ", ".join(f"{outcome.worst:.2f}" for outcome in outcomes)
        figures[f"{name}_share_of_allowed_by_run"] = told
        bars.append(Bar(f"{name}: worst deviation, of 2 % or 0.5 ms", worst.worst, at_most=1.0))
        if script.stalls:
            unseen = sum(outcome.unseen for outcome in outcomes)
            bars.append(Bar("requests due in a stall that do not show it", unseen, at_most=0))
        if script.fails:
            least = min(outcome.errors for outcome in outcomes)
            bars.append(Bar("scripted errors that were told", least, at_least=len(script.fails)))
    return print_report("load_accuracy", figures, bars, only_json=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
