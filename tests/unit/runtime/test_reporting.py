import json
import os

import pytest

from protocol.errors import ConfigError
from runtime.reporting import report
from runtime.settings import REPORT_FD, inherited_fd


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> int:
    reading, writing = os.pipe()
    monkeypatch.setenv(REPORT_FD, str(writing))
    return reading


def test_a_report_is_one_json_line(pipe: int) -> None:
    report("weights", done=3, total=10)
    assert os.read(pipe, 4096) == b'{"event": "weights", "done": 3, "total": 10}\n'


def test_a_long_message_is_cut_so_that_the_line_is_written_at_once(pipe: int) -> None:
    report("failed", message="ü" * 100_000)
    line = os.read(pipe, 1 << 20)
    assert len(line) < 4096
    assert json.loads(line)["event"] == "failed"


def test_a_report_that_nobody_reads_is_not_an_error(pipe: int) -> None:
    os.close(pipe)
    report("ready")


def test_without_a_launcher_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REPORT_FD, raising=False)
    report("ready")
    assert inherited_fd(REPORT_FD) is None


def test_a_variable_that_is_no_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be the number of an open file"):
        inherited_fd(REPORT_FD, {REPORT_FD: "stdout"})
