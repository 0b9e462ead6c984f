"""``headrace bench``: options in, a plan out; then the table, the files and the exit code.

0: the measurement is valid and the objectives, if any were given, are met; 1: they are missed; 2:
the measurement is invalid or could not be made.
"""

import argparse
import json
import math
import sys
from datetime import datetime
from pathlib import Path

import anyio
import msgspec

from capacity.load.address import parse_address
from capacity.load.api import Api
from capacity.load.arrivals import parse_arrivals
from capacity.load.bench import FRESH_NONCE, run_bench
from capacity.load.compare import HTML_FILE as COMPARE_FILE
from capacity.load.compare import compare, load_run, write_page
from capacity.load.compare import lines_of as comparison_lines
from capacity.load.errors import LoadError, WrongOption
from capacity.load.faults import parse_fault
from capacity.load.lengths import parse_lengths, parse_pairs
from capacity.load.objectives import parse_objectives
from capacity.load.parquet import require_pyarrow
from capacity.load.plan import (
    QUICK_S,
    QUICK_USERS,
    SINGLE_S,
    STAGE_S,
    Plan,
    StagePlan,
    parse_rates,
    parse_users,
    rate_stage,
    replay_stage,
)
from capacity.load.report import FILE as REPORT_FILE
from capacity.load.summary import FILE as SUMMARY_FILE
from capacity.load.table import lines_of
from capacity.load.verdict import INVALID, MET
from capacity.load.view import view_for
from capacity.load.workload import WorkloadSpec, parse_prefix
from deploy.exits import INTERRUPTED

_NONCES = ("run", "request", "none")
_FIRST_SEARCH_RATE = 1.0
_OUTPUT_TOKENS = "64"


def bench(chosen: argparse.Namespace) -> int:
    """Run it; the result is the exit code."""
    try:
        if chosen.url[0] == "compare":
            return _compare(chosen)
        return _measure(plan_of(chosen), as_json=chosen.json)
    except LoadError as error:
        print(f"headrace bench: {error}", file=sys.stderr)
        return INVALID
    except KeyboardInterrupt:
        return INTERRUPTED


def _measure(plan: Plan, *, as_json: bool) -> int:
    view = view_for(sys.stderr)
    try:
        summary = anyio.run(run_bench, plan, view, backend_options={"use_uvloop": True})
    except BaseExceptionGroup as group:
        raise _leaf(group) from None
    finally:
        view.close()
    if as_json:
        print((plan.out / SUMMARY_FILE).read_text(), end="")
    else:
        print("\n".join(lines_of(summary)))
    print(f"report: {plan.out / REPORT_FILE}", file=sys.stderr)
    return summary.verdict.exit_code


def _compare(chosen: argparse.Namespace) -> int:
    if len(chosen.url) != 3:  # noqa: PLR2004
        raise WrongOption("write `headrace bench compare A B` with two folders of earlier runs")
    a, b = (load_run(Path(folder)) for folder in chosen.url[1:])
    comparison = compare(a, b, seed=chosen.seed)
    folder = chosen.out or Path()
    write_page(comparison, a, b, folder)
    if chosen.json:
        print(msgspec.json.format(msgspec.json.encode(comparison), indent=2).decode())
    else:
        print("\n".join(comparison_lines(comparison)))
    print(f"report: {folder / COMPARE_FILE}", file=sys.stderr)
    return MET


