"""The load test as a command, against a server that remembers when it sent what."""

import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Start
from tests.e2e.test_faults import FLAGS, eventually, ready
from tests.support.scripted_server import Script, scripted_server
from tests.support.two_sides import (
    MS,
    SAME_PROMPTS,
    both_sides,
    command,
    requests_in,
    summary_in,
    told_and_true,
    truths,
)

pytestmark = pytest.mark.timeout(120)
SECOND = 1_000_000_000
# A busy machine makes a measurement invalid, which is 2; whether it is, is no test's business.
MEASURED = (0, 2)
MISSED = (1, 2)


def bench(url: str, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(url, out, *options), check=False, capture_output=True, text=True, timeout=90
    )


def test_every_percentile_is_that_of_the_times_written_down(tmp_path: Path) -> None:
    """How near those come to the server's clock is a measurement: benchmarks.load_accuracy."""
    with scripted_server(Script(per_chunk=2, stalls=[(1.5, 0.3)])) as reference:
        options = ("--rate", "60", "--duration", "4", "--warmup", "0", *SAME_PROMPTS)
        ended = bench(reference.url, tmp_path, *options)
        assert ended.returncode in MEASURED, ended.stderr
    sides = both_sides(reference, tmp_path)
    (stage,) = summary_in(tmp_path)["stages"]
    figures = stage["figures"]
    assert figures["succeeded"] == figures["attempts"] == len(sides) > 150
    written = [(record, replace(sent, chunks_ns=record["chunks_ns"])) for record, sent in sides]
    compared = told_and_true(figures, written)
    assert {name for name, *_ in compared} == truths(written).keys()
    for name, quantile, told, true in compared:
        assert told == pytest.approx(true), (name, quantile)
    assert figures["tokens_per_chunk"] == pytest.approx(2)


def test_a_stall_shows_from_intended_in_every_request_due_meanwhile(tmp_path: Path) -> None:
    with scripted_server(Script(stalls=[(1.0, 1.0)])) as reference:
        options = ("--rate", "40", "--arrivals", "constant", "--duration", "3", *SAME_PROMPTS)
        assert bench(reference.url, tmp_path, *options).returncode in MEASURED
    sides = both_sides(reference, tmp_path)
    stall_end = min(sent.arrived_ns for _, sent in sides) + 2 * SECOND
    due = [
        record for record, _ in sides if 0.1 * SECOND < stall_end - record["intended_ns"] < SECOND
    ]
    assert len(due) > 30
    earliest = stall_end - MS  # the server's timers have milliseconds
    assert all(record["first_token_ns"] >= earliest for record in due)


def test_the_client_counts_every_chunk_and_sees_none_before_it_was_sent(tmp_path: Path) -> None:
    with scripted_server(Script(per_chunk=3)) as reference:
        bench(reference.url, tmp_path, "--rate", "20", "--duration", "2", *SAME_PROMPTS)
    sides = both_sides(reference, tmp_path)
    assert len(sides) > 20
    for record, sent in sides:
        assert record["intended_ns"] <= record["started_ns"] <= record["sent_ns"] <= sent.arrived_ns
        assert len(record["chunks_ns"]) == len(sent.chunks_ns) == 4
        assert all(c >= s for c, s in zip(record["chunks_ns"], sent.chunks_ns, strict=True))
        assert record["output_tokens"] == 10


def test_every_attempt_counts_and_errors_have_classes(tmp_path: Path) -> None:
    fails: dict[int, int | str] = {2: 503, 5: "event", 7: "cut", 9: "reset", 11: 429}
    with scripted_server(Script(fails=fails)) as reference:
        options = ("--rate", "20", "--arrivals", "constant", "--duration", "2", "--warmup", "0")
        ended = bench(reference.url, tmp_path, *options, "--slo", "ttft=10s")
    figures = summary_in(tmp_path)["stages"][0]["figures"]
    assert figures["errors"] == {
        "http 503": 1,
        "error event": 1,
        "stream without an end": 1,
        "connection closed": 1,
        "http 429": 1,
    }
    assert figures["attempts"] == figures["succeeded"] + 5
    assert figures["attainment"]["good"] == figures["succeeded"]
    assert summary_in(tmp_path)["verdict"]["slo_met"] is False
    assert ended.returncode in MISSED


@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_all_endpoints_are_measured(tmp_path: Path, endpoint: str, stream: bool) -> None:
    with scripted_server(Script(spaced_json=True)) as reference:
        options = ["--endpoint", endpoint, "--concurrency", "2", "--requests", "6", "--warmup", "0"]
        ended = bench(reference.url, tmp_path, *options, *([] if stream else ["--no-stream"]))
    assert ended.returncode in MEASURED, ended.stderr
    records = requests_in(tmp_path)
    assert [record.get("error") for record in records] == [None] * 6
    assert {record["output_tokens"] for record in records} == {10}
    assert {"first_token_ns" in record for record in records} == {stream}


def test_equal_seeds_send_equal_requests_at_equal_times(tmp_path: Path) -> None:
    sent: list[list[Any]] = []
    for name in ("a", "b"):
        with scripted_server(Script(first_token_s=0.005, token_s=0.001)) as reference:
            options = ("--rate", "30", "--duration", "1", "--seed", "7", "--nonce", "fixed")
            bench(reference.url, tmp_path / name, *options, "--workers", "2")
            sent.append(sorted(str(one.body) for one in reference.generations))
        begin = summary_in(tmp_path / name)["stages"][0]["begin_ns"]
        records = requests_in(tmp_path / name)
        sent.append(sorted(record["intended_ns"] - begin for record in records))
    assert sent[0] == sent[2]
    assert sent[1] == sent[3]
    assert len(sent[0]) > 10


