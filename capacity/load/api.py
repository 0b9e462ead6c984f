"""The request bodies of the three OpenAI endpoints that generate text."""

from collections.abc import Sequence

import msgspec
import orjson

PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
}
Message = dict[str, str]


class Api(msgspec.Struct, frozen=True, kw_only=True):
    """How to ask. ``exact_length``: ask the server to go on past the end-of-sequence token, by the
    extensions ``ignore_eos`` and ``min_tokens``, so that output lengths are those wanted.
    """

    endpoint: str
    model: str
    stream: bool = True
    exact_length: bool = True

    @property
    def path(self) -> str:
        return PATHS[self.endpoint]

    def body(
        self,
        prompt: str | Sequence[int],
        output_tokens: int,
        *,
        history: Sequence[Message] = (),
    ) -> bytes:
        """``history`` are the messages before this prompt; token ids go to completions only."""
        fields: dict[str, object] = {"model": self.model, "temperature": 0}
        limit = "max_output_tokens" if self.endpoint == "responses" else "max_tokens"
        fields[limit] = output_tokens
        if self.endpoint == "completions":
            if isinstance(prompt, str):
                fields["prompt"] = "\n".join([*(said["content"] for said in history), prompt])
            else:
                fields["prompt"] = list(prompt)
        else:
            messages = [*history, {"role": "user", "content": prompt}]
            fields["input" if self.endpoint == "responses" else "messages"] = messages
        if self.stream:
            fields["stream"] = True
            if self.endpoint != "responses":
                fields["stream_options"] = {"include_usage": True}
        if self.exact_length:
            fields["ignore_eos"] = True
            fields["min_tokens"] = output_tokens
        return orjson.dumps(fields)
