"""DeepSeek-V3 (arXiv 2412.19437) and Kimi K2: latent attention, shared and routed experts.

The first layers are dense. Routing is by sigmoid scores with a bias that only steers the choice,
limited to the best groups of experts. Layers after ``num_layers`` (multi-token prediction) are
never asked for.
"""

import torch

from engine.models.feed_forward import SparseWeights, describe_dense, describe_experts
from engine.models.latent_attention import describe_latent
from engine.models.parts import LayerWeights, Setting
from engine.weights.reader import WeightReader


def describe_layer(weights: WeightReader, setting: Setting, layer: int) -> LayerWeights:
    config = setting.config
    hidden, at = config.hidden_width, f"model.layers.{layer}"
    return LayerWeights(
        attention_norm_D=weights.want(f"{at}.input_layernorm.weight", hidden),
        attention=describe_latent(weights, setting, f"{at}.self_attn"),
        feed_forward_norm_D=weights.want(f"{at}.post_attention_layernorm.weight", hidden),
        feed_forward=(
            _describe_sparse(weights, setting, f"{at}.mlp")
            if config.sparse_layers[layer]
            else describe_dense(weights, setting, f"{at}.mlp", width=config.intermediate_width)
        ),
    )


def _describe_sparse(weights: WeightReader, setting: Setting, prefix: str) -> SparseWeights:
    experts, hidden = setting.config.experts, setting.config.hidden_width
    assert experts is not None

    def names(expert: int) -> tuple[str, str, str]:
        at = f"{prefix}.experts.{expert}"
        return f"{at}.gate_proj.weight", f"{at}.up_proj.weight", f"{at}.down_proj.weight"

    count = experts.num_experts
    return SparseWeights(
        router_ED=weights.want(f"{prefix}.gate.weight", count, hidden, dtype=torch.float32),
        bias_E=weights.want(f"{prefix}.gate.e_score_correction_bias", count, dtype=torch.float32),
        experts=describe_experts(weights, setting, names),
        shared=(
            describe_dense(weights, setting, f"{prefix}.shared_experts", width=experts.shared_width)
            if experts.shared_width
            else None
        ),
    )
