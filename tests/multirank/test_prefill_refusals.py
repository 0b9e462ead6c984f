"""Prefill ranks that cannot serve together end at start-up, every one with the rule and the fix."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefill.settings import PrefillSettings
from protocol.errors import ConfigError
from tests.support.ranks import Parent, RankProcess, free_address
from tests.support.refusals import PATIENCE_S, Options, refused

pytestmark = pytest.mark.multirank
RANKS = 2


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


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


def test_heads_that_do_not_divide_are_refused_by_every_rank(
    started: list[RankProcess], folder: Path
) -> None:
    address = free_address()
    options = [options_of(rank, folder, address) for rank in range(3)]
    for each in options:
        each["group"]["ranks"] = 3
    for reason in refused(live, started, options):
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
    for reason in refused(live, started, options):
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
    for reason in refused(live, started, options):
        assert "weights is " in reason


@pytest.mark.slow
def test_a_rank_that_finds_no_weights_ends_every_rank(
    started: list[RankProcess], folder: Path, tmp_path: Path
) -> None:
    address = free_address()
    options = [options_of(0, folder, address), options_of(1, tmp_path / "nothing", address)]
    for reason in refused(live, started, options):
        assert "there is no such model folder or GGUF file" in reason
