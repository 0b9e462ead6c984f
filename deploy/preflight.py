"""Checks that need neither torch nor a child process, so a plain mistake is told at once.

They find what people get wrong most: a path that is not a model, a download that stopped half-way,
a port that is taken. Passing them promises nothing; the workers check again what they read.
"""

import json
import socket
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError

_LENGTH = struct.Struct("<Q")  # a safetensors file starts with its header's length
_MAX_HEADER_BYTES = 100 << 20  # the safetensors format's own limit


def check_model(path: str) -> None:
    """
    Raises:
        ConfigError: there is no model at ``path``, or its files are incomplete.
    """
    model = Path(path)
    if not model.exists():
        raise ConfigError(
            f"no model at {path}: give a checkpoint directory, a .gguf file or smollm2"
        )
    try:
        if model.is_file():
            _check_gguf(model)
        else:
            _check_checkpoint(model)
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename or path}: {error.strerror}") from None


class HeldPorts:
    """Ports that are this system's own from before its processes start until it ends.

    Loading weights takes a while, and a port that is merely free may be anybody's by the time
    somebody listens there. So a socket stays bound to it that does not listen: the kernel then
    gives the port to nobody who asks for any, and whoever sets SO_REUSEADDR, as all our listeners
    do, may listen there.
    """

    def __init__(self) -> None:
        self._holding = ExitStack()

    def __enter__(self) -> "HeldPorts":
        return self

    def __exit__(self, *_: object) -> None:
        self._holding.close()

    def take(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Hold ``port``, or some free one for 0, at this machine's address ``host``.

        Raises:
            ConfigError: another process listens there, or ``host`` is no address of this machine.
        """
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            holder = self._holding.enter_context(socket.socket(family, kind, protocol))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(address)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another with --port"
            ) from None
        return int(holder.getsockname()[1])


def free_port(host: str) -> int:
    """A port at this machine's address ``host`` that was free a moment ago."""
    with HeldPorts() as ports:
        return ports.take(host)


def _check_gguf(file: Path) -> None:
    from engine.weights.gguf_header import GgufHeader, map_gguf  # needs numpy; folders do not

    with map_gguf(file) as data:
        GgufHeader(file, data)


def _check_checkpoint(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        _read_json(folder / name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(_read_json(index)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError):
            raise ConfigError(f"{index} is damaged: it has no weight_map") from None
        files = [folder / str(shard) for shard in shards]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"no .safetensors file in {folder}")
    for file in files:
        _check_safetensors(file)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"no file {file}: the checkpoint is incomplete") from None
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from None


def _check_safetensors(file: Path) -> None:
    if not file.exists():
        raise ConfigError(f"no file {file}: the checkpoint is incomplete")
    size = file.stat().st_size
    with file.open("rb") as head:
        start = head.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else 0
        if not 0 < length <= min(size - _LENGTH.size, _MAX_HEADER_BYTES):
            raise ConfigError(f"{file} is damaged: it has no safetensors header")
        try:
            tensors = json.loads(head.read(length))
            ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name[0] != "_"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ConfigError(f"{file} is damaged: its header is not readable") from None
    expected = _LENGTH.size + length + max(ends, default=0)
    if size != expected:
        raise ConfigError(f"{file} is incomplete: {size} bytes instead of {expected}")
