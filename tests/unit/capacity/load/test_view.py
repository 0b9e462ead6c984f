import io
from time import monotonic_ns

from capacity.load.messages import ClosedLoop, Progress
from capacity.load.records import Record
from capacity.load.stage import StageState
from capacity.load.view import LiveView, PlainView, sparkline, view_for
from tests.support.load_runs import S, a_record


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_state(records: list[Record]) -> StageState:
    state = StageState(
        number=1,
        label="concurrency 4",
        load=ClosedLoop(users=4),
        begin_ns=monotonic_ns() - 10 * S,
        duration_s=30,
        stages=3,
    )
    state.take(
        Progress(
            worker=0,
            records=records,
            under_way=4,
            late=0,
            chunks=7,
            cpu_s=0.1,
            wall_s=1.0,
            lags_ns=[],
            capped=False,
        )
    )
    return state


def test_without_a_terminal_there_is_a_line_now_and_then() -> None:
    out = io.StringIO()
    view = view_for(out)
    assert isinstance(view, PlainView)
    state = a_state([a_record(n) for n in range(9)] + [a_record(9, error="http 503")])
    view.running(state)
    view.running(state)
    (line,) = out.getvalue().splitlines()
    assert "concurrency 4: 10 done, 4 under way" in line
    assert "TTFT p50 50 ms, 1 errors" in line


def test_a_terminal_shows_progress_rates_percentiles_and_errors() -> None:
    out = Terminal()
    view = view_for(out)
    assert isinstance(view, LiveView)
    view.running(a_state([a_record(n) for n in range(60)]))
    view.close()
    shown = out.getvalue()
    for text in ("concurrency 4", "(2 of 3)", "s left", "60", "under way", "errors", "p90", "TTFT"):
        assert text in shown


def test_a_sparkline_is_as_high_as_its_most() -> None:
    assert sparkline([0, 1, 2, 4]) == " ▂▄█"
    assert sparkline([]) == "–"
