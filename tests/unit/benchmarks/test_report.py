import json

import pytest

from benchmarks.report import Bar, print_report


@pytest.mark.parametrize(
    ("bar", "holds"),
    [
        (Bar("fast enough", 2.0, at_least=2.0), True),
        (Bar("too slow", 1.9, at_least=2.0), False),
        (Bar("short enough", 2.0, at_most=2.0), True),
        (Bar("too long", 2.1, at_most=2.0), False),
    ],
    ids=lambda value: value.name if isinstance(value, Bar) else "",
)
def test_the_last_line_and_the_exit_code_say_whether_the_bars_hold(
    bar: Bar, holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    code = print_report("engine", {"tokens": 3, "dtype": "bfloat16"}, [bar], only_json=False)
    printed = capsys.readouterr()
    assert code == (0 if holds else 1)
    assert json.loads(printed.out.splitlines()[-1]) == {
        "benchmark": "engine",
        "figures": {"tokens": 3, "dtype": "bfloat16"},
        "bars": [{"name": bar.name, "value": bar.value, "limit": 2.0, "holds": holds}],
    }
    assert ("holds" if holds else "FAILS") in printed.err


def test_only_json_prints_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_report("engine", {}, [], only_json=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("limits", [{}, {"at_least": 1.0, "at_most": 2.0}], ids=["none", "both"])
def test_a_bar_has_one_limit(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Bar("speed", 1.0, **limits)
