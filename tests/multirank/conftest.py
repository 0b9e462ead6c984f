from collections.abc import Iterator

import pytest

from tests.support.ranks import RankProcess


@pytest.fixture
def started() -> Iterator[list[RankProcess]]:
    """Rank processes that a test starts; they are stopped after it."""
    ranks: list[RankProcess] = []
    yield ranks
    for rank in ranks:
        rank.stop()
