"""The engine and its reference, transformers, behind one small interface for a benchmark.

Both hold the same weights in the same dtype in this process, and both are asked for the next
greedy tokens only, so that nothing but the model's computation is compared.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GgufConfig,
)

from engine.collectives import ExpertGroup
from engine.kvcache.storage import KVStorage
from engine.layers.linear import Numerics
from engine.loading import DtypeChoice, load
from engine.model_runner import ModelRunner, SequenceStep, batch_from

CPU = torch.device("cpu")
BLOCK_TOKENS = 16
CACHE_FOLDER = Path.home() / ".cache" / "headrace" / "benchmarks"


class Subject(Protocol):
    """What is measured. Prompts are equally long."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Compute the prompts as a new batch; the first token of each."""
        ...

    def decode(self, steps: int) -> list[list[int]]:
        """That many further tokens of every sequence of the batch, step by step."""
        ...


class Engine:
    """One rank of this project's engine, without roles, processes or messages."""

    def __init__(
        self, path: Path, dtype: DtypeChoice, numerics: Numerics, *, max_tokens: int
    ) -> None:
        """``max_tokens``: of a whole batch, prompts and outputs together."""
        loaded = load(
            path, device=CPU, dtype=dtype, numerics=numerics, group=ExpertGroup.single(CPU)
        )
        num_blocks = -(-max_tokens // BLOCK_TOKENS)
        storage = KVStorage(loaded.layout, num_blocks, device=CPU)
        self.bytes_per_token = loaded.layout.block_bytes // BLOCK_TOKENS
        self._runner = ModelRunner(loaded.model, storage)
        self._tables: list[list[int]] = []
        self._lengths: list[int] = []
        self._last: list[int] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        room = self._runner.storage.num_blocks // len(prompts)
        self._tables = [
            list(range(row, room * len(prompts), len(prompts))) for row in range(len(prompts))
        ]
        self._lengths = [0] * len(prompts)
        return self._step(prompts)

    def decode(self, steps: int) -> list[list[int]]:
        return [self._step([[token] for token in self._last]) for _ in range(steps)]

    def argmax_everywhere(self, tokens: Sequence[int]) -> Tensor:
        """The most likely next token after each of ``tokens``, fed one by one."""
        found = []
        self.prefill([tokens[:1]])
        for token in tokens[1:]:
            found.append(self._last[0])
            self._step([[token]])
        return torch.tensor([*found, self._last[0]])

    def _step(self, new_tokens: Sequence[Sequence[int]]) -> list[int]:
        rows = zip(new_tokens, self._lengths, self._tables, strict=True)
        sequences = [
            SequenceStep(
                token_ids=tokens,
                start=start,
                block_table=table[: -(-(start + len(tokens)) // BLOCK_TOKENS)],
            )
            for tokens, start, table in rows
        ]
        batch = batch_from(sequences, block_tokens=BLOCK_TOKENS, device=CPU)
        logits = self._runner.run(batch)
        self._lengths = [
            start + len(tokens) for start, tokens in zip(self._lengths, new_tokens, strict=True)
        ]
        self._last = logits.argmax(-1).tolist()
        return self._last


class Reference:
    """transformers with its defaults for this machine (SDPA attention, grouped experts)."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        load_model: Any = AutoModelForCausalLM.from_pretrained
        if path.suffix == ".gguf":
            dense = GgufConfig(dequantize=True)
            model = load_model(
                path.parent, gguf_file=path.name, quantization_config=dense, dtype=dtype
            )
        else:
            model = load_model(path, dtype=dtype)
        self._model = model.eval()
        self._cache: Any = None
        self._last = torch.empty(0, dtype=torch.int64)

    @property
    def config(self) -> Any:
        return self._model.config

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self._model.named_parameters()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        self._cache = DynamicCache(config=self._model.config)
        return self._step(torch.tensor(prompts))

    @torch.inference_mode()
    def decode(self, steps: int) -> list[list[int]]:
        return [self._step(self._last[:, None]) for _ in range(steps)]

    @torch.inference_mode()
    def argmax_everywhere(self, tokens: Sequence[int]) -> Tensor:
        logits: Tensor = self._model(torch.tensor([tokens])).logits[0]
        return logits.argmax(-1)

    def _step(self, tokens: Tensor) -> list[int]:
        out = self._model(tokens, past_key_values=self._cache, logits_to_keep=1, use_cache=True)
        self._last = out.logits[:, -1].argmax(-1)
        return self._last.tolist()


def deepseek_checkpoint() -> Path:
    """A random checkpoint in DeepSeek-V3's shape, 254 M parameters; written on first use."""
    folder = CACHE_FOLDER / "deepseek-v3-254m"
    if not (folder / "model.safetensors").exists():
        config = DeepseekV3Config(
            vocab_size=49152,
            hidden_size=512,
            intermediate_size=2048,
            moe_intermediate_size=256,
            num_hidden_layers=8,
            first_k_dense_replace=1,
            num_attention_heads=8,
            num_key_value_heads=8,
            n_routed_experts=64,
            n_shared_experts=1,
            num_experts_per_tok=8,
            n_group=8,
            topk_group=4,
            q_lora_rank=384,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            max_position_embeddings=8192,
        )
        torch.manual_seed(20251122)
        model: Any = DeepseekV3ForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder
