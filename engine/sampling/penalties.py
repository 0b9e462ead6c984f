"""What requests with penalties have said so far, on the device, and the penalties on it.

Repetition divides positive and multiplies negative logits of every token in the prompt or the
output (Keskar et al., arXiv:1909.05858). Then frequency subtracts its value once per occurrence,
and presence once, of tokens in the output only, as the OpenAI API defines them. A slot is one
request's line in these tables; which row of a batch it is in, the caller knows.

Shape suffixes: R rows of the batch   V vocabulary   S slots   P rows with penalties   L history
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_SLOTS = 8
FIRST_LENGTH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PenaltyRows:
    """Rows of one batch that have penalties, as long as the batch's members stay the same."""

    rows_P: Tensor  # (P,) int64
    slots_P: Tensor  # (P,) int64
    repetition_P1: Tensor
    presence_P1: Tensor
    frequency_P1: Tensor
    lengths_P: Tensor  # (P,) int64: entries of history when these rows were made
    max_length: int


class TokenHistory:
    """Tables that grow; they are as large as the penalised requests at one time need."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._free_slots: list[int] = []
        self._history_SL = torch.zeros(0, FIRST_LENGTH, dtype=torch.int64, device=device)
        self._counts_SV = torch.zeros(0, vocab_size, device=device)

    def admit(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> tuple[int, int]:
        """Remember a request's tokens: (its slot, how many entries its history has)."""
        if not self._free_slots:
            self._add_slots()
        slot = self._free_slots.pop()
        ids = list(dict.fromkeys((*prompt_ids, *output_ids)))
        self._widen(len(ids))
        # an entry may be there twice, so the rest of the line repeats a token that is there
        self._history_SL[slot] = ids[0]
        self._history_SL[slot, : len(ids)] = torch.tensor(ids, device=self._device)
        self._counts_SV[slot] = 0.0
        if output_ids:
            counts = Counter(output_ids)
            said = torch.tensor(list(counts), device=self._device)
            self._counts_SV[slot, said] = torch.tensor(
                list(counts.values()), dtype=torch.float32, device=self._device
            )
        return slot, len(ids)

    def retire(self, slot: int) -> None:
        self._free_slots.append(slot)

    def apply_(self, logits_RV: Tensor, rows: PenaltyRows, num_new: int) -> None:
        """Penalise in place; ``num_new`` tokens were recorded since ``rows`` was made."""
        length = rows.max_length + num_new
        ids_PL = self._history_SL[rows.slots_P, :length]
        counts_PL = self._counts_SV[rows.slots_P[:, None], ids_PL]
        where_PL = (rows.rows_P[:, None], ids_PL)
        x_PL = logits_RV[where_PL]
        x_PL = torch.where(x_PL > 0, x_PL / rows.repetition_P1, x_PL * rows.repetition_P1)
        x_PL -= rows.frequency_P1 * counts_PL + rows.presence_P1 * (counts_PL > 0)
        logits_RV[where_PL] = x_PL  # a token that is there twice gets the same value twice

    def record(self, rows: PenaltyRows, token_ids_R: Tensor, num_new: int) -> None:
        """Append one token per row, after ``num_new`` earlier calls for the same ``rows``."""
        self._widen(rows.max_length + num_new + 1)
        token_ids_P = token_ids_R[rows.rows_P].clamp(min=0)  # -1: the request has failed
        self._history_SL[rows.slots_P, rows.lengths_P + num_new] = token_ids_P
        self._counts_SV[rows.slots_P, token_ids_P] += 1.0

    def _add_slots(self) -> None:
        old = self._history_SL.shape[0]
        added = max(FIRST_SLOTS, old)
        self._free_slots.extend(reversed(range(old, old + added)))
        self._history_SL = torch.cat(
            (self._history_SL, self._history_SL.new_zeros(added, self._history_SL.shape[1]))
        )
        self._counts_SV = torch.cat(
            (self._counts_SV, self._counts_SV.new_zeros(added, self._vocab_size))
        )

    def _widen(self, length: int) -> None:
        old = self._history_SL.shape[1]
        if length > old:
            added = max(length - old, old)
            filler_SL = self._history_SL[:, :1].expand(-1, added)
            self._history_SL = torch.cat((self._history_SL, filler_SL), dim=1)