def _leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What ended the task groups: the expected error in it, if there is one."""
    expected = group.subgroup((LoadError, KeyboardInterrupt))
    error: BaseException = group if expected is None else expected
    while isinstance(error, BaseExceptionGroup) and expected is not None:
        error = error.exceptions[0]
    return error


def plan_of(chosen: argparse.Namespace) -> Plan:
    """
    Raises:
        WrongOption: an option, or two together, that cannot be meant.
    """
    if len(chosen.url) > 1:
        raise WrongOption(f"unexpected {chosen.url[1]!r}: one URL, or `compare A B`")
    stages, default_s = _stages(chosen)
    duration_s = default_s if chosen.duration is None else chosen.duration
    for name in ("duration", "timeout", "speed"):
        value = getattr(chosen, name)
        if value is not None and not 0 < value < math.inf:
            raise WrongOption(f"--{name}: {value:g} must be above 0")
    for name in ("requests", "gpus", "workers"):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            raise WrongOption(f"--{name}: {value} must be at least 1")
    warmup_s = chosen.warmup
    if warmup_s is not None and not 0 <= warmup_s < duration_s:
        raise WrongOption(
            f"--warmup: {warmup_s:g} must be less than the duration of {duration_s:g} s"
        )
    objectives = parse_objectives(chosen.slo) if chosen.slo is not None else None
    if chosen.search and objectives is None:
        raise WrongOption("--search needs --slo, such as --slo ttft=500ms,tpot=50ms")
    if objectives is not None and chosen.no_stream and set(objectives.limits_s) - {"e2e"}:
        raise WrongOption("--slo: without streams only e2e can be measured; leave out --no-stream")
    if math.isinf(duration_s) and ".." in f"{chosen.rate}{chosen.concurrency}":
        raise WrongOption("--requests: a ramp needs --duration too")
    if chosen.parquet:
        require_pyarrow()
    return Plan(
        address=parse_address(
            chosen.url[0], headers=_headers(chosen.api_key_file), ca_file=chosen.ca_file
        ),
        api=Api(endpoint=chosen.endpoint, model=chosen.model, stream=not chosen.no_stream),
        stages=tuple(stages),
        duration_s=duration_s,
        sessions=chosen.requests,
        warmup_s=warmup_s,
        timeout_s=chosen.timeout,
        workload=_workload(chosen),
        objectives=objectives,
        search=chosen.search,
        faults=tuple(parse_fault(text) for text in chosen.fault),
        gpus=chosen.gpus,
        workers=chosen.workers,
        parquet=chosen.parquet,
        brief_if_slow=chosen.output is None,
        settings=_settings(chosen),
        out=chosen.out or Path("headrace-bench") / f"{datetime.now():%Y%m%d-%H%M%S}",
    )


def _stages(chosen: argparse.Namespace) -> tuple[list[StagePlan], float]:
    """The stages, and how long each lasts unless told otherwise."""
    arrivals = parse_arrivals(chosen.arrivals)
    if chosen.concurrency is not None and (chosen.rate is not None or chosen.search):
        other = "--rate" if chosen.rate is not None else "--search"
        raise WrongOption(f"--concurrency and {other}: choose closed loop or open loop")
    if chosen.search:
        if chosen.trace is not None:
            raise WrongOption("--search and --trace: a trace has rates of its own")
        first = parse_rates(chosen.rate, arrivals)[:1] if chosen.rate is not None else []
        return first or [rate_stage(_FIRST_SEARCH_RATE, arrivals)], STAGE_S
    if chosen.rate is not None:
        stages = parse_rates(chosen.rate, arrivals)
    elif chosen.concurrency is not None:
        stages = parse_users(chosen.concurrency)
    elif chosen.trace is not None:
        return [replay_stage(chosen.speed)], math.inf
    elif chosen.requests is not None or chosen.fault:
        stages = parse_users(str(QUICK_USERS[1]))
    else:
        return parse_users(",".join(str(users) for users in QUICK_USERS)), QUICK_S
    if chosen.requests is not None and chosen.duration is None:
        return stages, math.inf
    return stages, STAGE_S if len(stages) > 1 else SINGLE_S


def _workload(chosen: argparse.Namespace) -> WorkloadSpec:
    paired = chosen.input.startswith("pairs:")
    nonce = FRESH_NONCE if chosen.nonce in _NONCES[:2] else chosen.nonce
    return WorkloadSpec(
        input=parse_lengths("1" if paired else chosen.input, "--input"),
        output=parse_lengths(chosen.output or _OUTPUT_TOKENS, "--output"),
        pairs=parse_pairs(chosen.input, "--input") if paired else None,
        prefix=parse_prefix(chosen.prefix) if chosen.prefix is not None else None,
        turns=parse_lengths(chosen.turns, "--turns") if chosen.turns is not None else None,
        think_s=chosen.think,
        trace=chosen.trace,
        seed=chosen.seed,
        nonce="" if nonce == "none" else nonce,
        nonce_per_request=chosen.nonce == "request",
    )


def _headers(api_key_file: Path | None) -> tuple[tuple[str, str], ...]:
    if api_key_file is None:
        return ()
    try:
        return (("authorization", f"Bearer {api_key_file.read_text().split()[0]}"),)
    except (OSError, IndexError):
        raise WrongOption(f"--api-key-file: no API key in {api_key_file}") from None


def _settings(chosen: argparse.Namespace) -> dict[str, str]:
    """What was chosen, for the report, without what is not told."""
    hidden = {"verb", "json", "out", "api_key_file"}
    values = vars(chosen) | {"url": chosen.url[0]}
    return {
        name.replace("_", "-"): json.dumps(value) if isinstance(value, list) else str(value)
        for name, value in values.items()
        if name not in hidden and value not in (None, "", False, [])
    }