def test_conversations_carry_what_was_said(tmp_path: Path) -> None:
    with scripted_server(Script(first_token_s=0.005, token_s=0.001)) as reference:
        options = ("--concurrency", "1", "--requests", "2", "--turns", "3", "--think", "0.01")
        assert bench(reference.url, tmp_path, *options).returncode in MEASURED
    lengths = [len(sent.body["messages"]) for sent in reference.generations]  # type: ignore[arg-type]
    assert lengths == [1, 3, 5, 1, 3, 5]
    last = reference.generations[2].body["messages"]
    assert isinstance(last, list)
    assert last[1] == {"role": "assistant", "content": "x" * 10}


def test_a_server_without_extensions_or_usage_is_measured_as_far_as_it_goes(tmp_path: Path) -> None:
    with scripted_server(Script(exact_length=False, usage=False)) as reference:
        ended = bench(reference.url, tmp_path, "--concurrency", "2", "--requests", "6")
    assert ended.returncode in MEASURED, ended.stderr
    summary = summary_in(tmp_path)
    assert summary["target"]["exact_length"] is False
    assert "had no usage" in " ".join(summary["verdict"]["notes"])
    assert summary["stages"][0]["figures"]["tpot"]["count"] == 0


def test_ctrl_c_leaves_a_partial_report(tmp_path: Path) -> None:
    with scripted_server(Script()) as reference:
        started = subprocess.Popen(
            command(reference.url, tmp_path, "--rate", "20", "--duration", "60"),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 30
        while len(reference.generations) < 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        out, _ = started.communicate(timeout=30)
    summary = summary_in(tmp_path)
    assert summary["partial"] is True
    assert summary["stages"][0]["figures"]["succeeded"] >= 10
    assert summary["stages"][0]["figures"]["errors"] == {}
    assert "a partial report" in out


def test_a_trace_with_shared_blocks_is_replayed_on_time(tmp_path: Path) -> None:
    trace = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 100 * n, "input_length": 600, "output_length": 5, "hash_ids": [n % 2, 9 + n]}
        for n in range(10)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    with scripted_server(Script()) as reference:
        ended = bench(
            reference.url, tmp_path, "--trace", str(trace), "--speed", "2", "--warmup", "0"
        )
    assert ended.returncode in MEASURED, ended.stderr
    begin = summary_in(tmp_path)["stages"][0]["begin_ns"]
    due = sorted(record["intended_ns"] - begin for record in requests_in(tmp_path))
    assert due == [50_000_000 * n for n in range(10)]
    prompts = [sent.body["messages"][0]["content"] for sent in reference.generations]  # type: ignore[index]
    assert len({prompt[:2000] for prompt in prompts}) == 2
    assert len(set(prompts)) == 10


def test_a_search_finds_the_rate_that_a_server_can_hold(tmp_path: Path) -> None:
    """A server that stalls for good after a while holds no rate: the search says so soon."""
    with scripted_server(Script(first_token_s=0.3)) as reference:
        options = ("--search", "--slo", "ttft=100ms", "--rate", "0.04", "--duration", "1")
        ended = bench(reference.url, tmp_path, *options)
    found = summary_in(tmp_path)["search"]
    assert found["highest"] is None
    assert ended.returncode in MISSED


def test_a_search_waits_until_an_overloaded_server_is_itself_again(tmp_path: Path) -> None:
    """The first probe meets a stall that outlasts it; the rates after it are not blamed for it."""
    with scripted_server(Script(first_token_s=0.02, stalls=[(0.0, 3.0)])) as reference:
        options = ("--search", "--slo", "ttft=400ms,share=90%", "--rate", "8", "--duration", "1")
        bench(reference.url, tmp_path, *options)
    found = summary_in(tmp_path)["search"]
    assert found["lowest"] == 8
    assert found["highest"] >= 4


def test_metrics_of_the_server_are_kept(tmp_path: Path) -> None:
    with scripted_server(Script()) as reference:
        reference.metrics = "# TYPE served counter\nserved_total 5\nqueue 3\n"
        bench(reference.url, tmp_path, "--concurrency", "1", "--requests", "3")
    lines = (tmp_path / "server-metrics.jsonl").read_text().splitlines()
    assert len(lines) >= 2
    assert json.loads(lines[0])["samples"] == {"served_total": 5.0, "queue": 3.0}


@pytest.mark.timeout(300)
def test_a_worker_is_killed_in_a_run_and_the_report_says_what_it_cost(
    start: Start, tmp_path: Path
) -> None:
    system = start("smollm2", *FLAGS)
    before = {process.pid for process in system.processes("prefill")}
    options = ("--fault", "kill prefill@2s", "--concurrency", "2", "--duration", "8")
    ended = bench(system.url, tmp_path, *options, "--output", "4", "--input", "64")
    assert "fault: kill prefill" in ended.stderr
    (fault,) = summary_in(tmp_path)["faults"]
    assert int(fault["process"].removeprefix("prefill ")) in before
    begin_ns = summary_in(tmp_path)["stages"][0]["begin_ns"]
    assert fault["at_ns"] - begin_ns >= 2 * SECOND
    told = fault["before"]["attempts"] + fault["during"]["attempts"] + fault["after"]["attempts"]
    assert told == summary_in(tmp_path)["stages"][0]["figures"]["attempts"]
    eventually(lambda: {p.pid for p in system.processes("prefill")} - before != set(), "a new one")
    eventually(lambda: ready(system), "ready again")
