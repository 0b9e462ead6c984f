"""``/v1/chat/completions``: a conversation in, the assistant's next message out."""

from datetime import UTC, datetime
from typing import Any

from protocol.errors import InvalidRequest, invalid_field
from server.callers import Caller
from server.generation import ServedModel
from server.openai.answer import Answer, Form, Services
from server.openai.models import find_model
from server.openai.parsing import parse_chat
from server.openai.part_events import ReadAnswer
from server.openai.planning import (
    asked_constraint,
    choices_of_prompt,
    compile_grammar,
    logprob_shapes,
    reasoned_by,
    reasoning_limit,
)
from server.openai.prompts import check_length, text_length, tokenise, truncated
from server.openai.sampling import request_seed, token_budget
from server.openai.schema import ChatRequest, ContentPart, Message
from server.openai.tools import ToolUse, called, part_reader, tool_constraint, tool_use
from server.text.chat_template import ChatMessage, TemplateOption
from server.text.families.parts import PartReader
from server.text.long_text_process import ChatJob
from server.text.model_text import ChatPrompt, ModelText

_EFFORT = "reasoning_effort"
_SWITCH = "enable_thinking"  # what templates call it that know no degrees of effort


async def plan_chat(body: bytes, services: Services, *, answer_id: str, caller: Caller) -> Answer:
    """
    Raises:
        RequestError: the request cannot be served as it is.
        NoWorkerAvailable: no worker has announced itself yet.
    """
    asked, ignored = parse_chat(body, services.limits)
    return await plan_parsed_chat(
        asked, services, answer_id=answer_id, caller=caller, ignored=ignored
    )


async def plan_parsed_chat(
    asked: ChatRequest,
    services: Services,
    *,
    answer_id: str,
    caller: Caller,
    ignored: tuple[str, ...] = (),
    form: Form | None = None,
) -> Answer:
    """As ``plan_chat``, for another API that has read its request already and has its ``form``."""
    model = find_model(services.generator, asked.model)
    text = services.text
    use = tool_use(asked)
    prompt = await chat_prompt(asked, services, model=model, use=use)
    longest = asked.max_completion_tokens or asked.max_tokens
    ids = tuple(
        truncated(
            prompt.token_ids,
            asked.truncate_prompt_tokens,
            max_tokens=longest,
            max_model_len=model.max_model_len,
        )
    )
    max_tokens = token_budget(
        prompt_tokens=len(ids),
        max_tokens=longest,
        max_model_len=model.max_model_len,
    )
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    constraint = asked_constraint(asked, text)
    constraint = tool_constraint(use, constraint, text, reasons=prompt.reasons)
    readers = [part_reader(use, text, reasons=prompt.reasons) for _ in range(asked.n or 1)]
    reasoned = reasoned_by(text, begun=prompt.reasons)
    choices = choices_of_prompt(
        asked,
        text,
        ids,
        answer_id=answer_id,
        caller=caller,
        seed=request_seed(asked),
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=asked.prompt_logprobs,
        first_index=0,
        grammar=await compile_grammar(constraint, asked, services),
        shown_markers=_shown_markers(use, text),
        reasoned=reasoned,
        limit=reasoning_limit(asked, reasoned),
    )
    return Answer(
        kind="chat" if form is None else form.kind,
        form=form,
        id=f"chatcmpl-{answer_id}",
        created=int(datetime.now(UTC).timestamp()),
        model=model,
        asked=asked,
        choices=choices,
        tokenizer=text.tokenizer,
        choices_per_prompt=len(choices),
        logprobs=None if logprobs is None else logprob_shapes(asked, text, len(choices)),
        read=_read_answer(readers, asked),
        ignored=(*ignored, *_without_effect(asked, services)),
    )


async def chat_prompt(
    asked: ChatRequest, services: Services, *, model: ServedModel, use: ToolUse | None = None
) -> ChatPrompt:
    """The conversation as the model reads it.

    Raises:
        InvalidRequest: the model's template does not accept it, or it takes too long to tokenise.
        ContextLengthExceeded: it can never fit.
    """
    text = services.text
    use = tool_use(asked) if use is None else use
    messages = [_message(m, f"messages[{i}]", text) for i, m in enumerate(asked.messages)]
    chars = sum(map(text_length, messages)) + sum(text_length(t.definition) for t in use.tools)
    check_length(chars, max_model_len=model.max_model_len, param="messages")
    job = ChatJob(
        messages=messages,
        add_generation_prompt=_or(asked.add_generation_prompt, not asked.continue_final_message),
        continue_final_message=bool(asked.continue_final_message),
        options=_template_options(asked, text),
        tools=list(use.tools),
    )
    return await tokenise(job, services, chars=chars, param="messages")


def _read_answer(readers: list[PartReader | None], asked: ChatRequest) -> ReadAnswer | None:
    present = [reader for reader in readers if reader is not None]
    if not present:
        return None
    return ReadAnswer(present, shows_reasoning=asked.include_reasoning is not False)


def _shown_markers(use: ToolUse, text: ModelText) -> tuple[str, ...]:
    """Control tokens that the answer's reader must see."""
    marks = text.reasoning
    reasoning = () if marks is None else (marks.open, marks.close)
    uses_family = use.tools or text.family.reads_every_text
    return (*reasoning, *(text.family.markers if uses_family else ()))


def _message(message: Message, path: str, text: ModelText) -> ChatMessage:
    """The message as templates know it: one text, and ``system`` for what newer clients call
    ``developer``.
    """
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(map(_part_text, content or ()))
    known: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        known["name"] = message.name
    if message.tool_call_id is not None:
        known["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        as_text = text.family.arguments_as_text
        known["tool_calls"] = [
            called(call, f"{path}.tool_calls[{i}]", arguments_as_text=as_text)
            for i, call in enumerate(message.tool_calls)
        ]
    reasoning = message.reasoning_content or message.reasoning
    if reasoning is not None:
        known["reasoning_content"] = reasoning
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
    effort = asked.reasoning_effort
    if effort is not None and _EFFORT in known:
        options[_EFFORT] = effort
    elif effort is not None and _SWITCH in known:
        options.setdefault(_SWITCH, effort != "none")
    return options


def _without_effect(asked: ChatRequest, services: Services) -> tuple[str, ...]:
    """Fields that this model's template cannot honour.

    Raises:
        InvalidRequest: the operator wants them refused.
    """
    known = services.text.template.options if services.text.template is not None else frozenset()
    if asked.reasoning_effort is None or not known.isdisjoint((_EFFORT, _SWITCH)):
        return ()
    if services.limits.strict_params:
        raise invalid_field(_EFFORT, "this model's template does not know it")
    return (_EFFORT,)


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value
