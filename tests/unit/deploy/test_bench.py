"""What the command refuses, each in one line and before any load."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.cli import main
from tests.support.scripted_server import Script, scripted_server


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with scripted_server(Script()) as reference:
        yield reference.url


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--slo", "fast"], "--slo: 'fast' is not understood"),
        (["--rate", "0"], "--rate: '0' is no number above 0"),
        (["--rate", "1", "--concurrency", "1"], "choose closed loop or open loop"),
        (["--search"], "--search needs --slo"),
        (["--trace", "/nowhere"], "--trace /nowhere: No such file"),
        (["--fault", "kill decode@1s"], "--fault needs a system that `headrace up` started"),
        (["--model", "other"], "no model 'other'"),
        (["--workers", "0"], "--workers: 0 must be at least 1"),
        (["--duration", "-1"], "--duration: -1 must be above 0"),
        (["--warmup", "40"], "--warmup: 40 must be less than the duration of 12 s"),
        (["--api-key-file", "/nowhere"], "--api-key-file: no API key in /nowhere"),
        (["--slo", "ttft=1s", "--no-stream"], "only e2e can be measured"),
        (["--rate", "1..5", "--requests", "9"], "a ramp needs --duration"),
        (["--concurrency", "1..5", "--requests", "9"], "a ramp needs --duration"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: Not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(
    url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], said: str
) -> None:
    assert said in refusal(
        capsys, url, *options, *([] if "--out" in options else ["--out", str(tmp_path)])
    )


def test_a_wrong_line_of_a_trace_is_named(
    url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"t": 0, "input": 5, "output": 2}\n{"t": 1, "input": 5}\n')
    said = refusal(capsys, url, "--trace", str(trace), "--out", str(tmp_path))
    assert f"{trace}, line 2: 'output' is missing" in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("http://127.0.0.1:1", "nobody answers at http://127.0.0.1:1 (Connection refused)"),
        ("ftp://localhost", "write http://HOST:PORT"),
        ("http://host.invalid", "cannot resolve host.invalid"),
        ("compare", "write `headrace bench compare A B`"),
    ],
)
def test_a_wrong_url_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, wrong: str, said: str
) -> None:
    assert said in refusal(capsys, wrong, "--out", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
