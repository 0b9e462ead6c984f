"""Tokenises what it is told to, with a model's files. Its owner may kill it.

Its argument is the model's path. Standard input has one ``Job`` after another; standard output
answers each with a ``Tokenised``, after one that says it is ready. It ends when its input ends.
"""

import sys
from pathlib import Path

import msgspec

from protocol.errors import InvalidRequest
from server.child_frames import read_frame, write_frame
from server.text.chat_template import ChatMessage
from server.text.families.family import Tool
from server.text.loading import load_model_text
from server.text.model_text import ChatPrompt, ModelText


class TextJob(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    text: str
    add_special_tokens: bool


class ChatJob(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    """The arguments of ``ModelText.chat_prompt``."""

    messages: list[ChatMessage]
    add_generation_prompt: bool
    continue_final_message: bool
    options: dict[str, str | int | float | bool]
    tools: list[Tool]


Job = TextJob | ChatJob


class Tokenised(msgspec.Struct, frozen=True, kw_only=True):
    """``reason`` says why there are no ``token_ids``."""

    token_ids: list[int] | None = None
    reasons: bool = False
    reason: str = ""


def run_job(job: Job, text: ModelText) -> ChatPrompt:
    """
    Raises:
        InvalidRequest: the model's template does not accept the conversation.
    """
    if isinstance(job, TextJob):
        ids = text.tokenizer.encode(job.text, add_special_tokens=job.add_special_tokens)
        return ChatPrompt(ids, reasons=False)
    return text.chat_prompt(
        job.messages,
        add_generation_prompt=job.add_generation_prompt,
        continue_final_message=job.continue_final_message,
        options=job.options,
        tools=job.tools,
    )


def main() -> None:
    text = load_model_text(Path(sys.argv[1]))
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    write_frame(answers, Tokenised(reason="ready"))
    while (frame := read_frame(source)) is not None:
        job: Job = msgspec.msgpack.decode(frame, type=Job)
        try:
            prompt = run_job(job, text)
        except InvalidRequest as error:
            write_frame(answers, Tokenised(reason=str(error)))
        else:
            write_frame(answers, Tokenised(token_ids=prompt.token_ids, reasons=prompt.reasons))


if __name__ == "__main__":
    main()
