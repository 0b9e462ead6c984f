"""Parameters of one batch's rows as tensors, made once for each change of the batch's members.

Only what some row uses exists: a batch of greedy requests has no tensors here at all. A plan
counts the steps it has served instead of touching its requests at each of them; ``settle`` brings
them up to date when the plan ends.

Shape suffixes: R rows of the batch   S rows that are drawn at random   T those with top-k or top-p
    L rows that report logprobs   P rows with penalties   E single entries of (R, V) or (L, V)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sampling.draw import Truncation
from engine.sampling.grammar import ConstrainedRows, ConstrainedText
from engine.sampling.logprobs import NamedTokens
from engine.sampling.penalties import PenaltyRows
from engine.sampling.philox import uniform
from engine.sampling.reasoning import LimitedReasoning, ReasoningRows
from protocol.ids import AttemptRef
from protocol.requests import GenerateRequest, SamplingParams

DRAWS_AHEAD = 16  # uniform numbers per row and call of Philox: its cost is in launches


@dataclass(slots=True, kw_only=True)
class SampledRequest:
    """An admitted request; the counts are right whenever no plan that has it is in use."""

    request: GenerateRequest
    num_outputs: int
    history_slot: int | None  # None: no penalties
    history_length: int
    constrained: ConstrainedText | None = None
    reasoning: LimitedReasoning | None = None


class Uniforms:
    """The uniform number of each random row at each step, computed ``DRAWS_AHEAD`` at a time."""

    def __init__(self, requests: Sequence[SampledRequest], device: torch.device) -> None:
        self._seed_S1 = _column([_as_int64(one.request.sampling.seed) for one in requests], device)
        self._choice_S1 = _column([one.request.sampling.choice for one in requests], device)
        self._index_S1 = _column([one.num_outputs for one in requests], device)
        self._ahead = torch.arange(DRAWS_AHEAD, device=device)
        self._window: list[Tensor] = []

    def at(self, step: int) -> Tensor:
        """(S,) float64; steps are asked for in order, from 0."""
        offset = step % DRAWS_AHEAD
        if offset == 0:
            index_SD = self._index_S1 + step + self._ahead
            numbers_SD = uniform(self._seed_S1, self._choice_S1, index_SD)
            self._window = list(numbers_SD.T.contiguous())
        return self._window[offset]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomRows:
    """Rows with a temperature above 0. ``truncation`` counts rows within these."""

    rows_S: Tensor
    every_row: bool  # R == S
    temperature_S1: Tensor
    min_p_S1: Tensor | None
    uniforms: Uniforms
    truncation: Truncation | None
    all_truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasEntries:
    rows_E: Tensor
    ids_E: Tensor
    bias_E: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedEntries:
    """Stop tokens that are masked for the plan's first ``steps_E`` steps."""

    rows_E: Tensor
    ids_E: Tensor
    steps_E: Tensor
    max_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobRows:
    rows: list[int]
    rows_L: Tensor
    counts: list[int]
    named: NamedTokens | None


@dataclass(slots=True, kw_only=True)
class SamplingPlan:
    refs: list[AttemptRef]
    requests: list[SampledRequest]
    random: RandomRows | None
    penalties: PenaltyRows | None
    bias: BiasEntries | None
    masked: MaskedEntries | None
    logprobs: LogprobRows | None
    constrained: ConstrainedRows | None
    reasoning: ReasoningRows | None
    steps: int = 0

    def settle(self) -> None:
        """Count the steps served in the requests; the plan must not be used afterwards."""
        for one in self.requests:
            one.num_outputs += self.steps
            one.history_length += self.steps


def make_plan(
    refs: list[AttemptRef],
    requests: list[SampledRequest],
    *,
    vocab_size: int,
    device: torch.device,
) -> SamplingPlan:
    """Costs a loop over the rows; call it when members change, not at every step."""
    return SamplingPlan(
        refs=refs,
        requests=requests,
        random=_random_rows(requests, vocab_size, device),
        penalties=_penalty_rows(requests, device),
        bias=_bias_entries(requests, device),
        masked=_masked_entries(requests, vocab_size, device),
        logprobs=_logprob_rows(requests, device),
        constrained=_constrained_rows(requests, device),
        reasoning=_reasoning_rows(requests),
    )


def _random_rows(
    requests: Sequence[SampledRequest], vocab_size: int, device: torch.device
) -> RandomRows | None:
    rows = _rows_where(requests, lambda one: one.request.sampling.temperature > 0)
    if not rows:
        return None
    random = [requests[row] for row in rows]
    params = [one.request.sampling for one in random]
    min_p = [one.min_p for one in params]
    truncated = _rows_where(random, lambda one: _truncates(one, vocab_size))
    return RandomRows(
        rows_S=torch.tensor(rows, device=device),
        every_row=len(rows) == len(requests),
        temperature_S1=_column([one.temperature for one in params], device),
        min_p_S1=_column(min_p, device) if any(min_p) else None,
        uniforms=Uniforms(random, device),
        truncation=_truncation(random, truncated, vocab_size, device) if truncated else None,
        all_truncated=len(truncated) == len(rows),
    )


