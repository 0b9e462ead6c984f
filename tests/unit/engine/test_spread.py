import msgspec
import pytest

from engine.experts.placement import place_evenly, shared_trays
from engine.experts.recorded_load import RecordedLoad, parse_load
from engine.experts.spread import ExpertSpread, digest
from protocol.errors import ConfigError

SPARSE = (False, True, True)
HOT = [90.0, 1, 1, 1, 1, 1]
LOAD = RecordedLoad(num_experts=6, layers={1: HOT, 2: HOT[::-1]})


def document(**changes: object) -> bytes:
    known = msgspec.json.decode(LOAD.to_json())
    return msgspec.json.encode(known | changes)


def test_without_a_load_all_layers_are_placed_evenly() -> None:
    spread = ExpertSpread(redundant=2)
    assert spread.placements(6, SPARSE, 4) == (place_evenly(6, 4, 2),) * 3


def test_each_layer_is_placed_by_its_own_load() -> None:
    spread = ExpertSpread(redundant=2, ranks_per_tray=2, load=LOAD)
    _, first, second = spread.placements(6, SPARSE, 4)
    assert first.slots_per_rank == second.slots_per_rank == 2
    assert [len(replicas) for replicas in first.replicas()] == [3, 1, 1, 1, 1, 1]
    assert [len(replicas) for replicas in second.replicas()] == [1, 1, 1, 1, 1, 3]
    assert shared_trays(first, spread.topology(4)) == 1  # three replicas, two trays


def test_a_recorded_load_survives_the_file() -> None:
    assert parse_load(LOAD.to_json(), "load.json") == LOAD


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "load.json: is not a recorded expert load"),
        (b"[]", "is not a recorded expert load"),
        (document(extra=1), "unknown field `extra`"),
        (document(layers={"x": HOT}), "is not a recorded expert load"),
        (document(version=2), "version 2 is not .* version 1; record the load again"),
        (document(format="other"), "format 'other'"),
        (document(layers={}), "layers is empty"),
        (document(num_experts=5), "layer 1 has 6 numbers, num_experts says 5"),
        (document(layers={"4": [*HOT[1:], -1.0]}), "layer 4 has a negative number"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(text: bytes, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_load(text, "load.json")


def test_a_load_of_another_model_is_refused() -> None:
    spread = ExpertSpread(load=LOAD)
    with pytest.raises(
        ConfigError, match=r"6 experts in layers 1 to 2, the model has 6 in .* 1, 3"
    ):
        spread.placements(6, (False, True, False, True), 2)
    with pytest.raises(ConfigError, match="the model has 8"):
        spread.placements(8, SPARSE, 2)


def test_digests_tell_placements_apart() -> None:
    first, second = place_evenly(6, 3), place_evenly(6, 3, 1)
    assert digest([first, second]) == digest([place_evenly(6, 3), second])
    assert len({digest(first), digest(second), digest(first, second), digest()}) == 4
    assert all(0 <= digest(n) < 2**63 for n in range(20))
