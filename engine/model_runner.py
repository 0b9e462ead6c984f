"""Runs a rank's model on batches that the roles describe as plain lists.

The runner holds the model and the KV memory together; who is in a batch and which blocks a
sequence has is decided above it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.kvcache.storage import KVStorage
from engine.models.decoder import AfterLayer, Decoder

# Shape suffixes: N tokens   B sequences   M blocks of the longest table   R rows   V vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStep:
    """What one sequence brings to a step: tokens that continue the ``start`` already cached.

    ``block_table`` has a block for every ``block_tokens`` tokens up to the last new one. ``key``
    stands for the request where experts have replicas.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    wants_logits: bool = True  # of its last token
    key: int = 0
    wants_every_row: bool = False  # of all its tokens


def batch_from(
    sequences: Sequence[SequenceStep], *, block_tokens: int, device: torch.device
) -> ForwardBatch:
    """One step over ``sequences``, in their order. No sequences make an idle rank's batch.

    One tensor goes to the device and all fields are views of it, so a GPU step has one copy.
    """
    tokens: list[int] = []
    positions: list[int] = []
    keys: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    for sequence in sequences:
        table, end = sequence.block_table, sequence.start + len(sequence.token_ids)
        assert sequence.token_ids, "a sequence without tokens has no place in a batch"
        assert len(table) * block_tokens >= end, "a new token has no block"
        tokens.extend(sequence.token_ids)
        for position in range(sequence.start, end):
            block, offset = divmod(position, block_tokens)
            slots.append(table[block] * block_tokens + offset)
        positions.extend(range(sequence.start, end))
        keys.extend([sequence.key] * len(sequence.token_ids))
        if sequence.wants_every_row:
            rows.extend(range(len(tokens) - len(sequence.token_ids), len(tokens)))
        elif sequence.wants_logits:
            rows.append(len(tokens) - 1)
    width = max((len(sequence.block_table) for sequence in sequences), default=0)
    tables: list[int] = []
    for sequence in sequences:
        tables.extend(sequence.block_table)
        tables.extend([0] * (width - len(sequence.block_table)))
    count = len(tokens)
    packed = torch.tensor(tokens + positions + keys + slots + rows + tables, dtype=torch.int64)
    packed = packed.to(device, non_blocking=True)
    last = 4 * count + len(rows)
    return ForwardBatch(
        token_ids=packed[:count],
        positions=packed[count : 2 * count],
        request_keys=packed[2 * count : 3 * count],
        slot_mapping=packed[3 * count : 4 * count],
        block_tables=packed[last:].view(len(sequences), width),
        query_lens=tuple(len(sequence.token_ids) for sequence in sequences),
        context_lens=tuple(sequence.start + len(sequence.token_ids) for sequence in sequences),
        logits_rows=packed[4 * count : last],
    )


class ModelRunner:
    def __init__(self, model: Decoder, storage: KVStorage) -> None:
        self.model = model
        self.storage = storage

    def connect(self) -> None:
        """As ``Decoder.connect``."""
        self.model.connect()

    @torch.inference_mode()
    def run(
        self,
        batch: ForwardBatch,
        after_layer: AfterLayer | None = None,
        *,
        in_two: bool = False,
    ) -> Tensor:
        """Logits (R, V) float32, on the rank's device; the storage then holds the batch's KV.

        ``after_layer(i)`` is called from this thread as soon as layer i's KV is written (on a GPU:
        queued on the current stream), while later layers are still to come.

        ``in_two``: all ranks pass the step, a decode step, as two batches (``hidden_in_two``).

        Raises:
            WorkerLost: a rank that shares the experts failed; the step's KV is not to be used.
        """
        if in_two:
            return self.model.logits(self.model.hidden_in_two(batch, self.storage))
        return self.model.forward(batch, self.storage, after_layer)

    @torch.inference_mode()
    def run_hidden(
        self,
        batch: ForwardBatch,
        after_layer: AfterLayer | None = None,
        x_ND: Tensor | None = None,
    ) -> Tensor:
        """``run`` without the last product: (R, D), for callers who want many rows' logits and
        take them a part at a time with ``logits``. ``x_ND`` and the answer of stages as
        ``Decoder.hidden``.
        """
        return self.model.hidden(batch, self.storage, after_layer, x_ND)

    @torch.inference_mode()
    def logits(self, x_RD: Tensor) -> Tensor:
        """(R, V) float32 of rows that ``run_hidden`` gave."""
        return self.model.logits(x_RD)
