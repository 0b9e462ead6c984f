"""Everything textual about the served model: tokenizer, chat template, defaults of its authors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from protocol.errors import InvalidRequest
from server.text.chat_template import ChatMessage, ChatTemplate, TemplateOption
from server.text.tokenizer import TextTokenizer

_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points that no text has a right to rely on


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the model's authors recommend (``generation_config.json``), used where a caller is
    silent. ``end_token_ids`` end a generation unless the caller asks to ignore them.
    """

    end_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    tokenizer: TextTokenizer
    template: ChatTemplate | None  # base models have none and serve completions only
    defaults: GenerationDefaults

    def chat_prompt(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, TemplateOption] | None = None,
    ) -> list[int]:
        """The conversation's token ids. Control tokens come from the template only: their literals
        in messages and options are encoded as plain text.

        Raises:
            InvalidRequest: there is no template, or it refuses the conversation.
        """
        if self.template is None:
            raise InvalidRequest(
                "messages: this model has no chat template; use /v1/completions", param="messages"
            )
        options = options or {}
        mark: str | None = None
        texts = list(_texts(messages, options))
        if any(map(self.tokenizer.has_control_literal, texts)):
            mark = _unused_character(texts)
            messages = [
                {key: self.tokenizer.mark_control_literals(text, mark) for key, text in m.items()}
                for m in messages
            ]
            options = {
                name: self.tokenizer.mark_control_literals(option, mark)
                if isinstance(option, str)
                else option
                for name, option in options.items()
            }
        text = self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            options=options,
        )
        return self.tokenizer.encode_rendered(text, mark=mark)


def _texts(messages: Sequence[ChatMessage], options: Mapping[str, TemplateOption]) -> Iterator[str]:
    for message in messages:
        yield from message.values()
    yield from (option for option in options.values() if isinstance(option, str))


def _unused_character(texts: Sequence[str]) -> str:
    taken = set().union(*texts)
    return next(mark for mark in map(chr, _PRIVATE_USE) if mark not in taken)
