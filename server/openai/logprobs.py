"""Log probabilities in the two shapes that the API has given them.

JSON has no infinity: a probability of zero is reported as -9999, as other servers do.
"""

from collections.abc import Sequence
from typing import Any

from server.openai.choice import Token
from server.text.tokenizer import TextTokenizer

_FLOOR = -9999.0


class LogprobsShape:
    """How one choice's tokens are spelt; remembers how long its text is (``text_offset``)."""

    def __init__(self, tokenizer: TextTokenizer, *, as_token_ids: bool, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids
        self._offset = offset

    def chat(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._chat_entry(token_id, logprobs.logprob),
                    "top_logprobs": [self._chat_entry(*top) for top in logprobs.top],
                }
                for token_id, logprobs in tokens
            ],
            "refusal": None,
        }

    def completion(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Four lists of one length. The chosen token is always among its own alternatives."""
        offsets: list[int] = []
        alternatives: list[dict[str, float]] = []
        for token_id, logprobs in tokens:
            offsets.append(self._offset)
            self._offset += len(self._text(token_id))
            spelt: dict[str, float] = {}
            for other, logprob in (*logprobs.top, (token_id, logprobs.logprob)):
                spelt.setdefault(self._spelling(other), max(logprob, _FLOOR))
            alternatives.append(spelt)
        return {
            "tokens": [self._spelling(token_id) for token_id, _ in tokens],
            "token_logprobs": [max(logprobs.logprob, _FLOOR) for _, logprobs in tokens],
            "top_logprobs": alternatives,
            "text_offset": offsets,
        }

    def _chat_entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._spelling(token_id),
            "logprob": max(logprob, _FLOOR),
            "bytes": list(self._tokenizer.piece(token_id)),
        }

    def _spelling(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_token_ids else self._text(token_id)

    def _text(self, token_id: int) -> str:
        return self._tokenizer.piece(token_id).decode(errors="replace")
