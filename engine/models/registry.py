"""The architectures that can be loaded. A new one is a file with ``read_layer`` and a line here."""

from collections.abc import Mapping

from engine.config import Architecture
from engine.models import deepseek_v3, llama, mixtral, qwen3_moe
from engine.models.parts import ReadLayer

READ_LAYER: Mapping[Architecture, ReadLayer] = {
    "llama": llama.read_layer,
    "mixtral": mixtral.read_layer,
    "qwen3_moe": qwen3_moe.read_layer,
    "deepseek_v3": deepseek_v3.read_layer,
}
