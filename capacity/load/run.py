"""A run under way: its stages one after the other, or the probes of a search, and its faults."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import BinaryIO

import anyio
import msgspec
import psutil

from capacity.load.client import Client
from capacity.load.crew import Crew
from capacity.load.errors import LoadError
from capacity.load.faults import Fault, inject, victims
from capacity.load.impact import FaultImpact, impact_of
from capacity.load.messages import ClosedLoop, Load, OpenLoop, Stage
from capacity.load.objectives import Objectives
from capacity.load.plan import Plan, StagePlan, rate_stage
from capacity.load.probe import ask_briefly
from capacity.load.records import Record
from capacity.load.search import RateSearch, SearchResult, certain_failure, requests_wanted
from capacity.load.stage import StageResult, StageState, run_stage
from capacity.load.verdict import doubts_of_client
from capacity.load.view import View

SECOND = 1_000_000_000
_LEAD_NS = 50_000_000  # workers get an order this long before its load begins
_LONGEST_PROBE = 4  # times the duration of a probe, to have as many requests as are wanted
_MOST_DISTURBED = 5  # probes that are repeated because the client was at fault
_MOST_SETTLING_S = 30.0
_SETTLING_PAUSE_S = 0.2
_CALM_NS = 50_000_000  # so much more than twice the idle server's time still counts as calm
INTERRUPTED = "interrupted"


@dataclass(slots=True)
class Run:
    """A run under way and what has been measured so far."""

    plan: Plan
    view: View
    zero_ns: int
    stages: list[StageResult] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    injected: list[tuple[Fault, str, int]] = field(default_factory=list)
    search: SearchResult | None = None
    interrupted: bool = False
    next_session: int = 0
    written: int = 0

    async def stage(
        self,
        crew: Crew,
        planned: StagePlan,
        requests: BinaryIO,
        *,
        duration_s: float,
        stop_if: Callable[[StageState], str] = lambda _: "",
        late_after_ns: int = 0,
    ) -> StageResult:
        """Run one stage and write its requests as they end."""
        plan = self.plan
        load = _with_ramp(planned.load, duration_s)
        start_ns = monotonic_ns() + _LEAD_NS
        state = StageState(
            number=len(self.stages),
            label=planned.label,
            load=load,
            begin_ns=start_ns,
            duration_s=duration_s,
            stages=None if plan.search else len(plan.stages),
        )
        order = Stage(
            number=state.number,
            load=load,
            start_ns=start_ns,
            duration_s=duration_s,
            grace_s=plan.grace_s,
            first_session=self.next_session,
            sessions=plan.sessions,
            late_after_ns=late_after_ns,
        )
        self.written = 0

        def look(state: StageState) -> str:
            self._write(state, requests)
            self.view.running(state)
            return INTERRUPTED if self.interrupted else stop_if(state)

        async with anyio.create_task_group() as faults:
            for fault in plan.faults if state.number == 0 else ():
                faults.start_soon(self._inject, fault, start_ns)
            result = await run_stage(
                crew,
                order,
                state,
                self.zero_ns,
                look,
                warmup_s=plan.warmup_s,
                objectives=plan.objectives,
                gpus=plan.gpus,
            )
            faults.cancel_scope.cancel()
        self._write(state, requests)
        self.records += state.records
        self.stages.append(result)
        self.next_session += result.sessions
        self.view.done(result)
        return result

    async def sweep(self, crew: Crew, requests: BinaryIO) -> None:
        """All stages, one after the other."""
        for planned in self.plan.stages:
            await self.stage(crew, planned, requests, duration_s=self.plan.duration_s)
            if self.interrupted:
                return

    async def find_rate(self, crew: Crew, requests: BinaryIO, asker: Client) -> None:
        """Probe rates until the bracket is narrow; each probe is a stage. ``asker`` finds out
        between them whether the server is itself again.
        """
        objectives = self.plan.objectives
        load = self.plan.stages[0].load
        assert objectives is not None
        assert isinstance(load, OpenLoop)
        limit_s = objectives.limits_s.get("ttft", objectives.limits_s.get("e2e", 0.0))
        calm_ns = _waited_ns(await ask_briefly(asker, with_nonce=True))
        search = RateSearch(load.rate.mean, objectives.share)
        disturbed = 0
        while (rate := search.next_rate()) is not None:
            least_s = self.plan.duration_s
            wanted_s = requests_wanted(objectives.share) / rate
            duration_s = min(max(least_s, wanted_s), _LONGEST_PROBE * least_s)
            stop_if = _hopeless(objectives, rate * duration_s)
            planned = rate_stage(rate, load.arrivals)
            result = await self.stage(
                crew,
                planned,
                requests,
                duration_s=duration_s,
                stop_if=stop_if,
                late_after_ns=round(limit_s * SECOND),
            )
            if self.interrupted:
                break
            if doubts_of_client(result.figures, result.client) and disturbed < _MOST_DISTURBED:
                disturbed += 1
                self.view.say(f"  {rate:.3g} requests/s: the client was disturbed, once more")
                continue
            reached = result.figures.attainment
            assert reached is not None
            found = search.outcome(
                reached.good,
                reached.attempts,
                hopeless=bool(result.stopped),
                output_tokens_per_s=result.figures.output_tokens_per_s,
            )
            outcome = "holds" if found.held else "does not hold"
            self.view.say(f"  {rate:.3g} requests/s {outcome}: {found.attainment.share:.1%} good")
            if not found.held:
                await self._settle(asker, calm_ns)
        self.search = search.result()

    async def _settle(self, asker: Client, calm_ns: float) -> None:
        """Wait until a small request is answered about as soon as before the load: the next probe
        shall not pay for what this one has left in the server's queues.
        """
        with anyio.move_on_after(_MOST_SETTLING_S):
            while not self.interrupted:
                if _waited_ns(await ask_briefly(asker, with_nonce=True)) <= 2 * calm_ns + _CALM_NS:
                    return
                await anyio.sleep(_SETTLING_PAUSE_S)

    def impacts(self) -> list[FaultImpact]:
        if not self.stages:
            return []
        first = self.stages[0]
        return [
            impact_of(
                fault.text,
                process,
                at_ns,
                [record for record in self.records if record.stage == first.number],
                begin_ns=first.window_begin_ns,
                end_ns=first.window_end_ns,
                objectives=self.plan.objectives,
            )
            for fault, process, at_ns in self.injected
        ]

    async def _inject(self, fault: Fault, start_ns: int) -> None:
        await anyio.sleep((start_ns - monotonic_ns()) / SECOND + fault.at_s)
        try:
            victim = victims(self.plan.address.url, fault.role)[-1]
            name = f"{fault.role} {victim.pid}"
            self.injected.append((fault, name, monotonic_ns() - self.zero_ns))
            self.view.say(f"  fault: {fault.action} {name}")
            await inject(fault, victim)
        except (LoadError, psutil.Error) as error:
            self.view.say(f"  fault {fault.text} was not possible: {error}")

    def _write(self, state: StageState, requests: BinaryIO) -> None:
        encode = msgspec.json.encode
        fresh = state.records[self.written :]
        self.written = len(state.records)
        requests.write(b"".join(encode(record) + b"\n" for record in fresh))


def _with_ramp(load: Load, duration_s: float) -> Load:
    """A negative ramp stands for the whole duration."""
    if isinstance(load, ClosedLoop) and load.ramp_s < 0:
        return msgspec.structs.replace(load, ramp_s=duration_s)
    return load


def _hopeless(objectives: Objectives, planned: float) -> Callable[[StageState], str]:
    """Stops a probe when it can no longer hold."""
    seen = bad = 0

    def stop_if(state: StageState) -> str:
        nonlocal seen, bad
        fresh = state.records[seen:]
        seen += len(fresh)
        bad += sum(not objectives.good(record) for record in fresh)
        late = bad + sum(state.late.values())
        return "certain to fail" if certain_failure(late, planned, objectives.share) else ""

    return stop_if


def _waited_ns(record: Record) -> float:
    """For the first token, or the whole where there is no stream; without end if it failed."""
    if not record.succeeded:
        return math.inf
    return record.ttft_ns or record.end_to_end_ns or 0
