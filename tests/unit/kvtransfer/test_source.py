import pytest

from kvtransfer.carrier import TransportChoice
from kvtransfer.memory import allocate_shared, wrap
from kvtransfer.shm import host_id
from kvtransfer.sink import make_sink
from kvtransfer.source import make_source
from protocol.errors import ConfigError, TransferError
from protocol.kv import KVEndpoint
from tests.support.transfer_peers import Done
from tests.support.transfers import LAYOUT, Events, a_grant, a_worker, patterned


def test_shared_memory_that_does_not_answer_gives_way_to_tcp() -> None:
    decode, events = a_worker(), Events()
    sink = make_sink(allocate_shared(LAYOUT, 4), decode, events, transport="tcp")
    addresses = {**sink.endpoint.addresses, "shm": "headrace-kv-nobody"}
    endpoint = KVEndpoint(host_id=host_id(), num_blocks=4, addresses=addresses)
    grant = a_grant(decode, [], endpoint=endpoint)
    sink.expect(grant)
    source, done = make_source(patterned(LAYOUT, 4), a_worker("prefill-0")), Done()
    source.open(grant).finish(b"", done)
    events.committed()
    assert done.wait() is None
    source.close()
    sink.close()


@pytest.mark.parametrize(
    ("transport", "host", "offered"),
    [
        ("auto", "elsewhere", {"shm": "a"}),
        ("shm", host_id(), {"tcp": "127.0.0.1:1"}),
        ("tcp", host_id(), {"shm": "a"}),
        ("auto", host_id(), {}),
    ],
    ids=["shm of another host", "shm not offered", "tcp not offered", "nothing offered"],
)
def test_ends_without_a_common_transport_are_told_at_once(
    transport: TransportChoice, host: str, offered: dict[str, str]
) -> None:
    source = make_source(patterned(LAYOUT, 4), a_worker("prefill-0"), transport=transport)
    endpoint = KVEndpoint(host_id=host, num_blocks=4, addresses=offered)
    with pytest.raises(TransferError, match="no KV transport"):
        source.open(a_grant(a_worker(), [], endpoint=endpoint))
    source.close()


def test_a_decode_rank_that_is_not_there_fails_the_push_and_not_the_caller() -> None:
    source, done = make_source(patterned(LAYOUT, 4), a_worker("prefill-0")), Done()
    endpoint = KVEndpoint(host_id="elsewhere", num_blocks=4, addresses={"tcp": "127.0.0.1:1"})
    source.open(a_grant(a_worker(), [], endpoint=endpoint)).finish(b"", done)
    assert "cannot reach decode-0/0 by tcp" in str(done.wait())
    source.close()


@pytest.mark.parametrize(
    ("first_block", "blocks", "layers"),
    [(1, [0, 1], range(1)), (-1, [0], range(1)), (0, [4], range(1)), (0, [0], range(2, 4))],
    ids=["past the grant", "before the grant", "no such source block", "no such layer"],
)
def test_a_send_out_of_range_is_a_bug_of_the_caller(
    first_block: int, blocks: list[int], layers: range
) -> None:
    source = make_source(patterned(LAYOUT, 4), a_worker("prefill-0"))
    endpoint = KVEndpoint(host_id="", num_blocks=4, addresses={"tcp": "127.0.0.1:1"})
    push = source.open(a_grant(a_worker(), [0, 1], endpoint=endpoint))
    with pytest.raises(ValueError, match=r"not within|outside"):
        push.send(layers, first_block, blocks)  # type: ignore[arg-type]
    source.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "example.org"])
def test_a_sink_is_not_opened_to_a_network_without_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="set the key"):
        make_sink(allocate_shared(LAYOUT, 1), a_worker(), Events(), host=host)


def test_a_sink_on_every_address_must_say_how_it_is_reached() -> None:
    with pytest.raises(ConfigError, match="can reach"):
        make_sink(
            allocate_shared(LAYOUT, 1), a_worker(), Events(), host="0.0.0.0", cluster_key=b"k"
        )


def test_memory_that_cannot_be_shared_refuses_the_choice_of_shm() -> None:
    shared = allocate_shared(LAYOUT, 4)
    private = wrap(LAYOUT, 4, address=shared.address, owner=shared)
    with pytest.raises(ConfigError, match=r"kv\.transport is shm: .* not shared memory"):
        make_sink(private, a_worker(), Events(), transport="shm")
