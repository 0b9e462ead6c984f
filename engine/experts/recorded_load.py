"""A recorded load: how many tokens chose each expert of each layer, as a JSON document.

    {"format": "headrace-expert-load", "version": 1, "num_experts": 4,
     "layers": {"3": [120, 7, 0, 43], "4": [60, 60, 25, 25]}}

Experts and layers are numbered as in the checkpoint. Units are tokens of any window: only
proportions within a layer matter. Where the document lies is unknown here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from protocol.errors import ConfigError

FORMAT = "headrace-expert-load"
VERSION = 1


class _Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: str
    version: int
    num_experts: int
    layers: dict[int, list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedLoad:
    num_experts: int
    layers: Mapping[int, Sequence[float]]  # layer -> tokens by expert

    def to_json(self) -> bytes:
        layers = {layer: list(tokens) for layer, tokens in sorted(self.layers.items())}
        return msgspec.json.encode(
            _Document(format=FORMAT, version=VERSION, num_experts=self.num_experts, layers=layers)
        )


def parse_load(document: bytes, origin: str) -> RecordedLoad:
    """What ``to_json`` wrote, or a document of the same form; ``origin`` is named in errors.

    Raises:
        ConfigError: it is not such a document, or a layer's numbers are wrong.
    """
    try:
        found = msgspec.json.decode(document, type=_Document)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{origin}: is not a recorded expert load: {error}") from error
    if (found.format, found.version) != (FORMAT, VERSION):
        raise ConfigError(
            f"{origin}: format {found.format!r} version {found.version} is not {FORMAT!r} "
            f"version {VERSION}; record the load again with this release"
        )
    if not found.layers:
        raise ConfigError(f"{origin}: layers is empty; record at least one layer with experts")
    for layer, tokens in found.layers.items():
        if len(tokens) != found.num_experts:
            raise ConfigError(
                f"{origin}: layer {layer} has {len(tokens)} numbers, num_experts says "
                f"{found.num_experts}"
            )
        if any(amount < 0 for amount in tokens):
            raise ConfigError(f"{origin}: layer {layer} has a negative number of tokens")
    return RecordedLoad(num_experts=found.num_experts, layers=found.layers)
