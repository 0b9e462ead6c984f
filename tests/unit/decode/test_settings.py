"""What a rank's settings refuse."""

import pytest
from pydantic import ValidationError

from decode.settings import DecodeSettings, GroupSettings
from runtime.settings import host_of


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_a_rank_does_not_tell_others_an_address_that_is_every_interface(host: str) -> None:
    with pytest.raises(ValidationError, match="name the one at which they reach this worker"):
        DecodeSettings(bind=f"tcp://{host}:7000")


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("tcp://10.0.0.7:0", "10.0.0.7"),
        ("tcp://[fe80::1]:7", "fe80::1"),
        ("tcp://node-3:9", "node-3"),
    ],
)
def test_kv_is_listened_for_where_the_bus_is(address: str, host: str) -> None:
    assert host_of(DecodeSettings(bind=address).bind) == host


@pytest.mark.parametrize(
    ("ranks", "nodes", "found"),
    [
        (8, 1, [range(8)]),
        (8, 2, [range(4), range(4, 8)]),
        (7, 3, [range(2), range(2, 4), range(4, 7)]),
    ],
)
def test_the_nodes_of_a_group_share_its_ranks_in_order(
    ranks: int, nodes: int, found: list[range]
) -> None:
    groups = [GroupSettings(ranks=ranks, nodes=nodes, node=node) for node in range(nodes)]
    assert [group.ranks_of_node for group in groups] == found


@pytest.mark.parametrize(
    ("nodes", "node", "message"), [(3, 0, "lower nodes"), (2, 2, "raise nodes")]
)
def test_a_node_that_would_have_no_rank_is_refused(nodes: int, node: int, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GroupSettings(ranks=2, nodes=nodes, node=node)


def test_places_are_told_by_rank() -> None:
    group = GroupSettings(ranks=9, places="1=127.0.0.1:7001,8=[fe80::1]:7008")
    assert group.place_of == {1: "127.0.0.1:7001", 8: "[fe80::1]:7008"}
    assert GroupSettings().place_of == {}


@pytest.mark.parametrize("places", ["0=a:1", "9=a:1", "1=a:1,1=b:2"])
def test_a_place_of_a_rank_that_is_none_is_refused(places: str) -> None:
    with pytest.raises(ValidationError, match="name each rank once"):
        GroupSettings(ranks=9, places=places)


@pytest.mark.parametrize("places", ["a:1", "1=a", "1=a:1,", "x=a:1"])
def test_places_are_ranks_with_addresses(places: str) -> None:
    with pytest.raises(ValidationError, match="should match pattern"):
        GroupSettings(ranks=9, places=places)


@pytest.mark.parametrize(
    ("given", "device", "found"),
    [(None, "cpu", 10.0), (None, "cuda:1", 30.0), (2.5, "cuda", 2.5)],
)
def test_a_rank_is_lost_sooner_on_a_cpu_unless_told_otherwise(
    given: float | None, device: str, found: float
) -> None:
    settings = DecodeSettings(device=device, group=GroupSettings(step_timeout_s=given))
    assert settings.step_timeout_s == found
