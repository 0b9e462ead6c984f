"""What one engine step computes: the tokens of all its sequences, packed end to end.

Shape suffixes: N tokens of this step   B sequences   M blocks in the longest block table   R rows
whose logits are wanted   V vocabulary
"""

from collections.abc import Sequence
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

    def halves(self) -> tuple["ForwardBatch", "ForwardBatch"]:
        """Two batches of a decode step, the first with at most one sequence more."""
        assert self.decode_only
        count = (self.num_tokens + 1) // 2
        wanted = count
        if self.logits_rows.shape[0] != self.num_tokens:
            wanted = int((self.logits_rows < count).sum())  # host sync
        return (
            self._part(slice(0, count), self.logits_rows[:wanted]),
            self._part(slice(count, self.num_tokens), self.logits_rows[wanted:] - count),
        )

    def _part(self, rows: slice, logits_rows: Tensor) -> "ForwardBatch":
        return ForwardBatch(
            token_ids=self.token_ids[rows],
            positions=self.positions[rows],
            request_keys=self.request_keys[rows],
            slot_mapping=self.slot_mapping[rows],
            block_tables=self.block_tables[rows],
            query_lens=self.query_lens[rows],
            context_lens=self.context_lens[rows],
            logits_rows=logits_rows,
        )

    @property
    def decode_only(self) -> bool:
        """Every sequence brings exactly one token; true for an idle batch."""
        return all(length == 1 for length in self.query_lens)


def tokens_of_halves(tokens_of_rank: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What each rank brings to the first and to the second batch when all halve theirs."""
    first = tuple((tokens + 1) // 2 for tokens in tokens_of_rank)
    return first, tuple(t - f for t, f in zip(tokens_of_rank, first, strict=True))
