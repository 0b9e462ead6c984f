"""A load test from plan to files: probe, stages or search, verdict, summary.

The invariant: once load has begun the folder holds every request that has ended, and after a stop
by hand a report of them too. It knows neither options nor what is printed.
"""

import asyncio
import secrets
import signal
from contextlib import ExitStack
from datetime import UTC, datetime
from time import monotonic_ns

import anyio
import msgspec

from capacity.load.address import Address, resolve
from capacity.load.client import Client
from capacity.load.crew import crew_of
from capacity.load.energy import EnergyMeter
from capacity.load.errors import WrongOption
from capacity.load.faults import victims
from capacity.load.lengths import parse_lengths
from capacity.load.messages import Setup
from capacity.load.parquet import write_parquet
from capacity.load.plan import BRIEF_TOKENS, SLOW_TOKEN_S, Plan
from capacity.load.probe import Found, probe
from capacity.load.report import write_report
from capacity.load.run import Run
from capacity.load.scrape import Scraper
from capacity.load.summary import Summary, Target, this_environment, write_summary
from capacity.load.text import Calibration
from capacity.load.verdict import Verdict, exit_code, judge
from capacity.load.view import View
from capacity.load.workload import Workload, WorkloadSpec

SECOND = 1_000_000_000
REQUESTS_FILE = "requests.jsonl"
METRICS_FILE = "server-metrics.jsonl"
FRESH_NONCE = "fresh"
_SCRAPE_S = 2.0
_PATIENCE_S = 3.0  # of a person who sees nothing


async def run_bench(plan: Plan, view: View) -> Summary:
    """Run the plan; the folder ``plan.out`` then holds requests, summary and report.

    Raises:
        LoadError: nothing could be measured, and why.
    """
    for fault in plan.faults:
        victims(plan.address.url, fault.role)  # better said now than in mid-run
    _check_trace(plan)
    nonce = plan.workload.nonce
    if nonce == FRESH_NONCE:
        nonce = secrets.token_hex(4)
    plan_address = await anyio.to_thread.run_sync(resolve, plan.address)
    started = datetime.now(UTC)
    zero_ns = monotonic_ns()
    run = Run(plan=plan, view=view, zero_ns=zero_ns)
    async with crew_of(plan.workers) as crew:
        found = await _probe(plan_address, plan, view, with_nonce=bool(nonce))
        try:
            plan.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WrongOption(f"--out {plan.out}: {error.strerror}") from None
        workload = _workload(plan, found)
        view.say(_hello(plan, found, workload))
        with ExitStack() as files:
            requests = files.enter_context((plan.out / REQUESTS_FILE).open("wb"))
            metrics = files.enter_context((plan.out / METRICS_FILE).open("wb"))
            for worker in range(crew.size):
                await crew.order(
                    worker,
                    Setup(
                        address=plan_address,
                        api=found.api,
                        workload=msgspec.structs.replace(workload, nonce=nonce),
                        calibration=found.calibration,
                        timeout_s=plan.timeout_s,
                        worker=worker,
                        workers=crew.size,
                        zero_ns=zero_ns,
                    ),
                )
            asker = Client(plan_address, found.api, timeout_s=_SCRAPE_S)
            scraper = Scraper(asker, metrics)
            await scraper.scrape(0.0)
            energy = EnergyMeter()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_watch_signals, run)
                tasks.start_soon(_scrape_now_and_then, scraper, zero_ns)
                if plan.search:
                    await run.find_rate(crew, requests, asker)
                else:
                    await run.sweep(crew, requests)
                tasks.cancel_scope.cancel()
            await scraper.scrape((monotonic_ns() - zero_ns) / SECOND)
            asker.pool.close()
    summary = Summary(
        started=started.isoformat(timespec="seconds"),
        zero_ns=zero_ns,
        duration_s=(monotonic_ns() - zero_ns) / SECOND,
        partial=run.interrupted,
        target=Target(
            url=plan.address.url,
            model=found.api.model,
            endpoint=found.api.endpoint,
            stream=found.api.stream,
            exact_length=found.api.exact_length,
            calibration=found.calibration,
        ),
        settings=plan.settings | {"output": workload.output.written},
        nonce=nonce,
        environment=this_environment(),
        gpus=plan.gpus,
        energy_j=energy.joules(),
        stages=run.stages,
        faults=run.impacts(),
        search=run.search,
        server_counters=scraper.gains(),
        objectives=plan.objectives.text if plan.objectives is not None else None,
        verdict=_judged(run, exact_length=found.api.exact_length),
    )
    write_summary(summary, plan.out)
    if plan.parquet:
        write_parquet(run.records, plan.out)
    write_report(summary, run.records, plan.objectives, plan.out)
    return summary


