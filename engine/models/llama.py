"""Llama and what shares its shape (SmolLM2): grouped-query attention and a gated dense layer.

With ``split_dense_experts`` each dense layer is read as that many experts instead.
"""

from engine.models.feed_forward import describe_dense, describe_split
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
            describe_split(weights, setting, f"{at}.mlp")
            if config.split_dense_experts
            else describe_dense(weights, setting, f"{at}.mlp", width=config.intermediate_width)
        ),
    )
