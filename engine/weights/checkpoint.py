"""Safetensors checkpoints, one file or sharded with an index. Nothing else is ever opened.

A shard is mapped when its first tensor is asked for, so a rank touches only the files that hold
its own tensors.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.weights.source import WHOLE, Part
from protocol.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
SAMPLE_BYTES = 4096


class Checkpoint:
    """A ``TensorSource`` over the safetensors files of one folder.

    Raises:
        ConfigError: there are none, the index is wrong, or a file is missing, truncated or corrupt.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}  # safe_open has no usable annotations
        if (folder / INDEX).exists():
            self._file_of = _read_index(folder / INDEX)
        elif (folder / SINGLE).exists():
            self._file_of = dict.fromkeys(self._shard(SINGLE).keys(), SINGLE)
        else:
            raise ConfigError(
                f"{folder}: has neither {SINGLE} nor {INDEX}; other weight formats are not read"
            )
        self._digest = self._digest_headers()

    @property
    def name(self) -> str:
        return str(self._folder)

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        if tensor not in self._file_of:
            return None
        return tuple(self._slice(tensor).get_shape())

    def read(self, tensor: str, part: Part = WHOLE) -> Tensor:
        found = self._slice(tensor)
        if found.get_dtype() not in DTYPES:
            raise ConfigError(
                f"{self._path(tensor)}: tensor {tensor} is {found.get_dtype()}; "
                f"supported are {', '.join(DTYPES)}"
            )
        if part == WHOLE:
            whole: Tensor = self._shard(self._file_of[tensor]).get_tensor(tensor)
            return whole
        rows, columns = part.rows or slice(None), part.columns or slice(None)
        taken: Tensor = found[rows] if part.columns is None else found[rows, columns]
        return taken

    def digest(self) -> str:
        return self._digest

    def close(self) -> None:
        self._open.clear()

    def _path(self, tensor: str) -> Path:
        return self._folder / self._file_of[tensor]

    def _slice(self, tensor: str) -> Any:
        try:
            return self._shard(self._file_of[tensor]).get_slice(tensor)
        except SafetensorError as error:
            raise ConfigError(
                f"{self._path(tensor)}: has no tensor {tensor}, though {INDEX} says so"
            ) from error

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            path = self._folder / name
            try:
                self._open[name] = safe_open(path, framework="pt")
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read: {error}") from error
            except SafetensorError as error:
                raise ConfigError(f"{path}: is truncated or corrupt: {error}") from error
        return self._open[name]

    def _digest_headers(self) -> str:
        """Sizes, headers and one sample of every file: tells checkpoints apart in milliseconds."""
        digest = hashlib.sha256()
        for name in sorted(set(self._file_of.values())):
            path = self._folder / name
            try:
                with path.open("rb") as file:
                    size = path.stat().st_size
                    length = int.from_bytes(file.read(8), "little")
                    if length > min(size - 8, MAX_HEADER_BYTES):
                        raise ConfigError(
                            f"{path}: is truncated or corrupt: its header claims {length} bytes, "
                            f"the file has {size}"
                        )
                    header = file.read(length)
                    file.seek(8 + length + (size - 8 - length) // 2)
                    digest.update(f"{name}\0{size}\0".encode() + header + file.read(SAMPLE_BYTES))
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        return digest.hexdigest()[:16]


def _read_index(path: Path) -> dict[str, str]:
    try:
        file_of = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(file_of, dict):
            raise TypeError("weight_map is not an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not a safetensors index: {error!r}") from error
    for tensor, file in file_of.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ConfigError(
                f"{path}: tensor {tensor} is said to be in {file!r}, "
                "which is not the name of a safetensors file in the same folder"
            )
    return file_of
