"""Qwen3-MoE (arXiv 2505.09388): normed query and key heads, layers dense or routed by softmax."""

import torch

from engine.models.feed_forward import SparseWeights, describe_dense, describe_experts
from engine.models.grouped_attention import describe_grouped_query
from engine.models.parts import LayerWeights, Setting
from engine.weights.reader import WeightReader


def describe_layer(weights: WeightReader, setting: Setting, layer: int) -> LayerWeights:
    config = setting.config
    hidden, at = config.hidden_width, f"model.layers.{layer}"
    return LayerWeights(
        attention_norm_D=weights.want(f"{at}.input_layernorm.weight", hidden),
        attention=describe_grouped_query(weights, setting, f"{at}.self_attn"),
        feed_forward_norm_D=weights.want(f"{at}.post_attention_layernorm.weight", hidden),
        feed_forward=(
            _describe_sparse(weights, setting, f"{at}.mlp")
            if config.sparse_layers[layer]
            else describe_dense(weights, setting, f"{at}.mlp", width=config.intermediate_width)
        ),
    )


def _describe_sparse(weights: WeightReader, setting: Setting, prefix: str) -> SparseWeights:
    experts = setting.config.experts
    assert experts is not None

    def names(expert: int) -> tuple[str, str, str]:
        at = f"{prefix}.experts.{expert}"
        return f"{at}.gate_proj.weight", f"{at}.up_proj.weight", f"{at}.down_proj.weight"

    return SparseWeights(
        router_ED=weights.want(
            f"{prefix}.gate.weight",
            experts.num_experts,
            setting.config.hidden_width,
            dtype=torch.float32,
        ),
        bias_E=None,
        experts=describe_experts(weights, setting, names),
        shared=None,
    )
