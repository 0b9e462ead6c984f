"""``ModelConfig`` from files: Hugging Face ``config.json`` or the metadata of a GGUF file.

Both spellings of rope are read: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``.
What a file asks for and the engine cannot do is refused here, not computed wrongly later.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from engine.config import (
    Architecture,
    ExpertsConfig,
    GqaConfig,
    LinearScaling,
    Llama3Scaling,
    MlaConfig,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from engine.config_fields import Fields
from protocol.errors import ConfigError

DEFAULT_THETA = 10000.0


def config_from_folder(folder: Path) -> ModelConfig:
    """Read ``config.json``, and stop tokens also from ``generation_config.json`` if it is there.

    Raises:
        ConfigError: a file is missing, is not JSON, or a key is missing, wrong or unsupported.
    """
    fields = Fields(str(folder / "config.json"), read_json(folder / "config.json"))
    kind = fields.text("model_type")
    if kind not in _FAMILIES:
        fields.fail("model_type", f"is {kind!r}; supported are {', '.join(sorted(_FAMILIES))}")
    if fields.has("quantization_config"):
        fields.fail("quantization_config", "asks for quantised weights; use a 16 or 32 bit copy")
    fields.require("hidden_act", "silu", default="silu")
    fields.require("attention_bias", False, default=False)
    fields.require("mlp_bias", False, default=False)
    config = _FAMILIES[kind](fields)
    generation = folder / "generation_config.json"
    if generation.exists():
        more = Fields(str(generation), read_json(generation)).token_ids("eos_token_id")
        config = replace(config, stop_token_ids=tuple(sorted({*config.stop_token_ids, *more})))
    if max(config.stop_token_ids, default=0) >= config.vocab_size:
        fields.fail("eos_token_id", f"must be below vocab_size {config.vocab_size}")
    return config


def config_from_gguf(path: Path, metadata: Mapping[str, object]) -> ModelConfig:
    """Read the metadata of a GGUF file of architecture ``llama`` without experts.

    Raises:
        ConfigError: a key is missing, wrong or unsupported.
    """
    fields = Fields(str(path), metadata)
    fields.require("general.architecture", "llama", default=None)
    if fields.has("llama.expert_count"):
        fields.fail("llama.expert_count", "is set; GGUF files with experts are not supported")
    fields.require("llama.rope.scaling.type", "none", default="none")
    heads = fields.count("llama.attention.head_count")
    hidden = fields.count("llama.embedding_length")
    attention = GqaConfig(
        num_heads=heads,
        num_kv_heads=fields.count("llama.attention.head_count_kv", heads),
        head_width=fields.count("llama.attention.key_length", hidden // heads),
    )
    _check_heads(fields, "llama.attention.head_count_kv", attention)
    fields.require("llama.rope.dimension_count", attention.head_width, default=attention.head_width)
    layers = fields.count("llama.block_count")
    stops = {
        token
        for name in ("eos", "eot", "eom")
        for token in fields.token_ids(f"tokenizer.ggml.{name}_token_id")
    }
    return ModelConfig(
        architecture="llama",
        vocab_size=fields.count("llama.vocab_size"),
        hidden_width=hidden,
        num_layers=layers,
        intermediate_width=fields.count("llama.feed_forward_length"),
        norm_epsilon=fields.positive("llama.attention.layer_norm_rms_epsilon"),
        max_model_len=fields.count("llama.context_length"),
        tied_embeddings=True,  # corrected by the loader, which knows whether there is an output
        attention=attention,
        rope=RopeConfig(theta=fields.positive("llama.rope.freq_base", DEFAULT_THETA)),
        experts=None,
        sparse_layers=(False,) * layers,
        bos_token_id=fields.token_id("tokenizer.ggml.bos_token_id"),
        stop_token_ids=tuple(sorted(stops)),
    )


def read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def _llama(fields: Fields) -> ModelConfig:
    layers = fields.count("num_hidden_layers")
    _refuse_window(fields)
    return _config(fields, "llama", _gqa(fields), None, (False,) * layers)


def _mixtral(fields: Fields) -> ModelConfig:
    layers = fields.count("num_hidden_layers")
    _refuse_window(fields)
    experts = ExpertsConfig(
        num_experts=fields.count("num_local_experts"),
        experts_per_token=fields.count("num_experts_per_tok"),
        intermediate_width=fields.count("intermediate_size"),
        scoring="softmax",
        renormalised=True,
    )
    return _config(fields, "mixtral", _gqa(fields), experts, (True,) * layers)


def _qwen3_moe(fields: Fields) -> ModelConfig:
    if fields.flag("use_sliding_window", default=False):
        _refuse_window(fields)
    step = fields.count("decoder_sparse_step", 1)
    dense = fields.counts("mlp_only_layers")
    sparse = tuple(
        layer not in dense and (layer + 1) % step == 0
        for layer in range(fields.count("num_hidden_layers"))
    )
    experts = ExpertsConfig(
        num_experts=fields.count(fields.first_of("num_experts", "num_local_experts")),
        experts_per_token=fields.count("num_experts_per_tok"),
        intermediate_width=fields.count("moe_intermediate_size"),
        scoring="softmax",
        renormalised=fields.flag("norm_topk_prob", default=False),
    )
    return _config(fields, "qwen3_moe", replace(_gqa(fields), qk_norm=True), experts, sparse)


def _deepseek_v3(fields: Fields) -> ModelConfig:
    fields.require("moe_layer_freq", 1, default=1)
    fields.require("scoring_func", "sigmoid", default="sigmoid")
    fields.require("topk_method", "noaux_tc", default="noaux_tc")
    layers = fields.count("num_hidden_layers")
    first_sparse = fields.number("first_k_dense_replace", 0)
    width = fields.count("moe_intermediate_size")
    attention = MlaConfig(
        num_heads=fields.count("num_attention_heads"),
        query_rank=fields.count("q_lora_rank") if fields.has("q_lora_rank") else None,
        latent_width=fields.count("kv_lora_rank"),
        nope_width=fields.count("qk_nope_head_dim"),
        rope_width=fields.count("qk_rope_head_dim"),
        value_width=fields.count("v_head_dim"),
        interleaved_rope=fields.flag("rope_interleave", default=True),
    )
    experts = ExpertsConfig(
        num_experts=fields.count(fields.first_of("n_routed_experts", "num_local_experts")),
        experts_per_token=fields.count("num_experts_per_tok"),
        intermediate_width=width,
        scoring="sigmoid",
        renormalised=fields.flag("norm_topk_prob", default=True),
        scaling=fields.positive("routed_scaling_factor", 1.0),
        num_groups=fields.count("n_group", 1),
        kept_groups=fields.count("topk_group", 1),
        shared_width=width * int(fields.number("n_shared_experts", 0)),
    )
    if experts.num_experts % experts.num_groups:
        fields.fail("n_group", f"must divide the number of experts, {experts.num_experts}")
    if experts.kept_groups > experts.num_groups:
        fields.fail("topk_group", f"must not be above n_group, {experts.num_groups}")
    if experts.num_groups > 1 and experts.num_experts // experts.num_groups < 2:  # noqa: PLR2004
        fields.fail("n_group", "must leave at least two experts in a group")
    reach = experts.kept_groups * (experts.num_experts // experts.num_groups)
    if experts.experts_per_token > reach:
        fields.fail("num_experts_per_tok", f"must not be above the {reach} experts in topk_group")
    sparse = tuple(layer >= first_sparse for layer in range(layers))
    return _config(fields, "deepseek_v3", attention, experts, sparse)


def _config(
    fields: Fields,
    architecture: Architecture,
    attention: GqaConfig | MlaConfig,
    experts: ExpertsConfig | None,
    sparse_layers: tuple[bool, ...],
) -> ModelConfig:
    if experts and experts.experts_per_token > experts.num_experts:
        fields.fail("num_experts_per_tok", f"must not be above {experts.num_experts} experts")
    rope = _rope(fields)
    longest = fields.count("max_position_embeddings")
    if isinstance(rope.scaling, YarnScaling):
        longest = max(longest, round(rope.scaling.factor * rope.scaling.original_length))
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.count("vocab_size"),
        hidden_width=fields.count("hidden_size"),
        num_layers=len(sparse_layers),
        intermediate_width=fields.count("intermediate_size"),
        norm_epsilon=fields.positive("rms_norm_eps"),
        max_model_len=longest,
        tied_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention=attention,
        rope=rope,
        experts=experts if any(sparse_layers) else None,
        sparse_layers=sparse_layers,
        bos_token_id=fields.token_id("bos_token_id"),
        stop_token_ids=tuple(sorted(set(fields.token_ids("eos_token_id")))),
    )


def _gqa(fields: Fields) -> GqaConfig:
    heads = fields.count("num_attention_heads")
    hidden = fields.count("hidden_size")
    if not fields.has("head_dim") and hidden % heads:
        fields.fail("num_attention_heads", f"must divide hidden_size {hidden}, or give head_dim")
    attention = GqaConfig(
        num_heads=heads,
        num_kv_heads=fields.count("num_key_value_heads", heads),
        head_width=fields.count("head_dim", hidden // heads),
    )
    _check_heads(fields, "num_key_value_heads", attention)
    return attention


def _check_heads(fields: Fields, key: str, attention: GqaConfig) -> None:
    if attention.num_heads % attention.num_kv_heads:
        fields.fail(key, f"must divide the number of query heads, {attention.num_heads}")
    if attention.head_width % 2:
        fields.fail(
            key, f"gives heads of {attention.head_width} elements; rope needs an even width"
        )


def _rope(fields: Fields) -> RopeConfig:
    newer = fields.inside("rope_parameters")
    rope = newer or fields.inside("rope_scaling") or Fields(fields.source, {})
    theta_source = newer if newer and newer.has("rope_theta") else fields
    theta = theta_source.positive("rope_theta", DEFAULT_THETA)
    rope.require("partial_rotary_factor", 1.0, default=1.0)
    fields.require("partial_rotary_factor", 1.0, default=1.0)
    return RopeConfig(theta=theta, scaling=_scaling(fields, rope))


def _scaling(fields: Fields, rope: Fields) -> RopeScaling | None:
    key = rope.first_of("rope_type", "type")
    kind = rope.text(key, "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        rope.fail(key, f"is {kind!r}; supported are default, linear, llama3 and yarn")
    length = "original_max_position_embeddings"
    if kind == "linear":
        return LinearScaling(factor=rope.positive("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=rope.positive("factor"),
            low_frequency_factor=rope.positive("low_freq_factor"),
            high_frequency_factor=rope.positive("high_freq_factor"),
            original_length=rope.count(length),
        )
    original = rope.count(length, fields.count("max_position_embeddings"))
    return YarnScaling(
        factor=rope.positive("factor", fields.count("max_position_embeddings") / original),
        original_length=original,
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        mscale=rope.number("mscale", 0.0),
        mscale_all_dims=rope.number("mscale_all_dim", 0.0),
        attention_factor=(
            rope.positive("attention_factor") if rope.has("attention_factor") else None
        ),
        truncated=rope.flag("truncate", default=True),
    )


def _refuse_window(fields: Fields) -> None:
    """A window at least as long as the context never hides anything, so it is fine."""
    if fields.has("sliding_window") and fields.count("sliding_window") < fields.count(
        "max_position_embeddings"
    ):
        fields.fail("sliding_window", "is shorter than the context; windows are not supported")


_FAMILIES: dict[str, Callable[[Fields], ModelConfig]] = {
    "llama": _llama,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
}
