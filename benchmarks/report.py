"""How every benchmark ends: a table for people, then one line of JSON.

The line is the last of standard output: ``{"benchmark", "figures", "bars": [{"name", "value",
"limit", "holds"}]}``. The table goes to standard error.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Figure = float | int | str | None


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure with a limit on one side; exactly one of the two is given."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"bar {self.name!r} needs exactly one of at_least and at_most")

    @property
    def holds(self) -> bool:
        if self.at_least is not None:
            return self.value >= self.at_least
        return self.at_most is not None and self.value <= self.at_most

    @property
    def limit(self) -> float | None:
        return self.at_most if self.at_least is None else self.at_least


def print_report(
    benchmark: str, figures: Mapping[str, Figure], bars: Sequence[Bar], *, only_json: bool
) -> int:
    """The process's exit code: 0 when every bar holds, else 1."""
    if not only_json:
        print(_table(figures, bars), file=sys.stderr)
    line = {
        "benchmark": benchmark,
        "figures": dict(figures),
        "bars": [
            {"name": bar.name, "value": bar.value, "limit": bar.limit, "holds": bar.holds}
            for bar in bars
        ],
    }
    print(json.dumps(line), flush=True)
    return 0 if all(bar.holds for bar in bars) else 1


def _table(figures: Mapping[str, Figure], bars: Sequence[Bar]) -> str:
    width = max((len(name) for name in (*figures, *(bar.name for bar in bars))), default=0)
    lines = [f"{name:<{width}}  {_short(value):>12}" for name, value in figures.items()]
    for bar in bars:
        side = "at least" if bar.at_least is not None else "at most"
        verdict = "holds" if bar.holds else "FAILS"
        lines.append(
            f"{bar.name:<{width}}  {_short(bar.value):>12}  {side} {_short(bar.limit)}: {verdict}"
        )
    return "\n".join(lines)


def _short(value: Figure) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
