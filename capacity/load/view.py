"""What a person sees while a test runs: a live table on a terminal, a line now and then elsewhere.

The load runs in other processes, so drawing costs the measurement nothing but this machine's time.
"""

import math
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TextIO

from capacity.load.figures import spread
from capacity.load.stage import StageResult, StageState
from capacity.load.table import NOT_CARRIED, milliseconds, row

if TYPE_CHECKING:
    from rich.console import RenderableType

SECOND = 1_000_000_000
_LINE_EVERY_S = 2.0
_DRAW_EVERY_S = 0.25
_RECENT = 2000  # records that live percentiles look at
_HISTORY = 60
_BARS = " ▁▂▃▄▅▆▇█"


class View(Protocol):
    def say(self, text: str) -> None: ...

    def running(self, state: StageState) -> None:
        """Called at each news; draws when it is time."""
        ...

    def done(self, result: StageResult) -> None: ...

    def close(self) -> None: ...


class Glimpse:
    """The figures of a stage while it runs, over its latest records."""

    def __init__(self, state: StageState) -> None:
        recent = [record for record in state.records[-_RECENT:] if record.succeeded]
        self.elapsed_s = max(0.0, monotonic() - state.begin_ns / SECOND)
        self.records = len(state.records)
        self.errors = sum(not r.succeeded for r in state.records[-_RECENT:])
        self.under_way = sum(state.under_way.values())
        ended = sum(len(record.chunks_ns) for record in state.records)
        self.chunks = ended + sum(state.chunks.values())
        self.ttft = spread(r.ttft_ns for r in recent if r.ttft_ns is not None)
        self.tpot = spread(r.tpot_ns for r in recent if r.tpot_ns is not None)
        self.e2e = spread(r.end_to_end_ns for r in recent if r.end_to_end_ns is not None)

    @property
    def chunks_per_s(self) -> float:
        return self.chunks / self.elapsed_s if self.elapsed_s > 0 else 0.0


class PlainView:
    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._said_at = 0.0

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def running(self, state: StageState) -> None:
        if monotonic() - self._said_at < _LINE_EVERY_S:
            return
        self._said_at = monotonic()
        now = Glimpse(state)
        median = now.ttft.at("p50")
        first = f", TTFT p50 {milliseconds(median)} ms" if median is not None else ""
        self.say(
            f"  {now.elapsed_s:5.0f} s  {state.label}: {now.records} done, {now.under_way} under "
            f"way, {now.chunks_per_s:.1f} chunks/s{first}, {now.errors} errors"
        )

    def done(self, result: StageResult) -> None:
        figures = result.figures
        ttft, tpot = (milliseconds(s.at("p50")) for s in (figures.ttft, figures.tpot))
        self.say(
            f"  {result.label}: {figures.output_tokens_per_s:.1f} tokens/s, "
            f"{figures.requests_per_s:.2f} requests/s, TTFT p50 {ttft} ms, TPOT p50 {tpot} ms, "
            f"{sum(figures.errors.values())} errors"
            + (f"; stopped: {result.stopped}" if result.stopped else "")
        )

    def close(self) -> None:
        pass


class LiveView:
    """Drawn by rich, which is imported only when there is a terminal."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(file=out), auto_refresh=False, transient=True)
        self._live.start()
        self._drawn_at = 0.0
        self._results: list[StageResult] = []
        self._rates: deque[float] = deque(maxlen=_HISTORY)
        self._before = (0, 0.0, 0)  # stage, seconds, chunks

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def running(self, state: StageState) -> None:
        if monotonic() - self._drawn_at < _DRAW_EVERY_S:
            return
        self._drawn_at = monotonic()
        now = Glimpse(state)
        stage, seconds, chunks = self._before
        if stage == state.number and now.elapsed_s - seconds >= 0.5:  # noqa: PLR2004
            self._rates.append(max(0.0, (now.chunks - chunks) / (now.elapsed_s - seconds)))
            self._before = (state.number, now.elapsed_s, now.chunks)
        elif stage != state.number:
            self._before = (state.number, now.elapsed_s, now.chunks)
        self._live.update(self._drawn(state, now), refresh=True)

    def done(self, result: StageResult) -> None:
        self._results.append(result)
        self._rates.clear()

    def close(self) -> None:
        self._live.update("", refresh=True)
        self._live.stop()

    def _drawn(self, state: StageState, now: Glimpse) -> "RenderableType":
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        place = f"  ({state.number + 1} of {state.stages})" if (state.stages or 0) > 1 else ""
        finite = math.isfinite(state.duration_s) and state.duration_s > 0
        left = max(0.0, state.duration_s - now.elapsed_s) if finite else 0.0
        if state.stages is not None:
            left += (state.stages - state.number - 1) * state.duration_s
        line = Table.grid(padding=(0, 2))
        line.add_row(
            Text.assemble((state.label, "bold"), place),
            ProgressBar(
                total=state.duration_s if finite else None,
                completed=min(now.elapsed_s, state.duration_s) if finite else 0,
                pulse=not finite,
                width=30,
            ),
            Text(f"{now.elapsed_s:.0f} s" + (f", {left:.0f} s left" if finite else "")),
        )
        figures = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("", "p50", "p90", "p99", "worst"):
            figures.add_column(name, justify="left" if not name else "right")
        for name, sample in (("TTFT ms", now.ttft), ("TPOT ms", now.tpot), ("E2E ms", now.e2e)):
            shown = [milliseconds(sample.at(q)) for q in ("p50", "p90", "p99")]
            figures.add_row(name, *shown, milliseconds(sample.most if sample.count else None))
        counts = Text.assemble(
            (f"{now.records}", "bold"),
            " done   ",
            (f"{now.under_way}", "bold"),
            " under way   ",
            (f"{now.errors}", "bold red" if now.errors else "bold"),
            " errors   ",
            (f"{now.chunks_per_s:.1f}", "bold"),
            " chunks/s  ",
            (sparkline(self._rates), "cyan"),
        )
        parts: list[RenderableType] = [line, counts, figures]
        if self._results:
            parts = [self._past(), Text(), *parts]
        return Panel(Group(*parts), title="headrace bench", title_align="left", padding=(0, 1))

    def _past(self) -> "RenderableType":
        from rich.table import Table

        past = Table(box=None, pad_edge=False, header_style="dim")
        names = ("stage", "requests", "req/s", "tokens/s", "TTFT p50", "p99", "TPOT p50", "p99")
        for name in names:
            past.add_column(name, justify="left" if name == "stage" else "right")
        for result in self._results:
            cells = row(result.label, result.figures)
            past.add_row(*(cells[i] for i in (0, 1, 2, 3, 5, 7, 8, 10)))
        return past


def sparkline(values: Sequence[float]) -> str:
    most = max(values, default=0.0)
    if most <= 0:
        return NOT_CARRIED
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] for value in values)


def view_for(out: TextIO) -> View:
    return LiveView(out) if out.isatty() else PlainView(out)
