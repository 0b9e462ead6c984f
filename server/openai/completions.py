"""``/v1/completions``: raw prompts in, their continuations out.

The caller owns the whole prompt here, control tokens included: that is what the endpoint is for.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from server.callers import Caller
from server.openai.answer import Answer, Services
from server.openai.choice import Choice
from server.openai.models import find_model
from server.openai.parsing import parse_completion
from server.openai.planning import (
    asked_constraint,
    choices_of_prompt,
    compile_grammar,
    logprob_shapes,
    reasoned_by,
    reasoning_limit,
)
from server.openai.prompts import check_length, tokenise, truncated
from server.openai.sampling import check_token_ids, request_seed, token_budget
from server.openai.schema import CompletionRequest
from server.text.detokenizer import detokenizer
from server.text.long_text_process import TextJob
from server.text.model_text import ModelText


async def plan_completion(
    body: bytes, services: Services, *, answer_id: str, caller: Caller
) -> Answer:
    """
    Raises:
        RequestError: the request cannot be served as it is.
        NoWorkerAvailable: no worker has announced itself yet.
    """
    asked, ignored, prompts, max_tokens = parse_completion(body, services.limits)
    model = find_model(services.generator, asked.model)
    text = services.text
    seed = request_seed(asked)
    grammar = await compile_grammar(asked_constraint(asked, text), asked, services)
    choices: list[Choice] = []
    echoes: list[str] = []
    for prompt in prompts:
        ids = await _token_ids(
            prompt,
            services,
            special=asked.add_special_tokens is not False,
            limit=model.max_model_len,
        )
        ids = tuple(
            truncated(
                ids,
                asked.truncate_prompt_tokens,
                max_tokens=max_tokens,
                max_model_len=model.max_model_len,
            )
        )
        token_budget(
            prompt_tokens=len(ids), max_tokens=max_tokens, max_model_len=model.max_model_len
        )
        mine = choices_of_prompt(
            asked,
            text,
            ids,
            answer_id=answer_id,
            caller=caller,
            seed=seed,
            max_tokens=max_tokens,
            logprobs=asked.logprobs,
            prompt_logprobs=_prompt_logprobs(asked),
            first_index=len(choices),
            grammar=grammar,
            limit=reasoning_limit(asked, reasoned_by(text, begun=_reasons(ids, text))),
        )
        choices += mine
        if asked.echo:
            echoes += [prompt if isinstance(prompt, str) else _decoded(prompt, text)] * len(mine)
    return Answer(
        kind="completions",
        id=f"cmpl-{answer_id}",
        created=int(datetime.now(UTC).timestamp()),
        model=model,
        asked=asked,
        choices=choices,
        tokenizer=text.tokenizer,
        choices_per_prompt=asked.n or 1,
        logprobs=None if asked.logprobs is None else logprob_shapes(asked, text, len(choices)),
        echoes=echoes if asked.echo else None,
        ignored=ignored,
    )


def _prompt_logprobs(asked: CompletionRequest) -> int | None:
    """An echo comes with the probabilities of its tokens, where ``logprobs`` are asked for."""
    wanted = [asked.prompt_logprobs, asked.logprobs if asked.echo else None]
    return max((count for count in wanted if count is not None), default=None)


async def _token_ids(
    prompt: str | list[int], services: Services, *, special: bool, limit: int
) -> tuple[int, ...]:
    ids = prompt
    if isinstance(ids, str):
        check_length(len(ids), max_model_len=limit, param="prompt")
        job = TextJob(text=ids, add_special_tokens=special)
        ids = (await tokenise(job, services, chars=len(ids), param="prompt")).token_ids
    check_token_ids(ids, vocab_size=services.text.tokenizer.vocab_size, param="prompt")
    return tuple(ids)


def _reasons(prompt: Sequence[int], text: ModelText) -> bool:
    """Whether the prompt has begun the model's reasoning and not ended it."""
    if text.reasoning is None:
        return False
    marks = tuple(map(text.tokenizer.token_id, (text.reasoning.open, text.reasoning.close)))
    last = next((token_id for token_id in reversed(prompt) if token_id in marks), None)
    return last is not None and last == marks[0]


def _decoded(prompt: list[int], text: ModelText) -> str:
    stream = detokenizer(text.tokenizer)
    return "".join([*map(stream.push, prompt), stream.finish()])
