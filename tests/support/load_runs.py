"""Records and whole folders of load tests, as if one had been run."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from capacity.load.figures import figures_of
from capacity.load.messages import ClosedLoop
from capacity.load.records import Record
from capacity.load.stage import StageResult
from capacity.load.summary import Summary, Target, this_environment, write_summary
from capacity.load.text import Calibration
from capacity.load.verdict import Client, judge

MS = 1_000_000
S = 1_000_000_000
QUIET = Client(workers=1, busiest_cpu=0.1, loop_lag_p99_ms=0.2)


def a_record(at_s: float = 0.0, **changed: object) -> Record:
    """Sent at once, first token after 50 ms, four more at 10 ms, in chunks of one token."""
    at = round(at_s * S)
    chunks = [at + 50 * MS + step * 10 * MS for step in range(5)]
    fields: dict[str, object] = {
        "index": 0,
        "stage": 0,
        "intended_ns": at,
        "started_ns": at,
        "sent_ns": at,
        "first_byte_ns": chunks[0],
        "first_token_ns": chunks[0],
        "last_token_ns": chunks[-1],
        "done_ns": chunks[-1] + MS,
        "chunks_ns": chunks,
        "wanted_input": 100,
        "wanted_output": 5,
        "input_tokens": 100,
        "output_tokens": 5,
        "status": 200,
    }
    return Record(**fields | changed)  # type: ignore[arg-type]


def a_summary(records: Sequence[Record], *, model: str = "model", label: str = "x") -> Summary:
    end_ns = max(record.intended_ns for record in records) + S
    figures = figures_of(records, begin_ns=0, end_ns=end_ns)
    stage = StageResult(
        number=0,
        label=label,
        load=ClosedLoop(users=1),
        begin_ns=0,
        load_end_ns=end_ns,
        window_begin_ns=0,
        window_end_ns=end_ns,
        stopped="",
        sessions=len(records),
        figures=figures,
        client=QUIET,
    )
    return Summary(
        started="2026-01-01T00:00:00+00:00",
        zero_ns=0,
        duration_s=end_ns / S,
        partial=False,
        target=Target(
            url="http://localhost:1",
            model=model,
            endpoint="chat",
            stream=True,
            exact_length=True,
            calibration=Calibration(),
        ),
        settings={},
        nonce="",
        environment=this_environment(),
        gpus=None,
        energy_j=None,
        stages=[stage],
        faults=[],
        search=None,
        server_counters={},
        objectives=None,
        verdict=judge([(label, figures, QUIET)], None, exact_length=True, interrupted=False),
    )


def write_run(folder: Path, records: Sequence[Record], *, label: str = "x") -> Path:
    folder.mkdir()
    write_summary(a_summary(records, label=label), folder)
    lines = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
    (folder / "requests.jsonl").write_bytes(lines)
    return folder
