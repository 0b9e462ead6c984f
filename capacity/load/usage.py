"""Token counts and finish of an answer, and stages from the ``server-timing`` header."""

import re
from collections.abc import Mapping
from typing import Any

TOTALS = frozenset({"ttft", "total"})  # stages that contain others
_COMMA_OUTSIDE_QUOTES = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)')


def token_counts(usage: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Input, output and cached tokens of a ``usage`` object of any endpoint."""
    given = usage.get("prompt_tokens", usage.get("input_tokens"))
    made = usage.get("completion_tokens", usage.get("output_tokens"))
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return _count(given), _count(made), _count(details.get("cached_tokens"))


def server_stages(header: str) -> dict[str, float]:
    """``queue;dur=1.5, prefill;desc="x";dur=20`` as milliseconds by stage (W3C Server Timing)."""
    stages: dict[str, float] = {}
    for metric in _COMMA_OUTSIDE_QUOTES.split(header):
        name, *parameters = (part.strip() for part in metric.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip().lower() == "dur" and name:
                try:
                    stages[name] = float(value.strip().strip('"'))
                except ValueError:
                    continue
    return stages


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
