"""Grouped-query attention with rotary positions (Llama, Mixtral, Qwen3-MoE).

Query, key and value projections are one product, and queries and keys are rotated together.

Shape suffixes: N tokens   D hidden   H query heads   G KV heads   W head width   J H + G heads
S H + 2 G heads   O H * W
"""

from dataclasses import dataclass

from torch import Tensor

from engine.attention.gqa import gqa_attention
from engine.batch import ForwardBatch
from engine.config import GqaConfig
from engine.cpu import grouped_prefill
from engine.cpu.grouped_attention import HeadNorms, grouped_decode
from engine.cpu.paged_attention import serves
from engine.kvcache.storage import LayerCache
from engine.layers.linear import Linear
from engine.layers.norm import rms_norm
from engine.layers.rope import Rotation
from engine.models.parts import Setting
from engine.tensor_parallel import attention_of_rank, heads_here
from engine.weights.reader import Wanted, WeightReader, read_rows
from engine.weights.source import Part
from protocol.kv import heads_of_rank


class GroupedQueryAttention:
    def __init__(self, weights: "GroupedQueryWeights", config: GqaConfig, setting: Setting) -> None:
        self._heads, self._kv_heads = config.num_heads, config.num_kv_heads
        self._width = config.head_width
        self._scale = config.head_width**-0.5
        self._project = Linear(read_rows(weights.projections), numerics=setting.numerics)
        self._output = Linear(weights.output_DO.read(), numerics=setting.numerics)
        self._sum = setting.tensor.sum
        self._norms: HeadNorms | None = None
        if weights.query_norm_W and weights.key_norm_W:
            self._norms = HeadNorms(
                query_W=weights.query_norm_W.read(),
                key_W=weights.key_norm_W.read(),
                epsilon=setting.config.norm_epsilon,
            )

    def __call__(
        self, x_ND: Tensor, rotation: Rotation, cache: LayerCache, batch: ForwardBatch
    ) -> Tensor:
        heads, rotated = self._heads, self._heads + self._kv_heads
        qkv_NSW = self._project(x_ND).view(-1, rotated + self._kv_heads, self._width)
        if batch.num_tokens and batch.decode_only and serves(cache):
            out_NHW = grouped_decode(
                qkv_NSW, rotation, cache, batch, scale=self._scale, norms=self._norms
            )
            return self._sum(self._output(out_NHW.flatten(1)))
        if batch.num_tokens and not batch.decode_only and grouped_prefill.serves(cache):
            out_NHW = grouped_prefill.grouped_prefill(
                qkv_NSW, rotation, cache, batch, scale=self._scale, norms=self._norms
            )
            return self._sum(self._output(out_NHW.flatten(1)))
        if self._norms is None:
            qk_NJW = rotation.apply(qkv_NSW[:, :rotated])
            q_NHW, k_NGW = qk_NJW[:, :heads], qk_NJW[:, heads:]
        else:
            q_NHW = rms_norm(qkv_NSW[:, :heads], self._norms.query_W, self._norms.epsilon)
            k_NGW = rms_norm(qkv_NSW[:, heads:rotated], self._norms.key_W, self._norms.epsilon)
            q_NHW, k_NGW = rotation.apply(q_NHW), rotation.apply(k_NGW)
        out_NHW = gqa_attention(
            q_NHW,
            k_NGW,
            qkv_NSW[:, rotated:],
            cache=cache,
            batch=batch,
            scale=self._scale,
        )
        return self._sum(self._output(out_NHW.flatten(1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQueryWeights:
    projections: tuple[Wanted, ...]  # of queries, keys and values
    output_DO: Wanted
    query_norm_W: Wanted | None
    key_norm_W: Wanted | None

    def build(self, setting: Setting) -> GroupedQueryAttention:
        config = attention_of_rank(setting.config.attention, setting.tensor)
        assert isinstance(config, GqaConfig)
        return GroupedQueryAttention(self, config, setting)


def describe_grouped_query(
    weights: WeightReader, setting: Setting, prefix: str
) -> GroupedQueryWeights:
    """The tensors under ``prefix``, such as ``model.layers.0.self_attn``: this rank's heads."""
    config, hidden = setting.config.attention, setting.config.hidden_width
    assert isinstance(config, GqaConfig)
    width = config.head_width
    queries, keys = config.num_heads * width, config.num_kv_heads * width
    tensor = setting.tensor
    mine = _rows_of(heads_here(config.num_heads, tensor), width)
    kept = Part(rows=_rows_of(heads_of_rank(tensor.rank, tensor.size, config.num_kv_heads), width))
    return GroupedQueryWeights(
        projections=(
            weights.want(f"{prefix}.q_proj.weight", queries, hidden, part=Part(rows=mine)),
            weights.want(f"{prefix}.k_proj.weight", keys, hidden, part=kept),
            weights.want(f"{prefix}.v_proj.weight", keys, hidden, part=kept),
        ),
        output_DO=weights.want(f"{prefix}.o_proj.weight", hidden, queries, part=Part(columns=mine)),
        query_norm_W=weights.want(f"{prefix}.q_norm.weight", width) if config.qk_norm else None,
        key_norm_W=weights.want(f"{prefix}.k_norm.weight", width) if config.qk_norm else None,
    )


def _rows_of(heads: range, width: int) -> slice:
    return slice(heads.start * width, heads.stop * width)
