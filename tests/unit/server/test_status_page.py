"""The page's files keep to their policy; its data are behind the key, and tell what happened."""

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from protocol.ids import WorkerRef
from protocol.messages import ExpertUpdate
from protocol.workers import ExpertReport
from server.app import create_app
from server.metrics import HttpMetrics
from server.page.data import FORMAT, Status
from server.page.files import PAGE_PATHS, page_files
from server.page.samples import Samples, quantile
from server.settings import GatewaySettings
from tests.support.arithmetic import a_request
from tests.support.model_text import byte_model_text
from tests.support.system import LONG_S, Stream, System, a_system

TEXT = byte_model_text()
SCRIPTS = {path: file for path, file in page_files().items() if path.endswith(".js")}


@asynccontextmanager
async def client_of(
    system: System, *, api_keys_file: Path | None = None
) -> AsyncGenerator[httpx.AsyncClient]:
    app = create_app(
        system.serving,
        TEXT,
        GatewaySettings(api_keys_file=api_keys_file),
        cluster=system.serving.cluster,
    )
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


async def status_of(client: httpx.AsyncClient, **parameters: str) -> Status:
    answer = await client.get("/status", params=parameters)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=Status)


# -- who may look --------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_data_need_the_key_and_the_empty_page_does_not(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("secret\n")
    async with a_system() as system, client_of(system, api_keys_file=file) as client:
        assert {(await client.get(path)).status_code for path in PAGE_PATHS} == {200}
        assert (await client.get("/status")).status_code == 401
        wrong = {"authorization": "Bearer wrong"}
        assert (await client.get("/status", headers=wrong)).status_code == 401
        right = {"authorization": "Bearer secret"}
        answer = await client.get("/status", headers=right)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.anyio
async def test_the_page_is_open_to_reading_only() -> None:
    async with a_system() as system, client_of(system) as client:
        assert (await client.post("/")).status_code == 405
        assert (await client.get("/page/../files.py")).status_code == 404
        assert (await client.get("/page/nothing.js")).status_code == 404


# -- the files -----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_every_file_is_sent_with_a_policy_that_allows_this_host_alone() -> None:
    async with a_system() as system, client_of(system) as client:
        for path, file in page_files().items():
            answer = await client.get(path)
            assert answer.headers["content-type"] == file.content_type
            assert answer.headers["x-content-type-options"] == "nosniff"
            policy = dict(
                part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
            )
            assert policy["default-src"] == "'none'"
            assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            allowed = {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")}
            assert allowed == {"'self'"}
            assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_no_file_names_another_host(path: str) -> None:
    text = page_files()[path].content.decode()
    addresses = set(re.findall(r"(?:https?:)?//[a-z0-9][\w.-]*\.[a-z]{2,}[^\s\"']*", text))
    assert addresses - {"http://www.w3.org/2000/svg"} == set()  # a name, which nobody fetches


def test_the_page_has_nothing_inline_that_its_policy_would_refuse() -> None:
    page = page_files()["/"].content.decode()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page) == []
    wanted = set(re.findall(r"(?:src|href)=\"([^\"]+)\"", page))
    assert wanted <= PAGE_PATHS


@pytest.mark.parametrize("path", sorted(SCRIPTS))
def test_scripts_write_text_and_never_markup(path: str) -> None:
    script = SCRIPTS[path].content.decode()
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc"
    code = r"\beval\(|new Function|setTimeout\(\s*[\"']|localStorage|document\.cookie"
    assert re.findall(f"{markup}|{code}", script) == []


@pytest.mark.parametrize("path", sorted(SCRIPTS))
def test_scripts_import_only_what_is_served(path: str) -> None:
    imported = re.findall(r"from \"\./([^\"]+)\"", SCRIPTS[path].content.decode())
    assert {f"/page/{name}" for name in imported} <= PAGE_PATHS


