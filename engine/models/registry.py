"""The architectures that can be loaded: a file with ``describe_layer`` and a line here each."""

from collections.abc import Mapping

from engine.config import Architecture
from engine.models import deepseek_v3, llama, mixtral, qwen3_moe
from engine.models.parts import DescribeLayer

DESCRIBE_LAYER: Mapping[Architecture, DescribeLayer] = {
    "llama": llama.describe_layer,
    "mixtral": mixtral.describe_layer,
    "qwen3_moe": qwen3_moe.describe_layer,
    "deepseek_v3": deepseek_v3.describe_layer,
}
