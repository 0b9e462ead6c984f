"""One NIXL agent on UCX: registered memory, peers, writes with a note attached, notes heard.

The agent makes progress only within its calls, so it costs nothing while nobody transfers: its own
progress thread would keep a core busy all the time. The ``nixl`` package is imported here and
nowhere else, when the first agent is made. Thread-safe, by one lock.
"""

import contextlib
import importlib
import logging
import secrets
import threading
from collections.abc import Sequence
from typing import Any, Literal

from protocol.errors import ConfigError, TransferError

MemoryKind = Literal["DRAM", "VRAM"]
Piece = tuple[int, int, int]  # (address, length, number of the device)
_MAX_NOTES = 1024  # that a peer may leave unread
HOW_TO_INSTALL = "install it with pip install 'headrace[nixl]'"


def library() -> tuple[Any, Any]:
    """NIXL's Python interface and its bindings. The first call takes a second or two.

    Raises:
        ConfigError: it is not installed or cannot be loaded.
    """
    logging.getLogger("nixl").setLevel(logging.WARNING)
    try:
        return importlib.import_module("nixl._api"), importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise ConfigError(
            f"the library nixl cannot be loaded: {error}; {HOW_TO_INSTALL}"
        ) from error


class Agent:
    """
    Raises:
        ConfigError: the library is not installed or cannot be loaded.
        TransferError: UCX finds no way out of this machine.
    """

    def __init__(self, owner: str) -> None:
        api, bindings = library()
        self._failures: tuple[type[Exception], ...] = tuple(
            kind
            for kind in vars(bindings).values()
            if isinstance(kind, type) and issubclass(kind, Exception)
        )
        self.name = f"{owner}#{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._notes: dict[str, list[bytes]] = {}
        self._registered: list[Any] = []
        try:
            self._agent: Any = api.nixl_agent(
                self.name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            )
        except self._failures as error:
            raise TransferError(f"NIXL finds no way to transfer: {error}") from error
        if "UCX" not in self._agent.backends:
            raise TransferError("this build of NIXL has no UCX")

    def register(self, address: int, num_bytes: int, kind: MemoryKind, device: int = 0) -> None:
        """Let this memory be read from and written to; it must live until ``close``."""
        with self._talking("cannot register memory"):
            self._registered.append(
                self._agent.register_memory([(address, num_bytes, device, "")], kind)
            )

    def metadata(self) -> bytes:
        """How others reach this agent's memory; whoever has it can write there."""
        with self._talking("has no address"):
            metadata: bytes = self._agent.get_agent_metadata()
            return metadata

    def meet(self, name: str, metadata: bytes) -> None:
        """
        Raises:
            TransferError: the metadata is not that of agent ``name``, or cannot be read.
        """
        with self._talking("cannot reach the peer"):
            met = self._agent.add_remote_agent(metadata)
            known = met.decode() if isinstance(met, bytes) else met
            if known != name:
                self._agent.remove_remote_agent(known)
                raise TransferError("the peer's NIXL agent is not the one that it named")
            self._notes[name] = []

    def part(self, name: str) -> None:
        """Nothing is read for writes to this peer any more; does nothing where it is unknown."""
        with self._lock, contextlib.suppress(*self._failures):
            if self._notes.pop(name, None) is not None:
                self._agent.remove_remote_agent(name)

    def write(
        self,
        peer: str,
        source: Sequence[Piece],
        target: Sequence[Piece],
        kinds: tuple[MemoryKind, MemoryKind],
        note: bytes,
    ) -> object:
        """Start a write; ``note`` reaches the peer when all of its bytes are in place. The answer
        is for ``is_done`` and then ``forget``.
        """
        with self._talking("cannot write to the peer"):
            here = self._agent.get_xfer_descs(list(source), kinds[0])
            there = self._agent.get_xfer_descs(list(target), kinds[1])
            write = self._agent.initialize_xfer("WRITE", here, there, peer, note)
            if self._agent.transfer(write) == "ERR":
                raise ConnectionResetError("NIXL could not start a write")
            return write

    def is_done(self, write: Any) -> bool:
        """
        Raises:
            ConnectionResetError: the write has failed.
        """
        with self._talking("lost the peer"):
            state = self._agent.check_xfer_state(write)
        if state == "ERR":
            raise ConnectionResetError("a write over NIXL has failed")
        return bool(state == "DONE")

    def forget(self, write: Any) -> None:
        """Give a write back, and stop it where it is still under way."""
        with self._lock, contextlib.suppress(*self._failures):
            self._agent.release_xfer_handle(write)

    def say(self, peer: str, note: bytes) -> None:
        with self._talking("cannot answer the peer"):
            self._agent.send_notif(peer, note)

    def heard(self, peer: str) -> list[bytes]:
        """Make progress, and take the notes that have come from ``peer``; others' are kept."""
        with self._talking("lost the peer"):
            for name, notes in self._agent.get_new_notifs().items():
                kept = self._notes.get(name)
                if kept is not None:  # else a stranger's, or of one that has left
                    kept += notes[: _MAX_NOTES - len(kept)]
            news, self._notes[peer] = self._notes.get(peer, []), []
            return news

    def close(self) -> None:
        with self._lock, contextlib.suppress(*self._failures):
            for name in list(self._notes):
                self._agent.remove_remote_agent(name)
            self._notes.clear()
            for registered in self._registered:
                self._agent.deregister_memory(registered)
            self._registered.clear()
        self._agent = None  # ends its connections

    @contextlib.contextmanager
    def _talking(self, problem: str) -> Any:
        with self._lock:
            if self._agent is None:
                raise ConnectionResetError("the NIXL agent has been closed")
            try:
                yield
            except self._failures as error:
                raise ConnectionResetError(f"NIXL {problem}: {error}") from error