# -- the data ------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_data_say_who_serves_and_what_they_carry() -> None:
    async with a_system(prefill=2, ranks=2) as system, client_of(system) as client:
        status = await status_of(client)
        assert status.format == FORMAT
        assert status.gateway.ready
        assert [(w.worker, w.role, w.condition) for w in status.workers] == [
            ("prefill-0", "prefill", "linked"),
            ("prefill-1", "prefill", "linked"),
            ("decode-0/0", "decode", "linked"),
            ("decode-0/1", "decode", "linked"),
        ]
        assert [(g.group, g.present, g.ranks, g.serving) for g in status.groups] == [
            ("decode-0", 2, 2, True)
        ]
        assert status.requests == []  # canaries are not shown
        told = {event.text for event in status.events}
        assert {"prefill-0 is there", "decode-0 serves with 2 ranks, epoch 1"} <= told


@pytest.mark.anyio
async def test_a_request_is_shown_stage_by_stage_while_it_runs_and_afterwards() -> None:
    async with (
        a_system() as system,
        client_of(system) as client,
        anyio.create_task_group() as tasks,
    ):
        system.decode[0].paused = True
        request = a_request(tuple(range(40)), max_tokens=6)
        stream = Stream(system.serving, request)
        tasks.start_soon(stream.run)
        await stream.has(1)
        (row,) = (await status_of(client)).requests
        assert (row.request, row.outcome, row.output_tokens) == (request.request_id, "open", 1)
        stages = ["wait", "reserve", "queue", "prefill", "hand-over"]
        assert [stage.stage for stage in row.attempts[0].stages] == stages

        system.decode[0].paused = False
        system.decode[0].resume()
        await stream.end()
        status = await status_of(client)
        (row,) = status.requests
        assert (row.outcome, row.output_tokens, row.prompt_tokens) == ("done", 6, 40)
        (attempt,) = row.attempts
        assert (attempt.prefill, attempt.decode) == ("prefill-0", "decode-0/0")
        assert [stage.stage for stage in attempt.stages] == [*stages, "decode"]
        ends = [stage.begin_s + stage.seconds for stage in attempt.stages]
        begins = [stage.begin_s for stage in attempt.stages]
        assert begins[1:] == pytest.approx(ends[:-1], abs=1e-5)
        assert ends[-1] == pytest.approx(row.seconds, abs=1e-3)
        (link,) = status.links
        assert (link.prefill, link.decode, link.requests) == ("prefill-0", "decode-0/0", 1)
        assert link.bytes == 3 * 16 * 2 * 4  # three blocks of 16 tokens, key and value, float32
        assert link.hand_over_s is not None


@pytest.mark.anyio
async def test_a_migration_is_shown_with_the_workers_before_and_after() -> None:
    async with (
        a_system(groups=2, patience_s=LONG_S) as system,
        client_of(system) as client,
        anyio.create_task_group() as tasks,
    ):
        for rank in system.decode:
            rank.paused = True
        stream = Stream(system.serving, a_request(max_tokens=9))
        tasks.start_soon(stream.run)
        await stream.has(1)
        (first,) = [rank for rank in system.decode if rank.busy]
        (other,) = [rank for rank in system.decode if not rank.busy]
        other.paused = False
        other.resume()
        first.crash()
        await stream.end()
        assert stream.failure is None
        status = await status_of(client)
        (row,) = status.requests
        assert (row.outcome, row.migrations, row.output_tokens) == ("done", 1, 9)
        decodes = [attempt.decode for attempt in row.attempts]
        assert decodes == [first.ref.worker_id, other.ref.worker_id]
        assert sum(attempt.tokens for attempt in row.attempts) == 9
        assert "lost" in row.attempts[0].failure
        told = " ".join(event.text for event in status.events)
        assert "a stream migrates" in told
        assert f"{first.ref.worker_id}: the link to it is lost" in told


@pytest.mark.anyio
async def test_what_a_client_breaks_off_leaves_nothing_open() -> None:
    async with a_system() as system, client_of(system) as client:
        system.decode[0].paused = True
        stream = Stream(system.serving, a_request(max_tokens=50))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.run)
            await stream.has(1)
            tasks.cancel_scope.cancel()
        status = await status_of(client)
        assert status.gateway.open_requests == 0
        assert [row.outcome for row in status.requests] == ["cancelled"]


