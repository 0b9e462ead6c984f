import io
import json
import sys
from pathlib import Path

import httpx
import msgspec
import pytest
from rich.console import Console

from deploy import top as command
from deploy.cli import main, parser
from deploy.top import fetch, key_headers, look, read
from deploy.top_screen import fall, figures_line, heading_line, printable, screen, spark
from protocol.errors import ConfigError
from server.page.data import (
    FORMAT,
    AttemptRow,
    EventRow,
    GatewayRow,
    RequestRow,
    StageRow,
    Status,
    WorkerRow,
)

HOSTILE = "w\x1b[2J\x07[bold]x[/bold]\u202e"


def a_worker(name: str) -> WorkerRow:
    return WorkerRow(
        worker=name,
        role="prefill",
        group=name,
        model="tiny",
        host="h",
        condition="linked",
        running=1,
        queued=2,
        queued_tokens=30,
        blocks=100,
        cached_blocks=10,
        granted_blocks=5,
        active_blocks=20,
        quarantined_blocks=0,
        step_s=0.0123,
        tokens_per_s=456.0,
        prompt_tokens=200,
        prefix_hit_tokens=50,
        generated_tokens=0,
        transfer_hidden_s=0.01,
        transfer_exposed_s=0.002,
    )


def a_request(*stages: tuple[str, float, float], seconds: float) -> RequestRow:
    rows = [StageRow(stage=s, begin_s=begin, seconds=lasting) for s, begin, lasting in stages]
    attempt = AttemptRow(prefill="p", decode="d", begin_s=0.0, tokens=4, failure="", stages=rows)
    return RequestRow(
        request="0123456789",
        model="tiny",
        outcome="done",
        age_s=1.0,
        seconds=seconds,
        prompt_tokens=7,
        cached_tokens=0,
        output_tokens=4,
        migrations=0,
        failure="",
        attempts=[attempt],
    )


def a_status(*, worker: str = "prefill-0", number: int = FORMAT) -> Status:
    return Status(
        format=number,
        sample_every_s=2.0,
        gateway=GatewayRow(
            ready=True,
            reason="1 of 1 pairs proven",
            models=["tiny"],
            open_requests=3,
            waiting=1,
            retries=0,
            migrations=2,
            stale_frames=0,
        ),
        workers=[a_worker(worker)],
        groups=[],
        links=[],
        experts=[],
        requests=[a_request(("prefill", 0.0, 0.5), ("decode", 0.5, 0.5), seconds=1.0)],
        events=[
            EventRow(
                kind="worker",
                severity="error",
                text=f"{worker} is lost",
                first_s=9.0,
                last_s=3.0,
                times=2,
            )
        ],
        samples=[],
    )


def a_client(*answers: httpx.Response) -> httpx.Client:
    waiting = list(answers)
    return httpx.Client(transport=httpx.MockTransport(lambda _: waiting.pop(0)))


def shown(status: Status, trouble: str = "") -> str:
    out = io.StringIO()
    console = Console(file=out, width=140, force_terminal=True, color_system=None)
    console.print(screen(status, url="http://h", trouble=trouble, rows=40))
    return out.getvalue()


def test_the_screen_shows_workers_requests_and_events() -> None:
    text = shown(a_status())
    assert "prefill-0" in text
    assert text.count("25%") == 2  # KV in use, and prompt tokens that were cached
    assert "01234567" in text
    assert "prefill-0 is lost (2 times)" in text
    assert "no answer" in shown(a_status(), trouble="no answer: gone")


def test_no_name_steers_the_terminal() -> None:
    text = shown(a_status(worker=HOSTILE))
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "[bold]x[/bold]" in text  # as it is written, not as markup
    assert "\x1b" not in printable(HOSTILE)


def test_a_request_is_drawn_in_proportion() -> None:
    cells = fall(a_request(("prefill", 0.0, 0.25), ("hand-over", 0.25, 0.75), seconds=1.0)).plain
    assert (cells.count("█"), cells.count("▒"), len(cells)) == (6, 18, 24)


def test_bars_are_blank_where_nothing_was_measured() -> None:
    assert spark([None, 0.0, 1.0]).strip() == "▁█"
    assert len(spark([1.0] * 99)) == 40


def test_figures_stand_under_their_names() -> None:
    assert len(heading_line()) == len(figures_line(a_status()))
    assert figures_line(a_status()).split()[:3] == ["1", "3", "1"]


def test_a_gateway_that_stops_answering_is_asked_again() -> None:
    body = msgspec.json.encode(a_status())
    with a_client(httpx.Response(503), httpx.Response(200, content=body)) as client:
        looks = look(client, "http://h", a_status(), interval_s=0.0)
        troubles = [next(looks)[1] for _ in range(3)]
    assert troubles == ["", "no answer: it answers 503", ""]


def test_other_servers_and_other_versions_are_told_apart() -> None:
    with pytest.raises(ValueError, match="not the status"):
        read(b"[1]")
    with pytest.raises(ValueError, match=f"reads {FORMAT}"):
        read(msgspec.json.encode(a_status(number=FORMAT + 1)))
    with a_client(httpx.Response(401)) as client, pytest.raises(ValueError, match="api-key-file"):
        fetch(client, "http://h")


def test_the_key_is_the_first_word_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret name=team\n")
    assert key_headers(file) == {"authorization": "Bearer secret"}
    with pytest.raises(ConfigError, match="no API key"):
        key_headers(tmp_path / "none")


def test_json_is_printed_once_and_as_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = msgspec.json.encode(a_status())
    monkeypatch.setattr(command, "fetch", lambda *_: body)
    assert command.top(parser().parse_args(["top", "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["gateway"]["migrations"] == 2


def test_lines_are_printed_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice(*_: object, **__: object) -> object:
        yield a_status(), ""
        yield a_status(), "no answer: \x1b[2J"
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "fetch", lambda *_: msgspec.json.encode(a_status()))
    monkeypatch.setattr(command, "look", twice)
    assert not sys.stdout.isatty()
    assert command.top(parser().parse_args(["top"])) == 0
    heading, figures, trouble = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == "workers"
    assert figures.split()[0] == "1"
    assert "\x1b" not in trouble


@pytest.mark.parametrize(
    ("options", "wrong"), [(["--interval", "0"], "--interval"), (["--timeout", "-1"], "--timeout")]
)
def test_wrong_options_are_named(
    options: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", *options]) == 1
    assert wrong in capsys.readouterr().err
