import io

from deploy.console import Console
from deploy.processes import Report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def weights(done: int, total: int = 100_000_000) -> Report:
    return Report(event="weights", fields={"done": done, "total": total})


def test_without_a_terminal_each_phase_is_one_plain_line() -> None:
    out = io.StringIO()
    console = Console(out)
    console.reported("gateway", Report(event="listening", fields={"address": "http://h:1"}))
    for done in (0, 50_000_000, 100_000_000, 100_000_000):
        console.reported("prefill-0", weights(done))
    console.reported("prefill-0", Report(event="ready", fields={}))
    lines = out.getvalue().splitlines()
    assert lines[:2] == [
        "  gateway      listening on http://h:1",
        "  prefill-0    weights loaded, 100 MB",
    ]
    assert lines[2].startswith("  prefill-0    ready after ")
    assert len(lines) == 3


def test_on_a_terminal_a_bar_adds_up_all_processes() -> None:
    out = Terminal()
    console = Console(out)
    console.reported("prefill-0", weights(50_000_000))
    console.reported("decode-0/0", weights(100_000_000, 200_000_000))
    assert "150 of 300 MB" in out.getvalue().rpartition("\r")[2]


def test_a_line_takes_the_place_of_the_bar() -> None:
    out = Terminal()
    console = Console(out)
    console.reported("prefill-0", weights(50_000_000))
    console.say("draining")
    assert out.getvalue().endswith("\r\x1b[Kdraining\n")


def test_a_report_without_numbers_is_not_shown() -> None:
    out = Terminal()
    Console(out).reported("prefill-0", Report(event="weights", fields={"done": "x"}))
    assert out.getvalue() == ""
