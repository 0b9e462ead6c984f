"""What both endpoints plan alike: the requests to workers behind an answer's choices."""

from collections.abc import Sequence

from protocol.errors import InvalidRequest
from protocol.ids import RequestId
from protocol.requests import GenerateRequest, ReasoningLimit
from server.callers import Caller
from server.openai.answer import Services
from server.openai.choice import Choice, Reasoned
from server.openai.logprobs import LogprobsShape
from server.openai.parsing import stop_strings
from server.openai.sampling import check_token_ids, sampling_params, stop_conditions
from server.openai.schema import GenerationRequest
from server.structured.constraints import Constraint, constraint_of
from server.text.model_text import ModelText


def asked_constraint(asked: GenerationRequest, text: ModelText) -> Constraint | None:
    """What the caller's fields say of the output, tools apart.

    Raises:
        InvalidRequest: they contradict each other, or one is not valid.
    """
    allowed = asked.allowed_token_ids
    if allowed is not None:
        check_token_ids(allowed, vocab_size=text.tokenizer.vocab_size, param="allowed_token_ids")
    return constraint_of(
        asked.response_format,
        asked.structured_outputs,
        spell=text.spell,
        allowed_token_ids=allowed,
        bad_words=asked.bad_words,
    )


async def compile_grammar(
    constraint: Constraint | None, asked: GenerationRequest, services: Services
) -> str | None:
    """What the output must match, as workers take it.

    Raises:
        InvalidRequest: it cannot be compiled, or other fields would keep it from ending.
    """
    if constraint is None:
        return None
    for name in ("ignore_eos", "min_tokens"):
        if getattr(asked, name):
            raise InvalidRequest(
                f"{name}: cannot be combined with output that must match a format, which says "
                "itself where it ends",
                param=name,
            )
    if not services.text.defaults.end_token_ids:
        raise InvalidRequest(
            f"{constraint.param}: this model has no token that ends its text",
            param=constraint.param,
        )
    return await services.grammars.compile(constraint)


def reasoned_by(text: ModelText, *, begun: bool) -> Reasoned | None:
    """How the tokens of reasoning are told from those of the answer."""
    if text.reasoning is None:
        return None
    close = text.tokenizer.token_id(text.reasoning.close)
    if close is None:
        return None
    return Reasoned(open=text.tokenizer.token_id(text.reasoning.open), close=close, begun=begun)


def reasoning_limit(asked: GenerationRequest, reasoned: Reasoned | None) -> ReasoningLimit | None:
    """
    Raises:
        InvalidRequest: no token of this model ends its reasoning.
    """
    budget = asked.thinking_token_budget
    if budget is None or budget < 0:
        return None
    if reasoned is None:
        raise InvalidRequest(
            "thinking_token_budget: this model has no token that ends its reasoning: leave it out",
            param="thinking_token_budget",
        )
    return ReasoningLimit(
        max_tokens=budget, close=reasoned.close, open=reasoned.open, begun=reasoned.begun
    )


def choices_of_prompt(
    asked: GenerationRequest,
    text: ModelText,
    prompt: tuple[int, ...],
    *,
    answer_id: str,
    caller: Caller,
    seed: int,
    max_tokens: int,
    logprobs: int | None,
    first_index: int,
    prompt_logprobs: int | None = None,
    grammar: str | None = None,
    shown_markers: Sequence[str] = (),
    reasoned: Reasoned | None = None,
    limit: ReasoningLimit | None = None,
) -> list[Choice]:
    """The ``n`` choices of one prompt: the same seed, another random stream for each.

    With ``max_tokens`` 0 and ``prompt_logprobs`` the prompt is still computed, and its one token
    of output dropped. ``shown_markers`` stay in the text although they are control tokens.
    """
    only_prompt = max_tokens == 0 and prompt_logprobs is not None
    max_tokens = 1 if only_prompt else max_tokens
    vocab_size = text.tokenizer.vocab_size
    stop = stop_conditions(asked, text.defaults, max_tokens=max_tokens, vocab_size=vocab_size)
    namespace = caller.namespace(asked.cache_salt)
    stops = stop_strings(asked)
    found = map(text.tokenizer.token_id, shown_markers)
    shown_ids = frozenset(token_id for token_id in found if token_id is not None)
    choices: list[Choice] = []
    for k in range(asked.n or 1):
        index = first_index + k
        sampling = sampling_params(
            asked,
            text.defaults,
            seed=seed,
            choice=k,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
            reasoning_limit=limit,
            vocab_size=vocab_size,
        )
        request = GenerateRequest(
            request_id=RequestId(f"{answer_id}-{index}"),
            attempt=0,
            model=asked.model,
            prompt_token_ids=prompt,
            sampling=sampling,
            stop=stop,
            namespace=namespace,
            caller=caller.name,
            priority=caller.priority,
        )
        choices.append(
            Choice(
                index,
                request,
                asked,
                stops,
                text.tokenizer,
                only_prompt=only_prompt,
                shown_ids=shown_ids,
                reasoned=reasoned,
            )
        )
    return choices


def logprob_shapes(
    asked: GenerationRequest, text: ModelText, num_choices: int
) -> list[LogprobsShape]:
    as_ids = bool(asked.return_tokens_as_token_ids)
    return [LogprobsShape(text.tokenizer, as_token_ids=as_ids) for _ in range(num_choices)]