def _truncates(one: SampledRequest, vocab_size: int) -> bool:
    return 0 < one.request.sampling.top_k < vocab_size or one.request.sampling.top_p < 1


def _truncation(
    random: Sequence[SampledRequest], rows: list[int], vocab_size: int, device: torch.device
) -> Truncation:
    params = [random[row].request.sampling for row in rows]
    top_k = [one.top_k if 0 < one.top_k < vocab_size else vocab_size for one in params]
    top_p = [one.top_p if one.top_p < 1 else float("inf") for one in params]
    limited = [k for k in top_k if k < vocab_size]
    return Truncation(
        rows_S=torch.tensor(rows, device=device),
        top_k_S1=_column(top_k, device),
        top_p_S1=_column(top_p, device, dtype=torch.float64),
        max_top_k=max(limited, default=0),
        only_top_p=len(limited) < len(rows),
    )


def _penalty_rows(requests: Sequence[SampledRequest], device: torch.device) -> PenaltyRows | None:
    rows = _rows_where(requests, lambda one: one.history_slot is not None)
    if not rows:
        return None
    penalised = [requests[row] for row in rows]
    params = [one.request.sampling for one in penalised]
    lengths = [one.history_length for one in penalised]
    return PenaltyRows(
        rows_P=torch.tensor(rows, device=device),
        slots_P=torch.tensor([one.history_slot for one in penalised], device=device),
        repetition_P1=_column([one.repetition_penalty for one in params], device),
        presence_P1=_column([one.presence_penalty for one in params], device),
        frequency_P1=_column([one.frequency_penalty for one in params], device),
        lengths_P=torch.tensor(lengths, device=device),
        max_length=max(lengths),
    )


def _bias_entries(requests: Sequence[SampledRequest], device: torch.device) -> BiasEntries | None:
    entries = [
        (row, token_id, bias)
        for row, one in enumerate(requests)
        for token_id, bias in one.request.sampling.logit_bias.items()
    ]
    if not entries:
        return None
    rows, ids, bias = zip(*entries, strict=True)
    return BiasEntries(
        rows_E=torch.tensor(rows, device=device),
        ids_E=torch.tensor(ids, device=device),
        bias_E=torch.tensor(bias, dtype=torch.float32, device=device),
    )


def _masked_entries(
    requests: Sequence[SampledRequest], vocab_size: int, device: torch.device
) -> MaskedEntries | None:
    entries = [
        (row, token_id, one.request.stop.min_tokens - one.num_outputs)
        for row, one in enumerate(requests)
        if one.num_outputs < one.request.stop.min_tokens
        for token_id in one.request.stop.stop_token_ids
        if token_id < vocab_size
    ]
    if not entries:
        return None
    rows, ids, steps = zip(*entries, strict=True)
    return MaskedEntries(
        rows_E=torch.tensor(rows, device=device),
        ids_E=torch.tensor(ids, device=device),
        steps_E=torch.tensor(steps, device=device),
        max_steps=max(steps),
    )


def _logprob_rows(requests: Sequence[SampledRequest], device: torch.device) -> LogprobRows | None:
    rows = _rows_where(requests, lambda one: one.request.sampling.logprobs is not None)
    if not rows:
        return None
    asked = [requests[row].request.sampling for row in rows]
    return LogprobRows(
        rows=rows,
        rows_L=torch.tensor(rows, device=device),
        counts=[0 if one.logprob_token_ids else one.logprobs or 0 for one in asked],
        named=_named_tokens(asked, device),
    )


def _named_tokens(asked: Sequence[SamplingParams], device: torch.device) -> NamedTokens | None:
    entries = [
        (row, token_id) for row, one in enumerate(asked) for token_id in one.logprob_token_ids
    ]
    if not entries:
        return None
    rows, ids = map(list, zip(*entries, strict=True))
    return NamedTokens(
        rows=rows,
        ids=ids,
        rows_E=torch.tensor(rows, device=device),
        ids_E=torch.tensor(ids, device=device),
    )


def _constrained_rows(
    requests: Sequence[SampledRequest], device: torch.device
) -> ConstrainedRows | None:
    rows = _rows_where(requests, lambda one: one.constrained is not None)
    if not rows:
        return None
    texts = [text for row in rows if (text := requests[row].constrained) is not None]
    return ConstrainedRows(rows=rows, rows_G=torch.tensor(rows, device=device), texts=texts)


def _reasoning_rows(requests: Sequence[SampledRequest]) -> ReasoningRows | None:
    rows = _rows_where(requests, lambda one: one.reasoning is not None)
    if not rows:
        return None
    found = [reasoning for row in rows if (reasoning := requests[row].reasoning) is not None]
    return ReasoningRows(rows=rows, reasonings=found)


def _rows_where(
    requests: Sequence[SampledRequest], wanted: Callable[[SampledRequest], bool]
) -> list[int]:
    return [row for row, one in enumerate(requests) if wanted(one)]


def _column(
    values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


def _as_int64(seed: int) -> int:
    """The 64 low bits of any integer."""
    return (seed + 2**63) % 2**64 - 2**63
