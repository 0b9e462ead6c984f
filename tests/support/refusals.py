"""Ranks that are started and are to end by themselves, each with a reason."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.support.ranks import Parent, RankProcess, start_rank

PATIENCE_S = 60.0  # of the ranks; a test that takes so long has found nobody
Options = dict[str, Any]


def refused(
    live: Callable[[int, Options, Parent], None],
    started: list[RankProcess],
    options: Sequence[Options],
) -> list[str]:
    """What each rank ends with; all do, before their patience does."""
    began = time.monotonic()
    started += [start_rank(live, rank, each) for rank, each in enumerate(options)]
    reasons = [str(rank.receive(PATIENCE_S)) for rank in started]
    assert time.monotonic() - began < PATIENCE_S, "they have waited for one another"
    return reasons
