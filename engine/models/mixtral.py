"""Mixtral (arXiv 2401.04088): grouped-query attention, every layer routed by softmax."""

import torch

from engine.models.feed_forward import SparseWeights, describe_experts
from engine.models.grouped_attention import describe_grouped_query
from engine.models.parts import LayerWeights, Setting
from engine.weights.reader import WeightReader


def describe_layer(weights: WeightReader, setting: Setting, layer: int) -> LayerWeights:
    hidden, at = setting.config.hidden_width, f"model.layers.{layer}"
    return LayerWeights(
        attention_norm_D=weights.want(f"{at}.input_layernorm.weight", hidden),
        attention=describe_grouped_query(weights, setting, f"{at}.self_attn"),
        feed_forward_norm_D=weights.want(f"{at}.post_attention_layernorm.weight", hidden),
        feed_forward=_describe_sparse(weights, setting, f"{at}.block_sparse_moe"),
    )


def _describe_sparse(weights: WeightReader, setting: Setting, prefix: str) -> SparseWeights:
    experts = setting.config.experts
    assert experts is not None

    def names(expert: int) -> tuple[str, str, str]:
        at = f"{prefix}.experts.{expert}"
        return f"{at}.w1.weight", f"{at}.w3.weight", f"{at}.w2.weight"

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
