"""``report.html``: a run as a page for people. All figures are those of the summary."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from capacity.load.figures import Figures, in_window
from capacity.load.objectives import Objectives
from capacity.load.page import render
from capacity.load.records import Failure, Record
from capacity.load.summary import Summary
from capacity.load.table import HEAD, NOT_CARRIED, milliseconds, row
from capacity.load.usage import TOTALS

SECOND = 1_000_000_000
FILE = "report.html"
_CDF_POINTS = 200
_BINS = 240
_MOST_DOTS = 4000
_MOST_COUNTERS = 24
_WHOLE = 100  # figures from here on are shown without decimals


def write_report(
    summary: Summary, records: Sequence[Record], objectives: Objectives | None, folder: Path
) -> None:
    where = f"{summary.target.url} · {summary.target.endpoint}"
    partial = " · stopped before its end" if summary.partial else ""
    page = render(
        title=f"{summary.target.model} under load",
        subtitle=f"{where} · {summary.started} · {summary.duration_s:.0f} s{partial}",
        script="report.js",
        data=report_data(summary, records, objectives),
    )
    (folder / FILE).write_text(page, encoding="utf-8")


def report_data(
    summary: Summary, records: Sequence[Record], objectives: Objectives | None
) -> dict[str, Any]:
    """What ``report.js`` draws."""
    limits = objectives.limits_s if objectives is not None else {}
    by_stage = {
        number: list(of_stage)
        for number, of_stage in groupby(
            sorted(records, key=lambda r: r.stage), key=lambda r: r.stage
        )
    }
    stages: list[dict[str, Any]] = []
    drawn = _drawn_in_distributions(summary)
    for stage in summary.stages:
        begin, end = stage.window_begin_ns, stage.window_end_ns
        done = (
            []
            if stage.number not in drawn
            else [r for r in in_window(by_stage.get(stage.number, []), begin, end) if r.succeeded]
        )
        stages.append(
            {
                "label": stage.label,
                "begin_s": stage.begin_ns / SECOND,
                "end_s": _last_ns(by_stage.get(stage.number, []), stage.load_end_ns) / SECOND,
                "ttft": cdf(r.ttft_ns for r in done),
                "tpot": cdf(r.tpot_ns for r in done),
                "e2e": cdf(r.end_to_end_ns for r in done),
            }
        )
    measured = [(s.window_begin_ns / SECOND, s.window_end_ns / SECOND) for s in summary.stages]
    shown = _thinned([r for r in records if r.succeeded])
    streams = any(record.ttft_ns for record in shown)
    return {
        "verdict": _verdict(summary),
        "cards": _cards(summary),
        "stages": stages,
        "unmeasured": [
            span
            for stage, (begin, end) in zip(stages, measured, strict=True)
            for span in ((stage["begin_s"], begin), (end, stage["end_s"]))
        ],
        "throughput": _throughput(records),
        "latency_name": "TTFT" if streams else "end to end",
        "latency": [_dot(record, streams=streams) for record in shown],
        "failures": [
            [r.intended_ns / SECOND, _waited_ms(r), r.error]
            for r in _thinned([r for r in records if r.error and r.error != Failure.INTERRUPTED])
        ],
        "end_s": max((stage["end_s"] for stage in stages), default=0),
        "limits": {name: limit * 1e3 for name, limit in limits.items()},
        "gpus": summary.gpus,
        "pareto": [
            {
                "label": stage.label,
                "user": stage.figures.output_tokens_per_s_per_user,
                "total": stage.figures.output_tokens_per_s_per_gpu
                or stage.figures.output_tokens_per_s,
            }
            for stage in summary.stages
            if stage.figures.output_tokens_per_s_per_user and summary.search is None
        ],
        "probes": [
            {"rate": probe.rate, "share": probe.attainment.share, "held": probe.held}
            for probe in (summary.search.probes if summary.search is not None else ())
        ],
        "search": summary.search.text if summary.search is not None else "",
        "share": summary.search.share if summary.search is not None else 0,
        "server": [
            {
                "name": stage.label,
                "parts": [
                    {"name": name, "value": spread.mean}
                    for name, spread in stage.figures.server.items()
                    if name not in TOTALS
                ],
            }
            for stage in summary.stages
            if stage.figures.server and stage.number in drawn
        ],
        "faults": _faults(summary),
        "table": [HEAD, *(row(stage.label, stage.figures) for stage in summary.stages)],
        "counters": _counters(summary),
        "settings": _settings(summary),
        "environment": _environment(summary),
    }


def _drawn_in_distributions(summary: Summary) -> set[int]:
    """All stages; of a search, the last probes at both ends of the bracket."""
    if summary.search is None:
        return {stage.number for stage in summary.stages}
    ends = {f"{rate:g} req/s" for rate in (summary.search.highest, summary.search.lowest) if rate}
    return set({s.label: s.number for s in summary.stages if s.label in ends}.values())


def cdf(values: Iterable[float | None]) -> list[list[float]]:
    """Points (milliseconds, share) of the distribution of nanoseconds, at most so many."""
    sample = np.sort(np.fromiter((v for v in values if v is not None), dtype=np.float64)) / 1e6
    if not sample.size:
        return []
    shares = np.arange(1, sample.size + 1) / sample.size
    kept = np.unique(np.linspace(0, sample.size - 1, min(sample.size, _CDF_POINTS)).astype(int))
    points = [[float(f"{sample[i]:.5g}"), float(f"{shares[i]:.4g}")] for i in kept]
    return [[points[0][0], 0.0], *points]


def _throughput(records: Sequence[Record]) -> list[list[float]]:
    """Output tokens per second in bins of the whole run, at their middles."""
    times: list[int] = []
    weights: list[float] = []
    for record in records:
        chunks = record.chunks_ns or ([record.done_ns] if record.succeeded else [])
        if chunks:
            tokens = record.output_tokens
            weights += [1.0 if tokens is None else tokens / len(chunks)] * len(chunks)
            times += chunks
    if not times:
        return []
    begin = min(record.intended_ns for record in records) / SECOND
    end = max(times) / SECOND
    width = max(0.5, (end - begin) / _BINS)
    bins = max(1, int(np.ceil((end - begin) / width)))
    counts, edges = np.histogram(
        np.array(times) / SECOND, bins=bins, range=(begin, begin + bins * width), weights=weights
    )
    middles = (edges[:-1] + edges[1:]) / 2
    return [
        [round(float(at), 2), float(f"{count / width:.4g}")]
        for at, count in zip(middles, counts, strict=True)
    ]


def _dot(record: Record, *, streams: bool) -> list[float]:
    value = record.ttft_ns if streams else record.end_to_end_ns
    return [round(record.intended_ns / SECOND, 3), float(f"{(value or 0) / 1e6:.4g}")]


def _waited_ms(record: Record) -> float:
    """How long a failed request had been due when it failed."""
    return max(0.1, (record.done_ns - record.intended_ns) / 1e6)


def _thinned(records: list[Record]) -> list[Record]:
    return records[:: -(-len(records) // _MOST_DOTS) or 1]


def _last_ns(records: Sequence[Record], load_end_ns: int) -> int:
    return max([load_end_ns, *(record.done_ns for record in records)])


def _verdict(summary: Summary) -> dict[str, Any]:
    verdict = summary.verdict
    if not verdict.valid:
        kind, text = "invalid", "Invalid measurement"
    elif verdict.slo_met is None:
        kind, text = "", "Valid measurement"
    elif verdict.slo_met:
        kind, text = "", "Valid measurement, objectives met"
    else:
        kind, text = "missed", "Valid measurement, objectives missed"
    if summary.objectives is not None and verdict.valid:
        text = f"{text}: {summary.objectives}"
    return {"kind": kind, "text": text, "points": [*verdict.invalid, *verdict.notes]}


def _cards(summary: Summary) -> list[tuple[str, str, str]]:
    """The figures of the stage with the most output."""
    if not summary.stages:
        return []
    drawn = _drawn_in_distributions(summary)
    best = max(
        (stage for stage in summary.stages if stage.number in drawn),
        key=lambda stage: stage.figures.output_tokens_per_s,
        default=summary.stages[-1],
    )
    if summary.search is not None and summary.search.highest is not None:
        held = f"{summary.search.highest:g} req/s"
        best = next(stage for stage in reversed(summary.stages) if stage.label == held)
    figures: Figures = best.figures
    at = f" at {best.label}" if len(summary.stages) > 1 else ""
    rate = figures.output_tokens_per_s
    cards = [(f"{rate:,.0f}" if rate >= _WHOLE else f"{rate:.3g}", "tokens/s", f"output{at}")]
    if summary.search is not None and summary.search.highest is not None:
        cards.insert(0, (f"{summary.search.highest:g}", "req/s", "highest rate that holds"))
    for name, spread in (("TTFT", figures.ttft), ("TPOT", figures.tpot), ("E2E", figures.e2e)):
        median = spread.at("p50")
        if median is None:
            continue
        tail = next((q for q in ("p99", "p90") if spread.at(q) is not None), None)
        beyond = f", {tail} {milliseconds(spread.at(tail))} ms" if tail is not None else ""
        cards.append((milliseconds(median), "ms", f"{name} p50{beyond}"))
    attempts = sum(stage.figures.attempts for stage in summary.stages)
    succeeded = sum(stage.figures.succeeded for stage in summary.stages)
    share = f"{100 * succeeded / attempts:.4g}" if attempts else NOT_CARRIED
    cards.append((share, "%", f"of {attempts} requests succeeded"))
    if summary.tokens_per_joule is not None:
        cards.append((f"{summary.tokens_per_joule:.3g}", "tokens/J", "output per GPU energy"))
    return cards


def _faults(summary: Summary) -> list[dict[str, Any]]:
    faults = []
    for fault in summary.faults:
        back = "not within the test"
        if fault.recovery_s is not None:
            back = f"after {fault.recovery_s:.0f} s"
        facts = [["back to 95 % of goodput", back], ["requests that failed", str(fault.failed)]]
        for name, span in (
            ("before", fault.before),
            ("until recovery", fault.during),
            ("after", fault.after),
        ):
            if span.available is not None and span.goodput_per_s is not None:
                told = f"{span.available:.2%} available, {span.goodput_per_s:.3g} good requests/s"
                facts.append([name, f"{told} over {span.seconds:.0f} s"])
        faults.append(
            {
                "text": fault.what,
                "process": fault.process,
                "at_s": fault.at_ns / SECOND,
                "facts": facts,
            }
        )
    return faults


def _counters(summary: Summary) -> list[tuple[str, str]]:
    """What the server's own counters gained, without the sums and counts of its histograms."""
    gains = {
        name: gain
        for name, gain in summary.server_counters.items()
        if not name.partition("{")[0].endswith(("_sum", "_count"))
        and not name.startswith(("python_", "process_"))
    }
    most = sorted(gains.items(), key=lambda item: -item[1])[:_MOST_COUNTERS]
    return [
        (name, f"{gain:,.0f}" if gain >= _WHOLE else f"{gain:.4g}") for name, gain in sorted(most)
    ]


