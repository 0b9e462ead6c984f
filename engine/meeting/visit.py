"""A rank's visit to another one: is it there, and what does it say."""

import socket
from collections.abc import Callable

from engine.meeting.tickets import Follow, Refusal, Roll, Sealed, Ticket, Wait
from protocol.errors import ConfigError, WorkerLost

SILENT_S = 1.0  # who says nothing for so long is frozen, or as good as that


def visit(
    address: str, ticket: Ticket, *, group: str, key: bytes, on_wait: Callable[[], None]
) -> Follow | Roll:
    """Wait at ``address`` for the roll, or for being sent elsewhere. ``on_wait`` is called several
    times a second, first when it is known that the host lives; what it raises ends the visit.

    Raises:
        WorkerLost: nobody is there, or the host has gone or fallen silent.
        ConfigError: this rank cannot be in a group with the host.
    """
    with _connected(address) as connection:
        sealed = Sealed(connection, group=group, key=key, host=False)
        sealed.be_greeted()
        while True:
            sealed.send(ticket)
            answer = sealed.answer()
            if isinstance(answer, Refusal):
                raise ConfigError(answer.reason)
            if not isinstance(answer, Wait):
                return answer
            on_wait()


def answers(address: str, group: str) -> bool:
    """Whether a rank of ``group`` receives visitors there; takes ``SILENT_S`` if it is frozen."""
    try:
        with _connected(address) as connection:
            Sealed(connection, group=group, key=b"", host=False).be_greeted()
            return True
    except WorkerLost:
        return False


def _connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        return socket.create_connection((host.strip("[]"), int(port)), timeout=SILENT_S)
    except OSError as error:
        raise WorkerLost(f"nobody answers at {address}: {error}") from error
