"""Which processes the launcher starts, as commands."""

import pytest

from decode.settings import DecodeSettings
from deploy.cli import parser
from deploy.options import configuration
from deploy.preflight import HeldPorts
from deploy.processes import Command
from deploy.up import decode_ranks


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
