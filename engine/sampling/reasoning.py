"""Rows of a batch whose reasoning is limited: when it has been long enough, its end is forced.

How far a request's reasoning has come follows from its output tokens alone, so it is counted again
from them wherever the request continues. Texts and markers are not known here, only token ids.

Shape suffixes: R rows of the batch   V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from protocol.requests import ReasoningLimit


@dataclass(slots=True, kw_only=True)
class LimitedReasoning:
    """One request's reasoning: ``left`` tokens until its end is due, None while there is none."""

    limit: ReasoningLimit
    left: int | None
    num_outputs: int = 0

    def accept(self, token_id: int) -> None:
        if self.left is None:
            if self.num_outputs == 0 and token_id == self.limit.open:
                self.left = self.limit.max_tokens
        else:
            self.left = None if token_id == self.limit.close else max(0, self.left - 1)
        self.num_outputs += 1


def limited_reasoning(
    limit: ReasoningLimit | None, output_ids: Sequence[int]
) -> LimitedReasoning | None:
    """After ``output_ids``; None when there is no limit."""
    if limit is None:
        return None
    reasoning = LimitedReasoning(limit=limit, left=limit.max_tokens if limit.begun else None)
    for token_id in output_ids:
        reasoning.accept(token_id)
    return reasoning


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningRows:
    rows: list[int]
    reasonings: list[LimitedReasoning]

    def end_(self, logits_RV: Tensor) -> None:
        """Leave rows whose reasoning is due to end no other token, in place."""
        for row, reasoning in zip(self.rows, self.reasonings, strict=True):
            if reasoning.left == 0:
                logits_RV[row] = float("-inf")
                logits_RV[row, reasoning.limit.close] = 0.0

    def accept(self, token_ids: Sequence[int]) -> None:
        """The tokens that were sampled, row by row; negative ones are no tokens."""
        for row, reasoning in zip(self.rows, self.reasonings, strict=True):
            if token_ids[row] >= 0:
                reasoning.accept(token_ids[row])
