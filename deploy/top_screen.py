"""What ``headrace top`` shows: pure, from a status to text.

Invariant: nothing from another machine reaches the terminal as a control sequence or as markup.
"""

from collections.abc import Callable, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from server.page.data import EventRow, RequestRow, Status, WorkerRow
from server.page.experts import ExpertGroup
from server.page.samples import Sample

MINUTE_S = 60
KILO = 1000
BARS = "▁▂▃▄▅▆▇█"
SPARK_CELLS = 40
FALL_CELLS = 24
STAGE_CELLS = {
    "wait": ("·", "dim"),
    "reserve": ("-", "dim"),
    "queue": ("▒", "yellow"),
    "prefill": ("█", "cyan"),
    "hand-over": ("▒", "dark_orange"),
    "decode": ("█", "green"),
}
STYLES = {
    "linked": "green",
    "draining": "yellow",
    "no link": "red",
    "warning": "yellow",
    "error": "red",
    "failed": "red",
    "cancelled": "yellow",
}
FIXED_ROWS = 12  # of head, headings and blank lines
LEAST_ROWS = 3

_LINE: dict[str, Callable[[Status, Sample | None], str]] = {
    "workers": lambda status, _: str(sum(w.condition == "linked" for w in status.workers)),
    "open": lambda status, _: str(status.gateway.open_requests),
    "waiting": lambda status, _: str(status.gateway.waiting),
    "out/s": lambda _, last: f"{last.output_tokens_per_s:.1f}" if last else "-",
    "prompt/s": lambda _, last: f"{last.prompt_tokens_per_s:.1f}" if last else "-",
    "ttft-p50": lambda _, last: seconds(last.ttft_p50_s if last else None),
    "ttft-p99": lambda _, last: seconds(last.ttft_p99_s if last else None),
    "itl-p50": lambda _, last: seconds(last.itl_p50_s if last else None),
    "itl-p99": lambda _, last: seconds(last.itl_p99_s if last else None),
    "migrations": lambda status, _: str(status.gateway.migrations),
}


def heading_line() -> str:
    return "  ".join(name.rjust(10) for name in _LINE)


def figures_line(status: Status) -> str:
    """The figures under ``heading_line``."""
    last = status.samples[-1] if status.samples else None
    return "  ".join(figure(status, last).rjust(10) for figure in _LINE.values())


