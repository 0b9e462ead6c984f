from pathlib import Path

import anyio
import pytest
import zmq

from protocol.codec import Decoder, encode
from protocol.errors import ConfigError, WorkerLost
from protocol.ids import AttemptRef, GatewayId, RequestId
from protocol.messages import Cancel, GatewayAlive, ToDecode
from runtime.bus import FRAMES_A_TURN, Connection, Listener
from runtime.keys import ClusterKey
from tests.support.polling import eventually

pytestmark = pytest.mark.anyio
FAMILY: Decoder[ToDecode] = Decoder(ToDecode)
ANY_PORT = "tcp://127.0.0.1:0"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def cancel_of(request: str) -> Cancel:
    return Cancel(ref=AttemptRef(RequestId(request), 0))


async def heard(connection: Connection[ToDecode], count: int | None = None) -> list[ToDecode]:
    """The next ``count`` messages, or all until the connection is lost."""
    messages: list[ToDecode] = []
    with anyio.CancelScope() as enough:

        def hear(message: ToDecode) -> None:
            messages.append(message)
            if len(messages) == count:
                enough.cancel()

        await connection.read(hear)
    return messages


@pytest.mark.parametrize("key", [None, ClusterKey.generate()], ids=["plain", "with a key"])
async def test_messages_go_both_ways_in_order(key: ClusterKey | None) -> None:
    with anyio.fail_after(10):
        async with (
            Listener.bind(ANY_PORT, FAMILY, key=key) as listener,
            Connection.open(listener.address, FAMILY, key=key) as connection,
        ):
            for name in ("a", "b", "c"):
                await connection.send(cancel_of(name))
            received = [await anext(listener) for _ in range(3)]
            assert [message for _, message in received] == [cancel_of(n) for n in ("a", "b", "c")]
            await listener.send(received[0][0], GatewayAlive(gateway_id=GatewayId("g")))
            assert await heard(connection, 1) == [GatewayAlive(gateway_id=GatewayId("g"))]


async def test_a_connection_learns_that_its_listener_is_gone_after_reading_what_came() -> None:
    with anyio.fail_after(10):
        async with (
            Listener.bind(ANY_PORT, FAMILY) as listener,
            Connection.open(listener.address, FAMILY) as connection,
        ):
            await connection.send(cancel_of("hello"))
            peer, _ = await anext(listener)
            await listener.send(peer, cancel_of("last words"))

            def arrived() -> bool:
                return bool(int(connection._socket.get(zmq.EVENTS)) & zmq.POLLIN)

            await eventually(arrived, "the last words")
            listener._socket.close(linger=0)
            await connection.lost.wait()
            assert await heard(connection) == [cancel_of("last words")]
            assert await heard(connection) == []


async def test_what_the_reader_raises_ends_the_reading_and_loses_nothing() -> None:
    def refuse(message: ToDecode) -> None:
        raise ConfigError(f"not {message}")

    with anyio.fail_after(10):
        async with (
            Listener.bind(ANY_PORT, FAMILY) as listener,
            Connection.open(listener.address, FAMILY) as connection,
        ):
            await connection.send(cancel_of("hello"))
            peer, _ = await anext(listener)
            for name in ("a", "b"):
                await listener.send(peer, cancel_of(name))
            with pytest.raises(ConfigError, match="not Cancel"):
                await connection.read(refuse)
            assert await heard(connection, 1) == [cancel_of("b")]


async def test_more_frames_than_one_turn_takes_all_arrive() -> None:
    count = 3 * FRAMES_A_TURN + 1
    with anyio.fail_after(10):
        async with (
            Listener.bind(ANY_PORT, FAMILY) as listener,
            Connection.open(listener.address, FAMILY) as connection,
        ):
            await connection.send(cancel_of("hello"))
            peer, _ = await anext(listener)
            for number in range(count):
                await listener.send(peer, cancel_of(str(number)))
            assert await heard(connection, count) == [cancel_of(str(n)) for n in range(count)]


async def test_nobody_listening_is_an_error_within_the_time_given() -> None:
    with anyio.fail_after(5), pytest.raises(WorkerLost):
        async with Connection.open("tcp://127.0.0.1:1", FAMILY, timeout_s=0.5):
            pass


async def test_a_peer_without_the_key_gets_no_connection() -> None:
    with anyio.fail_after(10):
        async with Listener.bind(ANY_PORT, FAMILY, key=ClusterKey.generate()) as listener:
            for key in (None, ClusterKey.generate()):
                with pytest.raises(WorkerLost):
                    async with Connection.open(listener.address, FAMILY, key=key, timeout_s=0.5):
                        pass


async def test_a_frame_that_is_no_message_is_dropped_and_counted() -> None:
    with anyio.fail_after(10):
        async with (
            Listener.bind(ANY_PORT, FAMILY) as listener,
            Connection.open(listener.address, FAMILY) as connection,
        ):
            connection._socket.send(b"\xff not msgpack")
            connection._socket.send(encode(cancel_of("bad")).replace(b"bad", b"b\xffd"))
            await connection.send(cancel_of("good"))
            _, message = await anext(listener)
            assert message == cancel_of("good")
            assert listener.malformed_frames == 2


async def test_a_message_to_a_peer_that_left_is_dropped_and_counted() -> None:
    with anyio.fail_after(10):
        async with Listener.bind(ANY_PORT, FAMILY) as listener:
            async with Connection.open(listener.address, FAMILY) as connection:
                await connection.send(cancel_of("x"))
                peer, _ = await anext(listener)
            while listener.undeliverable_frames == 0:
                await listener.send(peer, cancel_of("y"))
                await anyio.sleep(0.01)


async def test_a_taken_port_and_a_public_address_without_a_key_are_refused() -> None:
    async with Listener.bind(ANY_PORT, FAMILY) as listener:
        with pytest.raises(ConfigError, match="cannot listen"):
            async with Listener.bind(listener.address, FAMILY):
                pass
    with pytest.raises(ConfigError, match="cluster key"):
        async with Listener.bind("tcp://0.0.0.0:0", FAMILY):
            pass


def test_a_key_survives_its_file_and_a_wrong_file_is_refused(tmp_path: Path) -> None:
    key = ClusterKey.generate()
    key.save(tmp_path / "key")
    assert ClusterKey.load(tmp_path / "key") == key
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    (tmp_path / "bad").write_text("nonsense")
    with pytest.raises(ConfigError, match="does not hold"):
        ClusterKey.load(tmp_path / "bad")
    with pytest.raises(ConfigError, match="cannot read"):
        ClusterKey.load(tmp_path / "absent")
