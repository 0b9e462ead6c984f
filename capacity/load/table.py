"""The result of a run as text that can be copied: one row a stage, then what it means."""

from collections.abc import Sequence

from capacity.load.figures import Figures, Spread
from capacity.load.summary import Summary

NOT_CARRIED = "–"
_MOST_STAGES_TOLD = 3
HEAD = (
    *("stage", "requests", "req/s", "tokens/s", "per user"),
    *("TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "E2E p50", "good"),
)


def lines_of(summary: Summary) -> list[str]:
    lines = aligned([HEAD, *(row(stage.label, stage.figures) for stage in summary.stages)])
    lines += ["", "TTFT, TPOT and E2E in ms from the intended time of each request; – where the"]
    lines += ["sample is too small for the percentile. Tokens are those that the server counted."]
    facts = list(_facts(summary))
    if facts:
        lines += ["", *facts]
    lines += ["", *(f"note: {note}" for note in summary.verdict.notes)]
    lines += [f"verdict: {summary.verdict.text}"]
    return lines


def row(label: str, figures: Figures) -> tuple[str, ...]:
    user = figures.output_tokens_per_s_per_user
    good = figures.attainment
    nothing_counted = 0 < figures.succeeded == figures.without_usage
    return (
        label,
        f"{figures.succeeded}/{figures.attempts}",
        f"{figures.requests_per_s:.2f}",
        NOT_CARRIED if nothing_counted else f"{figures.output_tokens_per_s:.1f}",
        NOT_CARRIED if user is None else f"{user:.1f}",
        *(_at(figures.ttft, name) for name in ("p50", "p90", "p99")),
        *(_at(figures.tpot, name) for name in ("p50", "p90", "p99")),
        _at(figures.e2e, "p50"),
        NOT_CARRIED if good is None else f"{good.share:.1%}",
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in rows
    ]


def milliseconds(value: float | None) -> str:
    if value is None:
        return NOT_CARRIED
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004


def _at(spread: Spread, name: str) -> str:
    return milliseconds(spread.at(name))


def _facts(summary: Summary) -> list[str]:
    facts = []
    if summary.objectives is not None:
        facts.append(f"objectives: {summary.objectives}")
    if summary.search is not None:
        facts.append(f"search: {summary.search.text}")
    for stage in summary.stages:
        named = f"{stage.label}: " if len(summary.stages) > 1 else ""
        cached = stage.figures.cached_share
        if cached:
            facts.append(f"{named}{cached:.0%} of the input tokens came from the prefix cache")
        if stage.figures.server and len(summary.stages) <= _MOST_STAGES_TOLD:
            told = [f"{name} {s.mean:.1f}" for name, s in stage.figures.server.items()]
            facts.append(f"{named}server's stages, mean ms: {', '.join(told)}")
    for fault in summary.faults:
        back = "no recovery" if fault.recovery_s is None else f"back after {fault.recovery_s:.0f} s"
        spans = ", ".join(
            f"{name} {span.available:.1%}"
            for name, span in (
                ("before", fault.before),
                ("during", fault.during),
                ("after", fault.after),
            )
            if span.available is not None
        )
        facts.append(f"{fault.what}: {fault.failed} failed, {back}; available {spans}")
    if summary.tokens_per_joule is not None:
        facts.append(f"energy: {summary.tokens_per_joule:.3g} output tokens per joule")
    return facts
