"""Rows of a batch whose requests must match a grammar: the masks on their logits.

The state of a grammar follows from the request's output tokens alone, so it is built again from
them wherever a request continues. What a grammar is, ``runtime.grammars`` knows.

Shape suffixes: R rows of the batch   V vocabulary   G rows with a grammar   Y bytes of a mask
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocol.errors import EngineError, InvalidRequest
from protocol.requests import GenerateRequest
from runtime.grammars import Grammars, Matcher

_NEVER = torch.tensor(float("-inf"))  # a number of the CPU's goes with tensors of any device


@dataclass(slots=True, kw_only=True)
class ConstrainedText:
    """One request's output so far, and the tokens that may end it where the grammar may end."""

    matcher: Matcher
    end_ids: tuple[int, ...]
    failed: bool = False

    def mask(self, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """(Y,), one bit a token, lowest bit first. Nothing is allowed once the text has failed."""
        num_bytes = -(-vocab_size // 8)
        mask = np.zeros(num_bytes, np.uint8)
        if self.failed:
            return mask
        try:
            allowed = self.matcher.allowed()
        except InvalidRequest:
            self.failed = True
            return mask
        known = np.frombuffer(allowed, np.uint8)[:num_bytes]
        mask[: len(known)] = known
        end = self.matcher.end
        if end < vocab_size:  # logits may be wider than the vocabulary
            mask[end >> 3] &= 0xFF ^ (1 << (end & 7))
        if allowed[end >> 3] >> (end & 7) & 1:
            for token_id in self.end_ids:
                mask[token_id >> 3] |= 1 << (token_id & 7)
        return mask

    def accept(self, token_id: int) -> None:
        if not self.failed and token_id not in self.end_ids:
            self.failed = not self.matcher.accept(token_id)


def constrained_text(
    request: GenerateRequest, output_ids: Sequence[int], grammars: Grammars | None, vocab_size: int
) -> ConstrainedText | None:
    """None when the request has no grammar.

    Raises:
        InvalidRequest: the grammar is not valid, the output so far does not match it, or there is
            no token that could end the request.
    """
    grammar = request.sampling.grammar
    if grammar is None:
        return None
    if grammars is None:
        raise InvalidRequest("this worker cannot read the model's vocabulary", param="grammar")
    end_ids = tuple(i for i in request.stop.stop_token_ids if 0 <= i < vocab_size)
    if not end_ids:
        raise InvalidRequest("a grammar needs a token that ends the text", param="grammar")
    text = ConstrainedText(matcher=grammars.matcher(grammar), end_ids=end_ids)
    for token_id in output_ids:
        text.accept(token_id)
    if text.failed:
        raise InvalidRequest("the output so far does not match the grammar", param="grammar")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstrainedRows:
    rows: list[int]
    rows_G: Tensor
    texts: list[ConstrainedText]

    def mask_(self, logits_RV: Tensor) -> None:
        """Forbid in place what the grammars do not allow as the next token."""
        vocab_size = logits_RV.shape[1]
        masks_GY = np.stack([text.mask(vocab_size) for text in self.texts])
        forbidden_GV = _forbidden(masks_GY, vocab_size, logits_RV.device)
        if len(self.rows) == len(logits_RV):
            torch.where(forbidden_GV, _NEVER, logits_RV, out=logits_RV)
        else:
            logits_RV[self.rows_G] = torch.where(forbidden_GV, _NEVER, logits_RV[self.rows_G])

    def accept(self, token_ids: Sequence[int]) -> None:
        """The tokens that were sampled, row by row; negative ones are no tokens."""
        for row, text in zip(self.rows, self.texts, strict=True):
            if token_ids[row] >= 0:
                text.accept(token_ids[row])

    def failure(self, row: int) -> EngineError | None:
        """Why a row of these has no token, if its grammar is the reason."""
        if row in self.rows and self.texts[self.rows.index(row)].failed:
            return EngineError("the grammar has become too complex", stage="sample")
        return None


def _forbidden(
    masks_GY: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], vocab_size: int, device: torch.device
) -> Tensor:
    """(G, V) bool: the bits that are not set. To a GPU they go packed: an eighth of the bytes."""
    if device.type == "cpu":
        bits_GV = np.unpackbits(~masks_GY, axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(bits_GV.view(np.bool_))
    bits = torch.arange(8, dtype=torch.uint8, device=device)
    bits_GY8 = (torch.from_numpy(masks_GY).to(device)[:, :, None] >> bits) & 1
    return bits_GY8.flatten(1)[:, :vocab_size] == 0
