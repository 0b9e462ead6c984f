"""Compiles the kernels of a model before the first request would have to wait for it."""

import torch

from engine.config import MlaConfig, ModelConfig
from engine.cpu import (
    experts,
    grouped_attention,
    grouped_prefill,
    latent_attention,
    latent_prefill,
    packed_weights,
    rows,
)
from engine.cpu.values import FORMATS


def compile_kernels(config: ModelConfig, dtype: torch.dtype, block_tokens: int) -> None:
    """All that a CPU rank of this model runs; some seconds on a machine that has none yet.

    A kernel that is not named here is compiled when it is first called.
    """
    if dtype not in FORMATS:
        return
    attention, routed = config.attention, config.experts
    norms = [config.hidden_width]
    gates = [] if config.split_dense_experts else [config.intermediate_width]
    if isinstance(attention, MlaConfig):
        norms += [attention.latent_width, *([attention.query_rank] if attention.query_rank else [])]
        latent_attention.prepare(attention, block_tokens, dtype)
        latent_prefill.prepare(attention, dtype)
    else:
        grouped_attention.prepare(attention, block_tokens, dtype)
        grouped_prefill.prepare(attention, dtype)
    if routed is not None:
        experts.prepare(config.hidden_width, routed.intermediate_width, dtype)
        gates += [routed.shared_width] if routed.shared_width else []
    elif config.split_dense_experts:
        width = config.intermediate_width // config.split_dense_experts
        experts.prepare(config.hidden_width, width, dtype)
    rows.prepare(norms, gates, dtype)
    if dtype == torch.bfloat16:
        packed_weights.prepare()
