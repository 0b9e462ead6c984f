"""What one engine step computes: the tokens of all its sequences, packed end to end.

Shape suffixes: N tokens of this step   B sequences   M blocks in the longest block table   R rows
whose logits are wanted   V vocabulary
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One step of one rank. An idle rank's batch has N = B = 0 and still passes every MoE layer.

    Sequence ``i`` brings ``query_lens[i]`` new tokens, the last of its ``context_lens[i]``; the
    earlier ones are in the cache already. All tensors are on the rank's device.
    """

    token_ids: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64
    request_keys: Tensor  # (N,) int64: ``engine.experts.replicas.request_key`` of each token's
    slot_mapping: Tensor  # (N,) int64: block_id * block_tokens + offset of each new token
    block_tables: Tensor  # (B, M) int64, rows padded with 0
    query_lens: tuple[int, ...]  # (B,), on the host
    context_lens: tuple[int, ...]  # (B,), on the host, new tokens included
    logits_rows: Tensor  # (R,) int64: which of the N rows need logits, ascending

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def decode_only(self) -> bool:
        """Every sequence brings exactly one token; true for an idle batch."""
        return all(length == 1 for length in self.query_lens)