@pytest.mark.anyio
async def test_refusals_are_events_and_repeated_ones_are_counted() -> None:
    async with a_system() as system, client_of(system) as client:
        for _ in range(3):
            body = {"model": "<img src=x onerror=alert(1)>", "prompt": "x"}
            assert (await client.post("/v1/completions", json=body)).status_code == 404
        (event,) = [e for e in (await status_of(client)).events if "refused" in e.text]
        assert (event.times, event.severity) == (3, "warning")


@pytest.mark.anyio
async def test_records_are_bounded() -> None:
    async with a_system() as system, client_of(system) as client:
        for seed in range(70):
            await system.tokens(a_request((seed,), max_tokens=1))
            system.serving.cluster.records.note("cluster", "info", f"event {seed}" * 99)
        for number in range(300):
            system.serving.cluster.records.note("cluster", "info", f"event {number}")
        status = await status_of(client)
        assert len(status.requests) == 60
        assert len(status.events) == 100
        assert max(len(event.text) for event in status.events) <= 200
        assert len(system.serving.cluster.records.events) == 200


@pytest.mark.anyio
async def test_experts_are_shown_by_rank_and_layer() -> None:
    async with a_system(ranks=2) as system, client_of(system) as client:
        cluster = system.serving.cluster
        assert (await status_of(client)).experts == []
        # Expert 0 has two replicas: ranks carry 6/2 + 1 = 4 and 6/2 + 5 = 8 of the window.
        held = {0: (0, 1, -1), 1: (0, 2, -1)}
        window = {0: (4, 1, 2), 1: (2, 0, 3)}
        for state in cluster.view.decode:
            rank = state.info.rank
            cluster.update_experts(a_report(state.info.ref, window[rank], held[rank]))
        (group,) = (await status_of(client)).experts
        assert (group.group, group.ranks, group.experts, group.slots) == ("decode-0", 2, 3, 6)
        assert group.rank_numbers == [0, 1]
        (layer,) = group.layers
        assert layer.rank_tokens == [4.0, 8.0]
        assert layer.balancedness == 0.75
        assert (layer.hottest_expert, layer.hottest_share) == (0, 0.5)
        assert layer.most_replicas == 2


def a_report(worker: WorkerRef, window: tuple[int, ...], held: tuple[int, ...]) -> ExpertUpdate:
    report = ExpertReport(
        layers=(3,),
        tokens=(window,),
        window_tokens=(window,),
        held=(held,),
        shares=((1,) * len(held),),
        placement_epoch=1,
        migrations=0,
    )
    return ExpertUpdate(worker=worker, report=report)


@pytest.mark.anyio
async def test_samples_are_of_one_interval_and_sent_once_to_who_says_what_it_has() -> None:
    async with a_system() as system, client_of(system) as client:
        cluster = system.serving.cluster
        metrics = HttpMetrics(CollectorRegistry())
        samples = Samples(cluster, metrics, cluster.clock)
        await system.tokens(a_request(max_tokens=8))
        metrics.first_token.observe(0.15)
        samples.take()
        samples.take()
        first, second = samples.after(0)
        assert (first.number, second.number) == (1, 2)
        assert first.output_tokens_per_s == pytest.approx(8 * first.requests_per_s, rel=0.01)
        assert first.ttft_p50_s == pytest.approx(0.15)
        assert second.output_tokens_per_s == second.requests_per_s == 0
        assert second.ttft_p50_s is None
        assert [sample.number for sample in samples.after(1)] == [2]
        # A number from before a restart of the gateway is not known here: everything is sent.
        assert [sample.number for sample in samples.after(999)] == [1, 2]
        for wrong in ("-1", "x", "1" * 13, "\u0661"):
            answer = await client.get("/status", params={"after": wrong})
            assert answer.status_code == 400
            assert "after" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("counts", "share", "value"),
    [
        ([0, 0, 0], 0.5, None),
        ([4, 0, 0], 0.5, 0.5),
        ([2, 2, 0], 0.5, 1.0),
        ([0, 2, 0], 0.5, 2.0),
        ([1, 0, 9], 0.99, 3.0),  # above the last bound: that bound is all that is known
    ],
)
def test_quantiles_are_interpolated_within_a_bucket(
    counts: list[int], share: float, value: float | None
) -> None:
    assert quantile(counts, (1.0, 3.0), share) == value
