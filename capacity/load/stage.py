"""One stage of a run: orders to all workers, their news until the last has ended, its figures."""

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from capacity.load.crew import Crew
from capacity.load.figures import Figures, figures_of
from capacity.load.messages import Load, Progress, Stage, StageEnd, Stop
from capacity.load.objectives import Objectives
from capacity.load.records import Record
from capacity.load.verdict import Client, client_of

SECOND = 1_000_000_000
_WARMUP_SHARE = 0.1
_MOST_LEFT = 2 / 3  # of the requests must remain after a warm-up that nobody asked for


class StageResult(msgspec.Struct, frozen=True, kw_only=True):
    """Times count from the start of the run; the window is the steady part of the load."""

    number: int
    label: str
    load: Load
    begin_ns: int
    load_end_ns: int
    window_begin_ns: int
    window_end_ns: int
    stopped: str  # why it ended before its time, "" if it did not
    sessions: int
    figures: Figures
    client: Client


@dataclass(slots=True)
class StageState:
    """A stage while it runs, for whoever looks at it."""

    number: int
    label: str
    load: Load
    begin_ns: int  # monotonic
    duration_s: float
    stages: int | None = None  # that the run will have, None when that depends on outcomes
    records: list[Record] = field(default_factory=list)
    under_way: dict[int, int] = field(default_factory=dict)  # by worker
    late: dict[int, int] = field(default_factory=dict)
    chunks: dict[int, int] = field(default_factory=dict)
    lags_ns: list[int] = field(default_factory=list)
    capped: bool = False
    stopped: str = ""
    _cpu: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def take(self, news: Progress) -> None:
        self.records += news.records
        self.under_way[news.worker] = news.under_way
        self.late[news.worker] = news.late
        self.chunks[news.worker] = news.chunks
        self.lags_ns += news.lags_ns
        self.capped |= news.capped
        self._cpu.setdefault(news.worker, []).append((news.wall_s, news.cpu_s))

    def client(self, load_end_ns: int) -> Client:
        """Each worker's share of a core between the start and the end of the load."""
        cpu, wall = [], []
        for samples in self._cpu.values():
            during = [sample for sample in samples if sample[0] * SECOND <= load_end_ns + SECOND]
            wall.append(during[-1][0] - during[0][0] if during else 0.0)
            cpu.append(during[-1][1] - during[0][1] if during else 0.0)
        return client_of(cpu, wall, self.lags_ns, capped=self.capped)


async def run_stage(
    crew: Crew,
    stage: Stage,
    state: StageState,
    zero_ns: int,
    look: Callable[[StageState], str],
    *,
    warmup_s: float | None,
    objectives: Objectives | None,
    gpus: int | None,
) -> StageResult:
    """Run it to its end. ``look`` sees the state after each news; the reason that it returns, if
    any, stops the stage.

    Raises:
        LoadError: a worker ended or cannot go on.
    """
    await crew.order_all(stage)
    ends: dict[int, StageEnd] = {}
    while len(ends) < crew.size:
        news = await crew.next_news()
        if isinstance(news, StageEnd):
            ends[news.worker] = news
            continue
        if isinstance(news, Progress):
            state.take(news)
        reason = look(state)
        if reason and not state.stopped:
            state.stopped = reason
            await crew.order_all(Stop())
    begin_ns = stage.start_ns - zero_ns
    load_end_ns = max(begin_ns, *(end.load_end_ns for end in ends.values()))
    warmup_ns = (
        round(warmup_s * SECOND)
        if warmup_s is not None
        else round(_WARMUP_SHARE * (load_end_ns - begin_ns))
    )
    window_begin_ns = min(begin_ns + warmup_ns, load_end_ns)
    meant = [record.intended_ns for record in state.records]
    if warmup_s is None and sum(at >= window_begin_ns for at in meant) < _MOST_LEFT * len(meant):
        window_begin_ns = begin_ns  # few requests, mostly sent at once: leave none out
    return StageResult(
        number=stage.number,
        label=state.label,
        load=stage.load,
        begin_ns=begin_ns,
        load_end_ns=load_end_ns,
        window_begin_ns=window_begin_ns,
        window_end_ns=load_end_ns,
        stopped=state.stopped,
        sessions=sum(end.sessions for end in ends.values()),
        figures=figures_of(
            state.records,
            begin_ns=window_begin_ns,
            end_ns=load_end_ns,
            objectives=objectives,
            gpus=gpus,
        ),
        client=state.client(load_end_ns + zero_ns),
    )