def _settings(summary: Summary) -> list[tuple[str, str]]:
    line = summary.target.calibration
    found = f"{line.overhead:.1f} + {line.per_word:.3f} tokens a word"
    exact = "asked for with ignore_eos" if summary.target.exact_length else "as the model ends"
    return [
        *summary.settings.items(),
        ("prompt tokens", found),
        ("output length", exact),
        ("nonce in prompts", summary.nonce or "none"),
    ]


def _environment(summary: Summary) -> list[tuple[str, str]]:
    machine = summary.environment
    rows = [
        ("headrace", machine.headrace),
        ("Python", machine.python),
        ("system", machine.system),
        ("processor", f"{machine.processor}, {machine.cores} cores"),
        ("memory", f"{machine.memory_bytes / 1e9:.0f} GB"),
    ]
    if summary.stages:
        busiest = max(stage.client.busiest_cpu for stage in summary.stages)
        lag = max(stage.client.loop_lag_p99_ms for stage in summary.stages)
        late = max(stage.figures.schedule_lag_p99_ms for stage in summary.stages)
        rows += [
            ("load workers", str(summary.stages[0].client.workers)),
            ("busiest worker's core", f"{busiest:.0%}"),
            ("event loop lag, p99", f"{lag:.2f} ms"),
            ("sent after due, p99", f"{late:.2f} ms"),
        ]
    return rows