async def _probe(address: Address, plan: Plan, view: View, *, with_nonce: bool) -> Found:
    notice = f"waiting for the first answer of {plan.address.url}"
    said = asyncio.get_running_loop().call_later(_PATIENCE_S, view.say, notice)
    try:
        return await probe(address, plan.api, with_nonce=with_nonce)
    finally:
        said.cancel()


def _check_trace(plan: Plan) -> None:
    """Say now what the workers could only say in mid-run."""
    if plan.workload.trace is None:
        return
    workload = Workload(plan.workload, Calibration())
    with_ids = any(turn.token_ids is not None for turns in workload.rows for turn in turns)
    if with_ids and plan.api.endpoint != "completions":
        raise WrongOption("--trace has token ids, which only `--endpoint completions` takes")


def _workload(plan: Plan, found: Found) -> WorkloadSpec:
    """The default output is short on a slow server, so that a minute has enough requests."""
    if plan.brief_if_slow and found.token_s > SLOW_TOKEN_S:
        brief = parse_lengths(str(BRIEF_TOKENS), "--output")
        return msgspec.structs.replace(plan.workload, output=brief)
    return plan.workload


def _hello(plan: Plan, found: Found, workload: WorkloadSpec) -> str:
    line = found.calibration
    exact = (
        "" if found.api.exact_length else "; it takes no ignore_eos, so answers end when they do"
    )
    return (
        f"{plan.address.url}: {found.api.model}, {found.api.endpoint}; a prompt of n words has "
        f"{line.overhead:.0f} + {line.per_word:.2f} n tokens{exact}; "
        + (
            f"requests from {plan.workload.trace}"
            if plan.workload.trace is not None
            else f"input {(workload.pairs or workload.input).written}, output "
            f"{workload.output.written} tokens"
        )
    )


async def _watch_signals(run: Run) -> None:
    """The first Ctrl-C ends the load and reports, the second ends the command."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            if run.interrupted:
                raise KeyboardInterrupt
            run.interrupted = True
            run.view.say("stopping; Ctrl-C again to end without a report")


async def _scrape_now_and_then(scraper: Scraper, zero_ns: int) -> None:
    while scraper.available:
        await anyio.sleep(_SCRAPE_S)
        await scraper.scrape((monotonic_ns() - zero_ns) / SECOND)


def _judged(run: Run, *, exact_length: bool) -> Verdict:
    """On a search only the two probes at the ends of the bracket are judged, and the objectives
    are met when some rate held.
    """
    stages = [(stage.label, stage.figures, stage.client) for stage in run.stages]
    objectives = run.plan.objectives
    if run.search is None:
        return judge(stages, objectives, exact_length=exact_length, interrupted=run.interrupted)
    ends = {f"{rate:g} req/s" for rate in (run.search.highest, run.search.lowest) if rate}
    last = {label: (label, figures, client) for label, figures, client in stages}
    verdict = judge(
        [stage for label, stage in last.items() if label in ends],
        None,
        exact_length=exact_length,
        interrupted=run.interrupted,
    )
    met = run.search.highest is not None
    code = exit_code(valid=verdict.valid, slo_met=met)
    return msgspec.structs.replace(verdict, slo_met=met, exit_code=code)
