"""What cannot serve is refused when the ranks start: on every rank, with the rule and the fix."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from decode.settings import DecodeSettings
from protocol.errors import ConfigError
from tests.support.ranks import Parent, RankProcess, free_address
from tests.support.refusals import PATIENCE_S, Options, refused

pytestmark = pytest.mark.multirank
SEATS = 3


def live(seat: int, options: Options, parent: Parent) -> None:
    """A rank's own main, with its settings."""
    from decode.worker import run

    try:
        run(DecodeSettings.model_validate(options))
    except ConfigError as error:
        parent.send(str(error))


def options_of(seat: int, folder: Path, address: str, **experts: object) -> Options:
    return {
        "model": {"path": str(folder), "name": "tiny", "dtype": "float32"},
        "kv_cache_bytes": 2**20,
        "group": {
            "rank": seat,
            "ranks": SEATS,
            "rendezvous": address,
            "rendezvous_timeout_s": PATIENCE_S,
        },
        "experts": experts,
    }


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("deepseek_v3")


@pytest.mark.parametrize("odd", range(SEATS))
def test_a_transport_that_one_rank_cannot_have_is_told_on_every_rank(
    started: list[RankProcess], folder: Path, odd: int
) -> None:
    address = free_address()
    options = [options_of(seat, folder, address) for seat in range(SEATS)]
    options[odd] = options_of(odd, folder, address, transport="nccl_ep")

    for seat, reason in enumerate(refused(live, started, options)):
        assert seat == odd or f"rank {odd} cannot serve: " in reason
        assert "it needs the library nccl.ep, which cannot be imported" in reason
        assert "install headrace[nccl-ep] on every rank, or choose another transport" in reason


@pytest.mark.parametrize("odd", [0, 2])
def test_another_checkpoint_on_one_rank_is_told_on_every_rank(
    started: list[RankProcess], folder: Path, tiny_checkpoint: Callable[[str], Path], odd: int
) -> None:
    address = free_address()
    other = tiny_checkpoint("qwen3_moe")
    options = [options_of(seat, other if seat == odd else folder, address) for seat in range(SEATS)]
    for reason in refused(live, started, options):
        assert "weights is " in reason
        assert f"on rank {odd or 1}, " in reason
        assert "all ranks must be started with the same model, release and settings" in reason


def test_a_file_that_one_rank_lacks_is_told_on_every_rank(
    started: list[RankProcess], folder: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    for shard in damaged.glob("*.safetensors"):
        shard.unlink()
    address = free_address()
    options = [options_of(seat, damaged if seat == 1 else folder, address) for seat in range(SEATS)]
    assert all("safetensors" in reason for reason in refused(live, started, options))


def test_another_number_of_ranks_on_one_of_them_is_told_on_every_rank(
    started: list[RankProcess], folder: Path
) -> None:
    address = free_address()
    options = [options_of(seat, folder, address) for seat in range(SEATS)]
    options[2]["group"]["ranks"] = SEATS + 1
    for reason in refused(live, started, options):
        assert f"decode.group.ranks is {SEATS + 1} on rank 2, {SEATS} on rank 0" in reason


@pytest.mark.parametrize(
    "wrong",
    [
        ({"num_experts_per_tok": 99}, {}, "num_experts_per_tok"),
        ({}, {"transport": "deepep"}, "it is compiled for widths 2048"),
        ({}, {"payload": "fp8"}, "scales 128 values together and the model's width is 64"),
    ],
    ids=["more experts chosen than there are", "width", "width of scales"],
)
def test_what_no_rank_can_serve_is_refused_by_every_rank(
    started: list[RankProcess],
    folder: Path,
    tmp_path: Path,
    wrong: tuple[dict[str, int], dict[str, str], str],
) -> None:
    change, experts, rule = wrong
    changed = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_bytes())
    (changed / "config.json").write_text(json.dumps(config | change))
    address = free_address()
    options = [options_of(seat, changed, address, **experts) for seat in range(SEATS)]
    assert all(rule in reason for reason in refused(live, started, options))
