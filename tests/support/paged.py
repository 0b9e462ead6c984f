"""Sequences in a shuffled paged cache, and dense attention in float64 to compare with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from protocol.kv import KVLayout


def gqa_layout(dtype: str = "float32", **changes: int) -> KVLayout:
    fields = {"num_layers": 2, "block_tokens": 16, "kv_heads": 3, "key_width": 64, **changes}
    fields.setdefault("value_width", fields["key_width"])
    return KVLayout(kind="gqa", dtype=dtype, **fields)


def mla_layout(dtype: str = "float32", **changes: int) -> KVLayout:
    fields = {"num_layers": 2, "block_tokens": 16, "kv_heads": 1, "key_width": 80}
    return KVLayout(kind="mla", dtype=dtype, value_width=0, **{**fields, **changes})


def block_tables(contexts: Sequence[int], block_tokens: int, num_blocks: int) -> Tensor:
    """Rows of distinct blocks in random order, padded with 0; block 0 itself is never owned."""
    counts = [-(-context // block_tokens) for context in contexts]
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    table = torch.zeros(len(contexts), max(counts), dtype=torch.int64)
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([free.pop() for _ in range(count)])
    return table


def a_batch(
    tables: Tensor, queries: Sequence[int], contexts: Sequence[int], block_tokens: int
) -> ForwardBatch:
    """The last ``queries[i]`` of the first ``contexts[i]`` tokens of each sequence."""
    positions = [
        torch.arange(context - length, context)
        for length, context in zip(queries, contexts, strict=True)
    ]
    slots = [
        tables[row, position // block_tokens] * block_tokens + position % block_tokens
        for row, position in enumerate(positions)
    ]
    num_tokens, empty = sum(queries), torch.zeros(0, dtype=torch.int64)
    return ForwardBatch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.cat([empty, *positions]),
        request_keys=torch.zeros(num_tokens, dtype=torch.int64),
        slot_mapping=torch.cat([empty, *slots]),
        block_tables=tables,
        query_lens=tuple(queries),
        context_lens=tuple(contexts),
        logits_rows=torch.arange(num_tokens),
    )


def dense_attention(q_LHD: Tensor, k_SHD: Tensor, v_SHV: Tensor, scale: float) -> Tensor:
    """In float64; the L queries are the last of S tokens."""
    length, context = q_LHD.shape[0], k_SHD.shape[0]
    scores = torch.einsum("lhd,shd->hls", q_LHD.double(), k_SHD.double()) * scale
    hidden = torch.ones(length, context, dtype=torch.bool).tril(context - length).logical_not()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hls,shv->lhv", weights, v_SHV.double())
