"""``/v1/chat/completions``: a conversation in, the assistant's next message out."""

from datetime import UTC, datetime
from functools import partial

from protocol.errors import InvalidRequest
from protocol.ids import RequestId
from protocol.requests import DEFAULT_NAMESPACE, GenerateRequest
from server.openai.answer import Answer, Services
from server.openai.choice import Choice
from server.openai.logprobs import LogprobsShape
from server.openai.models import find_model
from server.openai.parsing import parse_chat, stop_strings
from server.openai.prompts import check_length, tokenise
from server.openai.sampling import (
    request_seed,
    sampling_params,
    stop_conditions,
    token_budget,
)
from server.openai.schema import ChatRequest, ContentPart, GenerationRequest, Message
from server.structured.constraints import constraint_of
from server.text.chat_template import ChatMessage, TemplateOption
from server.text.model_text import ModelText


async def plan_chat(body: bytes, services: Services, *, answer_id: str) -> Answer:
    """
    Raises:
        RequestError: the request cannot be served as it is.
        NoWorkerAvailable: no worker has announced itself yet.
    """
    asked, ignored = parse_chat(body, services.limits)
    model = find_model(services.generator, asked.model)
    text = services.text
    messages = [_message(message) for message in asked.messages]
    chars = sum(len(message["content"]) for message in messages)
    check_length(chars, max_model_len=model.max_model_len, param="messages")
    prompt = await tokenise(
        partial(
            text.chat_prompt,
            messages,
            add_generation_prompt=_or(
                asked.add_generation_prompt, not asked.continue_final_message
            ),
            continue_final_message=bool(asked.continue_final_message),
            options=_template_options(asked, text),
        ),
        chars=chars,
    )
    max_tokens = token_budget(
        prompt_tokens=len(prompt),
        max_tokens=asked.max_completion_tokens or asked.max_tokens,
        max_model_len=model.max_model_len,
    )
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    choices = choices_of_prompt(
        asked,
        text,
        tuple(prompt),
        answer_id=answer_id,
        seed=request_seed(asked),
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=asked.prompt_logprobs,
        first_index=0,
        grammar=await grammar_of(asked, services),
    )
    return Answer(
        kind="chat",
        id=f"chatcmpl-{answer_id}",
        created=int(datetime.now(UTC).timestamp()),
        model=model,
        asked=asked,
        choices=choices,
        tokenizer=text.tokenizer,
        choices_per_prompt=len(choices),
        logprobs=None if logprobs is None else logprob_shapes(asked, text, len(choices)),
        ignored=ignored,
    )


async def grammar_of(asked: GenerationRequest, services: Services) -> str | None:
    """What the output must match, if anything.

    Raises:
        InvalidRequest: it cannot be compiled, or other fields would keep it from ending.
    """
    constraint = constraint_of(asked.response_format, asked.structured_outputs)
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


def choices_of_prompt(
    asked: GenerationRequest,
    text: ModelText,
    prompt: tuple[int, ...],
    *,
    answer_id: str,
    seed: int,
    max_tokens: int,
    logprobs: int | None,
    first_index: int,
    prompt_logprobs: int | None = None,
    grammar: str | None = None,
) -> list[Choice]:
    """The ``n`` choices of one prompt: the same seed, another random stream for each.

    With ``max_tokens`` 0 and ``prompt_logprobs`` the prompt is still computed, and its one token
    of output dropped.
    """
    only_prompt = max_tokens == 0 and prompt_logprobs is not None
    max_tokens = 1 if only_prompt else max_tokens
    vocab_size = text.tokenizer.vocab_size
    stop = stop_conditions(asked, text.defaults, max_tokens=max_tokens, vocab_size=vocab_size)
    namespace = DEFAULT_NAMESPACE if asked.cache_salt is None else f"salt:{asked.cache_salt}"
    stops = stop_strings(asked)
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
        )
        choices.append(
            Choice(index, request, asked, stops, text.tokenizer, only_prompt=only_prompt)
        )
    return choices


def logprob_shapes(
    asked: GenerationRequest, text: ModelText, num_choices: int
) -> list[LogprobsShape]:
    as_ids = bool(asked.return_tokens_as_token_ids)
    return [LogprobsShape(text.tokenizer, as_token_ids=as_ids) for _ in range(num_choices)]


def _message(message: Message) -> ChatMessage:
    """The message as templates know it: one text, and ``system`` for what newer clients call
    ``developer``.
    """
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(map(_part_text, content or ()))
    known = {"role": role, "content": content}
    if message.name is not None:
        known["name"] = message.name
    if message.tool_call_id is not None:
        known["tool_call_id"] = message.tool_call_id
    return known


def _part_text(part: ContentPart) -> str:
    return (part.text if part.type == "text" else part.refusal) or ""


def _template_options(asked: ChatRequest, text: ModelText) -> dict[str, TemplateOption]:
    """Values for the variables that the model's own template has, and for no others."""
    known = text.template.options if text.template is not None else frozenset()
    options: dict[str, TemplateOption] = {}
    for name, value in (asked.chat_template_kwargs or {}).items():
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise InvalidRequest(
                f"chat_template_kwargs: this model's template takes {takes}",
                param="chat_template_kwargs",
            )
        if value is not None:
            options[name] = value
    if asked.reasoning_effort is not None and "reasoning_effort" in known:
        options["reasoning_effort"] = asked.reasoning_effort
    return options


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value
