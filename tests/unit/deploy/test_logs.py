"""Every line says which process it is of, since several write to one place."""

import json
import logging
from typing import Literal

import pytest

from deploy.logs import configure_logging
from runtime.log import get_log
from runtime.settings import ProcessSettings


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own handlers and level come back."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)


def logged(capsys: pytest.CaptureFixture[str], form: Literal["json", "text"]) -> str:
    configure_logging(ProcessSettings(log_format=form), "decode-0/2")
    get_log("decode.loop").warning("a rank is late", ranks=[3])
    return capsys.readouterr().err


def test_a_line_of_json_names_its_process(capsys: pytest.CaptureFixture[str]) -> None:
    line = json.loads(logged(capsys, "json"))
    del line["ts"]
    assert line == {
        "level": "WARNING",
        "process": "decode-0/2",
        "logger": "decode.loop",
        "event": "a rank is late",
        "ranks": [3],
    }


def test_a_line_of_text_names_its_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert logged(capsys, "text").endswith(
        " decode-0/2 warning decode.loop: a rank is late ranks=[3]\n"
    )
