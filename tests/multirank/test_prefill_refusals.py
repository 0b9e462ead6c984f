"""Prefill ranks that cannot serve together end at start-up, every one with the rule and the fix."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefill.settings import PrefillSettings
from protocol.errors import ConfigError
from tests.support.ranks import Parent, RankProcess, free_address, start_rank

pytestmark = pytest.mark.multirank
RANKS = 2
PATIENCE_S = 60.0  # of the ranks; a test that takes so long has found nobody
Options = dict[str, Any]


def live(rank: int, options: Options, parent: Parent) -> None:
    """A rank's own main, with its settings."""
    from prefill.worker import run

    try:
        run(PrefillSettings.model_validate(options))
    except ConfigError as error:
        parent.send(str(error))


def options_of(rank: int, folder: Path, address: str, **more: object) -> Options:
    return {
        "model": {"path": str(folder), "name": "tiny", "dtype": "float32"},
        "kv_cache_bytes": 2**20,
        "group": {
            "rank": rank,
            "ranks": RANKS,
            "rendezvous": address,
            "rendezvous_timeout_s": PATIENCE_S,
        },
        **more,
    }


@pytest.fixture
def started() -> Iterator[list[RankProcess]]:
    ranks: list[RankProcess] = []
    yield ranks
    for rank in ranks:
        rank.stop()


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


def refused(started: list[RankProcess], options: list[Options]) -> list[str]:
    """What each rank ends with; all do, before their patience does."""
    began = time.monotonic()
    started += [start_rank(live, rank, each) for rank, each in enumerate(options)]
    reasons = [str(rank.receive(PATIENCE_S)) for rank in started]
    assert time.monotonic() - began < PATIENCE_S, "they have waited for one another"
    return reasons


def test_heads_that_do_not_divide_are_refused_by_every_rank(
    started: list[RankProcess], folder: Path
) -> None:
    address = free_address()
    options = [options_of(rank, folder, address) for rank in range(3)]
    for each in options:
        each["group"]["ranks"] = 3
    for reason in refused(started, options):
        assert "prefill.group.ranks is 3: the model's 4 attention heads cannot be split" in reason
        assert "use a number of ranks that divides them" in reason


def test_caches_of_unequal_size_are_refused_by_every_rank(
    started: list[RankProcess], folder: Path
) -> None:
    address = free_address()
    options = [
        options_of(0, folder, address, num_blocks=32),
        options_of(1, folder, address, num_blocks=48),
    ]
    for reason in refused(started, options):
        assert "num_blocks is 48 on rank 1, 32 on rank 0" in reason
        assert "rank 1 cannot join the prefill ranks" in reason


@pytest.mark.slow
def test_another_checkpoint_on_one_rank_is_refused_by_every_rank(
    started: list[RankProcess], folder: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    address = free_address()
    options = [
        options_of(0, folder, address),
        options_of(1, tiny_checkpoint("mixtral"), address),
    ]
    for reason in refused(started, options):
        assert "weights is " in reason


@pytest.mark.slow
def test_a_rank_that_finds_no_weights_ends_every_rank(
    started: list[RankProcess], folder: Path, tmp_path: Path
) -> None:
    address = free_address()
    options = [options_of(0, folder, address), options_of(1, tmp_path / "nothing", address)]
    for reason in refused(started, options):
        assert "there is no such model folder or GGUF file" in reason
