"""Log probabilities in the two shapes that the API has given them.

JSON has no infinity: a probability of zero is reported as -9999, as other servers do.
"""

from collections.abc import Sequence
from typing import Any

from protocol.requests import TokenLogprobs
from server.openai.choice import Token
from server.text.tokenizer import TextTokenizer

_FLOOR = -9999.0


class LogprobsShape:
    """How one choice's tokens are spelt; remembers how long its text is (``text_offset``)."""

    def __init__(self, tokenizer: TextTokenizer, *, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids
        self._offset = 0

    def chat(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._chat_entry(token_id, logprobs.logprob),
                    "top_logprobs": [self._chat_entry(*top) for top in logprobs.top],
                }
                for token_id, logprobs in tokens
                if logprobs is not None
            ],
            "refusal": None,
        }

    def completion(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Four lists of one length. The chosen token is always among its own alternatives; an
        echoed prompt's first token has null for both.
        """
        offsets: list[int] = []
        chosen: list[float | None] = []
        alternatives: list[dict[str, float] | None] = []
        for token_id, logprobs in tokens:
            offsets.append(self._offset)
            self._offset += len(self._text(token_id))
            chosen.append(None if logprobs is None else max(logprobs.logprob, _FLOOR))
            alternatives.append(None if logprobs is None else self._spelt(token_id, logprobs))
        return {
            "tokens": [self._spelling(token_id) for token_id, _ in tokens],
            "token_logprobs": chosen,
            "top_logprobs": alternatives,
            "text_offset": offsets,
        }

    def prompt(self, tokens: Sequence[Token]) -> list[dict[str, Any] | None]:
        """``prompt_logprobs``: for each token the alternatives and itself, by token id. A rank is
        null where the token is not among the alternatives that were asked for.
        """
        return [
            None if logprobs is None else self._ranked(token_id, logprobs)
            for token_id, logprobs in tokens
        ]

    def _spelt(self, token_id: int, logprobs: TokenLogprobs) -> dict[str, float]:
        spelt: dict[str, float] = {}
        for other, logprob in (*logprobs.top, (token_id, logprobs.logprob)):
            spelt.setdefault(self._spelling(other), max(logprob, _FLOOR))
        return spelt

    def _ranked(self, token_id: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        ranks = {other: rank for rank, (other, _) in enumerate(logprobs.top, start=1)}
        found = {**dict(logprobs.top), token_id: logprobs.logprob}
        return {
            str(other): {
                "logprob": max(logprob, _FLOOR),
                "rank": ranks.get(other),
                "decoded_token": self._text(other),
            }
            for other, logprob in found.items()
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
