"""A conversation to the text that the model was trained to continue, by the model's own template.

Templates come with the model, from the operator; callers bring only values. They still run in
jinja2's immutable sandbox. What the text's control tokens mean is not known here.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import ConfigError, InvalidRequest
from runtime.log import get_log

log = get_log(__name__)

ChatMessage = Mapping[str, Any]  # role, content, and where given what else a template may show
TemplateOption = str | int | float | bool

_OURS = frozenset(("messages", "tools", "documents", "tokenize", "chat_template"))
_OURS |= {"add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now"}

_OPEN_END = "\ufdd0"  # no character: its last occurrence is ours


class ChatTemplate:
    """
    Raises:
        ConfigError: the template is not valid jinja2.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            # A plain dictionary is a fraction of the cost of the chain of them that jinja2 makes.
            self._template.globals = dict(self._template.globals)
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not valid: {error}") from error
        self.options = frozenset(names) - _OURS - set(special_tokens)
        self.takes_tools = "tools" in names

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        options: Mapping[str, TemplateOption] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as text, ready for an answer or open at the end of its last message.

        Raises:
            InvalidRequest: the template refuses the conversation.
        """
        if continue_final_message:
            messages = _open_at_end(messages)
        try:
            text = self._template.render(
                {
                    **(options or {}),
                    **self._special_tokens,
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            # The template's own words may quote the conversation, so they go to the log only.
            log.info("chat template refused a conversation", reason=type(error).__name__)
            raise InvalidRequest(
                "messages: the model's chat template does not accept this conversation; most "
                "want an optional system message, then user and assistant in turn",
                param="messages",
            ) from error
        if not continue_final_message:
            return text
        end = text.rfind(_OPEN_END)
        if end < 0:
            raise InvalidRequest(
                "continue_final_message: the model's chat template changes the final message",
                param="continue_final_message",
            )
        return text[:end]


def _open_at_end(messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
    """With a mark where the final message ends. To look for the message itself would find a short
    one in what the template writes behind it.
    """
    *before, final = messages
    return [*before, {**final, "content": final["content"].rstrip() + _OPEN_END}]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # the date of the reader's calendar, as templates mean


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
