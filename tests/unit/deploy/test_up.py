"""Which processes the launcher starts, as commands."""

import pytest

from decode.settings import DecodeSettings
from deploy.cli import parser
from deploy.options import configuration
from deploy.preflight import HeldPorts
from deploy.processes import Command
from deploy.up import decode_ranks, prefill_ranks, up
from prefill.settings import PrefillSettings
from protocol.errors import ConfigError


def commands(*values: str) -> list[Command]:
    arguments = [part for value in values for part in ("--set", value)]
    chosen = parser().parse_args(["decode", *arguments])
    found = configuration(chosen, "decode", {})
    with HeldPorts() as ports:
        return decode_ranks(found, found.settings("decode", DecodeSettings), ports)


def given(command: Command, key: str) -> list[str]:
    return [part.partition("=")[2] for part in command.argv if part.startswith(f"decode.{key}=")]


def test_a_node_starts_its_own_ranks_only() -> None:
    started = commands("decode.group.ranks=8", "decode.group.nodes=2", "decode.group.node=1")
    assert [command.name for command in started] == [f"decode-0/{rank}" for rank in range(4, 8)]
    assert [given(command, "group.rank") for command in started] == [["4"], ["5"], ["6"], ["7"]]


def test_ranks_of_one_node_take_consecutive_ports_from_the_one_given() -> None:
    started = commands("decode.group.ranks=3", "decode.bind=tcp://10.0.0.7:8300")
    assert [given(command, "bind") for command in started] == [
        [f"tcp://10.0.0.7:{port}"] for port in (8300, 8301, 8302)
    ]


def test_ranks_take_free_ports_where_none_is_given() -> None:
    started = commands("decode.group.ranks=2")
    assert [given(command, "bind") for command in started] == [["tcp://127.0.0.1:0"]] * 2


def test_nodes_meet_where_they_are_told_and_a_single_node_wherever_a_port_is_free() -> None:
    alone = commands("decode.group.ranks=2")
    shared = commands("decode.group.ranks=2", "decode.group.nodes=2", "decode.group.node=1")
    told = commands(
        "decode.group.ranks=2", "decode.group.nodes=2", "decode.group.rendezvous=rank-0:8200"
    )
    assert len({place for command in alone for place in given(command, "group.rendezvous")}) == 1
    assert [given(command, "group.rendezvous") for command in shared] == [[]]  # the default
    assert [given(command, "group.rendezvous") for command in told] == [["rank-0:8200"]]


@pytest.mark.parametrize(
    ("device", "found"),
    [("cpu", ["cpu", "cpu"]), ("cuda", ["cuda:0", "cuda:1"]), ("cuda:1", ["cuda:1", "cuda:1"])],
)
def test_ranks_of_one_node_take_a_gpu_each(device: str, found: list[str]) -> None:
    started = commands(
        "decode.group.ranks=4",
        "decode.group.nodes=2",
        "decode.group.node=1",
        f"decode.device={device}",
    )
    assert [given(command, "device") for command in started] == [[of_rank] for of_rank in found]


def prefill_commands(*values: str, name: str = "prefill-0") -> list[Command]:
    arguments = [part for value in values for part in ("--set", value)]
    found = configuration(parser().parse_args(["prefill", *arguments]), "prefill", {})
    with HeldPorts() as ports:
        return prefill_ranks(found, found.settings("prefill", PrefillSettings), name, ports)


def given_to(command: Command, key: str) -> list[str]:
    return [part.partition("=")[2] for part in command.argv if part.startswith(f"prefill.{key}=")]


def test_the_prefill_rank_that_leads_has_the_workers_name_and_all_meet_at_one_place() -> None:
    started = prefill_commands("prefill.group.ranks=3", name="prefill-7")
    assert [command.name for command in started] == ["prefill-7", "prefill-7/1", "prefill-7/2"]
    assert [given_to(command, "group.rank") for command in started] == [["0"], ["1"], ["2"]]
    assert [given_to(command, "worker_id") for command in started] == [["prefill-7"]] * 3
    assert len({place for each in started for place in given_to(each, "group.rendezvous")}) == 1


def test_several_prefill_workers_meet_apart_also_where_a_place_was_given() -> None:
    setting = ("prefill.group.ranks=2", "prefill.workers=2", "prefill.group.rendezvous=a-host:8210")
    with HeldPorts() as ports:
        arguments = [part for value in setting for part in ("--set", value)]
        found = configuration(parser().parse_args(["prefill", *arguments]), "prefill", {})
        settings = found.settings("prefill", PrefillSettings)
        places = [
            given_to(prefill_ranks(found, settings, name, ports)[0], "group.rendezvous")
            for name in ("prefill-0", "prefill-1")
        ]
    assert places[0] != places[1]


def test_one_prefill_rank_needs_no_place_to_meet() -> None:
    (alone,) = prefill_commands("prefill.group.ranks=1")
    assert alone.name == "prefill-0"
    assert given_to(alone, "group.rank") == []


def test_prefill_ranks_take_a_gpu_each() -> None:
    started = prefill_commands("prefill.group.ranks=2", "prefill.device=cuda")
    assert [given_to(command, "device") for command in started] == [["cuda:0"], ["cuda:1"]]


def test_prefill_ranks_on_ray_are_refused_with_what_to_do() -> None:
    flags = ["up", "smollm2", "--port", "0", "--on", "ray", "--prefill-ranks", "3"]
    found = configuration(parser().parse_args(flags), "up", {})
    with pytest.raises(ConfigError, match=r"prefill\.group\.ranks is 3: on Ray .* use 1"):
        up(found)
