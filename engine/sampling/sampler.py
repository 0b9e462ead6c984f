"""The next token of every row of a batch, in one pass over its logits.

A request's tokens depend on its logits, its parameters and (seed, choice, token index), never on
its batch-mates or on which steps it sat out. Blocks, models and stop strings are not known here.

Order of work: repetition, frequency and presence penalties; logit bias; stop tokens masked while
``min_tokens`` are not reached; the end of reasoning forced where it is due; what a grammar does
not allow masked; log-probabilities; then greedy choice, or temperature and the filters of
``engine.sampling.draw``.

Shape suffixes: R rows   V vocabulary   S rows drawn at random
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.sampling.draw import draw, draw_truncated, weights
from engine.sampling.grammar import constrained_text
from engine.sampling.logprobs import token_logprobs
from engine.sampling.ordering import argmax
from engine.sampling.penalties import TokenHistory
from engine.sampling.plan import RandomRows, SampledRequest, SamplingPlan, make_plan
from engine.sampling.reasoning import limited_reasoning
from protocol.errors import EngineError, InvalidRequest
from protocol.ids import AttemptRef
from protocol.requests import GenerateRequest, SamplingParams, TokenLogprobs
from runtime.grammars import Grammars

FAILED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Row by row; a request in ``errors`` has the token id ``FAILED`` and no logprobs."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: dict[AttemptRef, EngineError] = field(default_factory=dict)


class Sampler:
    """Samples for all requests between their ``admit`` and their ``retire``."""

    def __init__(
        self, vocab_size: int, device: torch.device | str, grammars: Grammars | None = None
    ) -> None:
        """Without ``grammars`` no request with a grammar is admitted."""
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._requests: dict[AttemptRef, SampledRequest] = {}
        self._history: TokenHistory | None = None
        self._plan: SamplingPlan | None = None

    @torch.inference_mode()
    def admit(self, request: GenerateRequest, output_ids: Sequence[int] = ()) -> None:
        """Be ready for a request whose output so far is ``output_ids``.

        Raises:
            InvalidRequest: a field names a token that the model does not have, or the grammar
                cannot be used; the request is not admitted.
        """
        ref, sampling = request.ref, request.sampling
        assert ref not in self._requests, f"{ref} was admitted twice"
        self._check_token_ids(sampling)
        constrained = constrained_text(request, output_ids, self._grammars, self._vocab_size)
        slot, length = None, 0
        if _penalised(sampling):
            if self._history is None:
                self._history = TokenHistory(self._vocab_size, self._device)
            slot, length = self._history.admit(request.prompt_token_ids, output_ids)
        self._requests[ref] = SampledRequest(
            request=request,
            num_outputs=len(output_ids),
            history_slot=slot,
            history_length=length,
            constrained=constrained,
            reasoning=limited_reasoning(sampling.reasoning_limit, output_ids),
        )

    def retire(self, ref: AttemptRef) -> None:
        """Forget a request; unknown ones are ignored."""
        one = self._requests.pop(ref, None)
        if one is None:
            return
        if self._plan is not None and ref in self._plan.refs:
            self._end_plan()  # its history slot may have a new owner by the next step
        if one.history_slot is not None and self._history is not None:
            self._history.retire(one.history_slot)

    @torch.inference_mode()
    def sample(self, logits_RV: Tensor, refs: Sequence[AttemptRef]) -> Sampled:
        """One token for each of ``refs``, all admitted, which counts as their next output.

        ``logits_RV`` may be overwritten. A row whose logits have a NaN, +inf or nothing finite
        ends in ``errors`` and leaves the others as they are.
        """
        assert logits_RV.shape == (len(refs), self._vocab_size), tuple(logits_RV.shape)
        if not refs:
            return Sampled(token_ids=[], logprobs=[])
        plan = self._plan_for(list(refs))
        x_RV = logits_RV.float()
        self._adjust_(x_RV, plan)
        best_logit_R, best_R = argmax(x_RV)
        ids_R = best_R
        if plan.random is not None:
            ids_R = self._draw(x_RV, best_logit_R, best_R, plan.random, plan.steps)
        ids_R = torch.where(best_logit_R.isfinite(), ids_R, FAILED)
        if plan.penalties is not None and self._history is not None:
            self._history.record(plan.penalties, ids_R, plan.steps)
        token_ids: list[int] = ids_R.tolist()  # host sync
        plan.steps += 1
        if plan.constrained is not None:
            plan.constrained.accept(token_ids)
        if plan.reasoning is not None:
            plan.reasoning.accept(token_ids)
        return Sampled(
            token_ids=token_ids,
            logprobs=self._logprobs(x_RV, ids_R, token_ids, plan),
            errors=_errors(plan, token_ids) if FAILED in token_ids else {},
        )

    def _check_token_ids(self, sampling: SamplingParams) -> None:
        limit = sampling.reasoning_limit
        named = {
            "logit_bias": sampling.logit_bias,
            "logprob_token_ids": sampling.logprob_token_ids,
            "thinking_token_budget": () if limit is None else (limit.close,),
        }
        for param, token_ids in named.items():
            for token_id in token_ids:
                if not 0 <= token_id < self._vocab_size:
                    raise InvalidRequest(
                        f"token id {token_id} is outside the vocabulary of {self._vocab_size}",
                        param=param,
                    )

    def _plan_for(self, refs: list[AttemptRef]) -> SamplingPlan:
        plan = self._plan
        if plan is None or plan.refs != refs:
            self._end_plan()
            requests = [self._requests[ref] for ref in refs]
            plan = make_plan(refs, requests, vocab_size=self._vocab_size, device=self._device)
            self._plan = plan
        return plan

    def _end_plan(self) -> None:
        if self._plan is not None:
            self._plan.settle()
            self._plan = None

    def _adjust_(self, x_RV: Tensor, plan: SamplingPlan) -> None:
        if plan.penalties is not None and self._history is not None:
            self._history.apply_(x_RV, plan.penalties, plan.steps)
        if plan.bias is not None:
            x_RV[plan.bias.rows_E, plan.bias.ids_E] += plan.bias.bias_E
        masked = plan.masked
        if masked is not None and plan.steps < masked.max_steps:
            entries = (masked.rows_E, masked.ids_E)
            x_RV[entries] = torch.where(masked.steps_E > plan.steps, float("-inf"), x_RV[entries])
        if plan.reasoning is not None:
            plan.reasoning.end_(x_RV)
        if plan.constrained is not None:
            plan.constrained.mask_(x_RV)

    def _draw(
        self, x_RV: Tensor, best_logit_R: Tensor, best_R: Tensor, random: RandomRows, step: int
    ) -> Tensor:
        """Token ids (R,): drawn where there is a temperature, else the best ones."""
        x_SV, best_logit_S, best_S = x_RV, best_logit_R, best_R
        if not random.every_row:
            x_SV, best_logit_S = x_RV[random.rows_S], best_logit_R[random.rows_S]
            best_S = best_R[random.rows_S]
        uniform_S = random.uniforms.at(step)
        weights_SV = weights(x_SV, best_logit_S, random.temperature_S1, random.min_p_S1)
        truncation = random.truncation
        if truncation is None:
            ids_S = draw(weights_SV, uniform_S, best_S)
        elif random.all_truncated:
            ids_S = draw_truncated(weights_SV, uniform_S, best_S, truncation)
        else:
            ids_S = draw(weights_SV, uniform_S, best_S)
            some = truncation.rows_S
            ids_S[some] = draw_truncated(
                weights_SV[some], uniform_S[some], best_S[some], truncation
            )
        if random.every_row:
            return ids_S
        return best_R.index_copy(0, random.rows_S, ids_S)

    def _logprobs(
        self, x_RV: Tensor, ids_R: Tensor, token_ids: list[int], plan: SamplingPlan
    ) -> list[TokenLogprobs | None]:
        found: list[TokenLogprobs | None] = [None] * len(token_ids)
        asked = plan.logprobs
        if asked is None:
            return found
        chosen_L = ids_R[asked.rows_L].clamp(min=0)  # FAILED is no index
        every = token_logprobs(x_RV[asked.rows_L], chosen_L, asked.counts, asked.named)
        for row, one in zip(asked.rows, every, strict=True):
            if token_ids[row] != FAILED:
                found[row] = one
        return found


def _penalised(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def _errors(plan: SamplingPlan, token_ids: Sequence[int]) -> dict[AttemptRef, EngineError]:
    errors: dict[AttemptRef, EngineError] = {}
    for row, (ref, token_id) in enumerate(zip(plan.refs, token_ids, strict=True)):
        if token_id == FAILED:
            grammar = plan.constrained.failure(row) if plan.constrained is not None else None
            errors[ref] = grammar or EngineError(
                "the model's logits are not finite", stage="sample"
            )
    return errors
