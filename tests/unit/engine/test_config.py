import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import GqaConfig, LinearScaling, MlaConfig, YarnScaling, split_dense
from engine.config_files import config_from_folder, config_from_gguf
from protocol.errors import ConfigError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "rope_theta": 5000.0,
}
QWEN3_MOE: dict[str, Any] = LLAMA | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
DEEPSEEK: dict[str, Any] = LLAMA | {
    "model_type": "deepseek_v3",
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
GGUF: dict[str, object] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "llama.vocab_size": 300,
    "tokenizer.ggml.eos_token_id": 2,
}


def folder_with(path: Path, config: dict[str, Any], generation: Any = None) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_both_spellings_of_rope_give_the_same_config(tmp_path: Path) -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0}
    older = LLAMA | {"rope_scaling": {"type": "yarn", **yarn}}
    newer = LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, **yarn}}
    del newer["rope_theta"]
    config = config_from_folder(folder_with(tmp_path, older))
    assert config == config_from_folder(folder_with(tmp_path, newer))
    assert config.rope.theta == 5000.0
    assert config.rope.scaling == YarnScaling(factor=4.0, original_length=128, mscale=1.0)


def test_linear_scaling_is_read(tmp_path: Path) -> None:
    config = LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2}}
    assert config_from_folder(folder_with(tmp_path, config)).rope.scaling == LinearScaling(
        factor=2.0
    )


def test_yarn_that_reaches_further_than_the_stated_length_sets_the_length(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
    config = config_from_folder(folder_with(tmp_path, LLAMA | {"rope_scaling": yarn}))
    assert config.max_model_len == 4096


def test_stop_tokens_come_from_both_files(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, LLAMA, {"eos_token_id": [7, 2, 5]})
    assert config_from_folder(folder).stop_token_ids == (2, 5, 7)


def test_a_gguf_file_and_a_folder_describe_the_same_llama(tmp_path: Path) -> None:
    from_folder = config_from_folder(folder_with(tmp_path, LLAMA | {"tie_word_embeddings": True}))
    assert config_from_gguf(Path("x.gguf"), GGUF) == from_folder


def test_qwen3_moe_layers_are_sparse_by_step_unless_listed_as_dense(tmp_path: Path) -> None:
    config = QWEN3_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    read = config_from_folder(folder_with(tmp_path, config))
    assert read.sparse_layers == (False, True, False, False, False, True)
    assert isinstance(read.attention, GqaConfig)
    assert read.attention.qk_norm


def test_deepseek_reads_latent_attention_and_grouped_experts(tmp_path: Path) -> None:
    config = config_from_folder(folder_with(tmp_path, DEEPSEEK))
    assert isinstance(config.attention, MlaConfig)
    assert config.attention.query_rank is None
    assert config.sparse_layers == (False, True)
    assert config.experts is not None
    assert (config.experts.num_groups, config.experts.kept_groups) == (4, 2)
    assert config.experts.shared_width == 48
    layout = config.layout(dtype="bfloat16", block_tokens=16)
    assert (layout.kv_heads, layout.key_width, layout.value_width) == (1, 40, 0)


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (LLAMA, {"model_type": "gpt_oss"}, "model_type"),
        (LLAMA, {"hidden_size": None}, "'hidden_size' is missing"),
        (LLAMA, {"hidden_size": "64"}, "'hidden_size' must be a positive integer"),
        (LLAMA, {"vocab_size": 0}, "'vocab_size' must be a positive integer"),
        (LLAMA, {"rms_norm_eps": -1.0}, "'rms_norm_eps' must be a number above 0"),
        (LLAMA, {"num_attention_heads": 5}, "'num_attention_heads' must divide"),
        (LLAMA, {"num_key_value_heads": 3}, "'num_key_value_heads' must divide"),
        (LLAMA, {"eos_token_id": "x"}, "'eos_token_id' must be a token id"),
        (LLAMA, {"eos_token_id": 300}, "'eos_token_id' must be below vocab_size 300"),
        (LLAMA, {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        (LLAMA, {"attention_bias": True}, "'attention_bias'"),
        (LLAMA, {"quantization_config": {}}, "'quantization_config'"),
        (LLAMA, {"rope_scaling": {"type": "longrope"}}, "'type' is 'longrope'"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        (LLAMA, {"rope_scaling": 3}, "'rope_scaling' must be an object"),
        (LLAMA, {"tie_word_embeddings": 1}, "'tie_word_embeddings' must be true or false"),
        (LLAMA, {"sliding_window": 128}, "'sliding_window'"),
        (QWEN3_MOE, {"num_experts_per_tok": 9}, "'num_experts_per_tok'"),
        (QWEN3_MOE, {"mlp_only_layers": "1"}, "'mlp_only_layers' must be a list"),
        (DEEPSEEK, {"n_group": 3}, "'n_group' must divide"),
        (DEEPSEEK, {"n_group": 8}, "'n_group' must leave at least two"),
        (DEEPSEEK, {"topk_group": 5}, "'topk_group' must not be above"),
        (DEEPSEEK, {"num_experts_per_tok": 5}, "'num_experts_per_tok' must not be above"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "'scoring_func'"),
        (DEEPSEEK, {"kv_lora_rank": None}, "'kv_lora_rank' is missing"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    folder = folder_with(tmp_path, base | change)
    with pytest.raises(ConfigError, match=words) as caught:
        config_from_folder(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "gemma"}, "general.architecture"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type"),
        ({"llama.block_count": None}, "'llama.block_count' is missing"),
    ],
)
def test_a_wrong_gguf_key_is_named_with_its_file(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        config_from_gguf(Path("some/demo.gguf"), GGUF | change)
    assert "some/demo.gguf" in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        config_from_folder(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read: No such file"):
        config_from_folder(tmp_path)


def test_a_dense_model_is_split_into_experts_that_divide_its_width(tmp_path: Path) -> None:
    config = config_from_folder(folder_with(tmp_path, LLAMA))
    split = split_dense(config, 24)
    assert split.num_routed_experts == 24
    assert split.sparse_layers == (True, True)
    with pytest.raises(ConfigError, match="split_dense_experts=25 does not divide"):
        split_dense(config, 25)


def test_a_model_with_experts_is_not_split(tmp_path: Path) -> None:
    config = config_from_folder(folder_with(tmp_path, QWEN3_MOE))
    with pytest.raises(ConfigError, match="has experts of its own"):
        split_dense(config, 2)