def screen(status: Status, *, url: str, trouble: str, rows: int) -> Group:
    """All of it, cut to so many rows of a terminal: workers first, then requests and events."""
    parts: list[Text | Table] = [_head(status, url, trouble), _lines(status), _workers(status)]
    left = rows - FIXED_ROWS - len(status.workers)
    for group in status.experts:
        parts.append(_experts(group))
        left -= 1
    events = status.events[: max(LEAST_ROWS, left // 3)]
    requests = status.requests[: max(LEAST_ROWS, left - len(events))]
    parts += [_requests(requests), _events(events)]
    return Group(*parts)


def printable(text: str) -> str:
    """``text`` without control characters, so that no name can steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 1:
        return f"{value * KILO:.1f}ms" if value < 0.01 else f"{value * KILO:.0f}ms"  # noqa: PLR2004
    return f"{value:.2f}s" if value < MINUTE_S else f"{value / MINUTE_S:.1f}min"


def spark(values: Sequence[float | None]) -> str:
    """A bar for each of the last values, against the highest; blank where there is none."""
    shown = values[-SPARK_CELLS:]
    top = max((value for value in shown if value is not None), default=0.0) or 1.0
    last = len(BARS) - 1
    bars = [" " if v is None else BARS[min(last, int(v / top * last + 0.5))] for v in shown]
    return "".join(bars).rjust(SPARK_CELLS)


def _text(text: object, style: str = "") -> Text:
    return Text(printable(str(text)), style=style, overflow="ellipsis", no_wrap=True)


def _head(status: Status, url: str, trouble: str) -> Text:
    gateway = status.gateway
    word, style = ("ready", "green") if gateway.ready else ("not ready", "red")
    if trouble:
        word, style = trouble, "red"
    return Text.assemble(
        ("headrace ", "bold"),
        printable(url),
        "  ",
        (printable(word), style),
        f" {printable(gateway.reason)}  ",
        (printable(", ".join(gateway.models)), "bold"),
        f"\nopen {gateway.open_requests}  waiting {gateway.waiting}  retries {gateway.retries}"
        f"  migrations {gateway.migrations}  Ctrl-C ends",
        overflow="ellipsis",
        no_wrap=True,
    )


def _lines(status: Status) -> Table:
    table = Table.grid(padding=(0, 2))
    samples = status.samples
    last = samples[-1] if samples else None
    table.add_row(
        _text("tokens/s"),
        _text(spark([s.output_tokens_per_s for s in samples]), "cyan"),
        _text(f"{last.output_tokens_per_s:.0f}" if last else "-"),
        _text("requests"),
        _text(spark([s.running for s in samples]), "cyan"),
        _text(last.running if last else "-"),
    )
    table.add_row(
        _text("TTFT p99"),
        _text(spark([s.ttft_p99_s for s in samples]), "cyan"),
        _text(seconds(last.ttft_p99_s if last else None)),
        _text("ITL p99"),
        _text(spark([s.itl_p99_s for s in samples]), "cyan"),
        _text(seconds(last.itl_p99_s if last else None)),
    )
    return table


def _table(*columns: str, left: int) -> Table:
    """The first ``left`` columns are words, the others figures."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def _workers(status: Status) -> Table:
    heads = (
        "worker",
        "role",
        "state",
        "batch",
        "queue",
        "KV",
        "hits",
        "KV exposed",
        "step",
        "tokens/s",
    )
    table = _table(*heads, left=3)
    for worker in status.workers:
        table.add_row(
            _text(worker.worker),
            _text(worker.role),
            _text(worker.condition, STYLES.get(worker.condition, "")),
            str(worker.running),
            str(worker.queued),
            _share(worker.active_blocks + worker.granted_blocks, worker.blocks),
            _hits(worker),
            seconds(worker.transfer_exposed_s) if worker.role == "prefill" else "",
            seconds(worker.step_s),
            f"{worker.tokens_per_s:.0f}",
        )
    return table


def _hits(worker: WorkerRow) -> str:
    if worker.role != "prefill":
        return ""
    return _share(worker.prefix_hit_tokens, worker.prompt_tokens)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"


def _experts(group: ExpertGroup) -> Text:
    """Balancedness of the layers as bars, the worst one in words."""
    if not group.layers:
        return _text(f"experts {group.group}: none")
    worst = min(group.layers, key=lambda layer: layer.balancedness)
    bars = spark([layer.balancedness for layer in group.layers]).strip()
    return _text(
        f"experts {group.group}: balancedness by layer {bars}  worst {worst.balancedness:.2f} in"
        f" layer {worst.layer}  epoch {group.placement_epoch}  moved {group.migrations}"
    )


def _requests(requests: Sequence[RequestRow]) -> Table:
    table = _table("request", "outcome", "stages", "total", "prompt", "output", "moved", left=3)
    for request in requests:
        table.add_row(
            _text(request.request[:8]),
            _text(request.outcome, STYLES.get(request.outcome, "")),
            fall(request),
            seconds(request.seconds),
            str(request.prompt_tokens),
            str(request.output_tokens),
            str(request.migrations or ""),
        )
    return table


def fall(request: RequestRow) -> Text:
    """The stages of the request's attempts, each in cells of its share of the whole time."""
    cells = [(" ", "")] * FALL_CELLS
    whole = max(request.seconds, 1e-9)
    for stage in (stage for attempt in request.attempts for stage in attempt.stages):
        begin = int(stage.begin_s / whole * FALL_CELLS)
        end = int((stage.begin_s + stage.seconds) / whole * FALL_CELLS + 0.5)
        for cell in range(max(0, begin), min(FALL_CELLS, max(end, begin + 1))):
            cells[cell] = STAGE_CELLS.get(stage.stage, ("?", ""))
    return Text.assemble(*cells)


def _events(events: Sequence[EventRow]) -> Table:
    table = _table("ago", "event", left=2)
    for event in events:
        often = f" ({event.times} times)" if event.times > 1 else ""
        table.add_row(
            seconds(event.last_s), _text(event.text + often, STYLES.get(event.severity, ""))
        )
    return table
