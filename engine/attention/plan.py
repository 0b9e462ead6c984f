"""Where a step reads and writes the cache: worked out once, used by every layer.

In a decode step each sequence's context is cut into tiles of keys. A tile that reaches beyond the
context reads blocks of the same sequence again, never those of another, and masks them. The size
of a tile depends on the model and the machine alone, so that a sequence's result does too.
"""

# Shape suffixes: B sequences   T tiles of all sequences   J blocks of a tile   S keys of a tile
# K kinds of row: keys and values, or latents alone   G KV heads   N tokens

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.tile import TileForm, tile_form
from engine.batch import ForwardBatch
from engine.kvcache.storage import LayerCache


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """``owner_T`` is None when tile i is all of sequence i; ``parts_B`` is empty when the first B
    tiles are, and otherwise names each sequence's first, second ... tile, T where it has none.
    """

    width: int  # S
    gather_rows: Tensor  # (K * T * G * J,) into LayerCache.block_rows
    gathered: Tensor  # room for those rows: one allocation a step, and one place in the caches
    mask_T11S: Tensor  # float32: 0, or -inf where there is no token
    owner_T: Tensor | None
    parts_B: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePlan:
    """One sequence of a step with longer chunks."""

    tokens: slice  # its rows among the step's N
    context: int
    gather_rows: Tensor | None  # (K * G * J,) into LayerCache.block_rows; None: nothing is cached


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    write_rows_KN: Tensor  # into LayerCache.token_rows, (K, N * G)
    decode: DecodePlan | None  # when every sequence brings one token
    sequences: tuple[SequencePlan, ...]  # otherwise


def plan_step(batch: ForwardBatch, *, cache: LayerCache, query_heads: int) -> StepPlan:
    """For a batch with at least one token."""
    write_rows_KN = cache.rows_of_slots(batch.slot_mapping)
    if batch.decode_only:
        decode = _plan_decode(batch, cache, tile_form(cache, query_heads))
        return StepPlan(write_rows_KN=write_rows_KN, decode=decode, sequences=())
    sequences = tuple(_plan_sequences(batch, cache))
    return StepPlan(write_rows_KN=write_rows_KN, decode=None, sequences=sequences)


def _plan_sequences(batch: ForwardBatch, cache: LayerCache) -> Iterator[SequencePlan]:
    start = 0
    for row, context in enumerate(batch.context_lens):
        end = start + batch.query_lens[row]
        blocks = batch.block_tables[row, : -(-context // cache.block_tokens)]
        cached = context > end - start
        yield SequencePlan(
            tokens=slice(start, end),
            context=context,
            gather_rows=cache.rows_of_blocks(blocks[None]).flatten() if cached else None,
        )
        start = end


def _plan_decode(batch: ForwardBatch, cache: LayerCache, form: TileForm) -> DecodePlan:
    device, tokens, contexts = batch.block_tables.device, cache.block_tokens, batch.context_lens
    width = form.width_for(max(contexts))
    counts = [-(-context // form.keys) for context in contexts]
    owners = [row for row, count in enumerate(counts) for _ in range(count)]
    first_keys = [part * form.keys for count in counts for part in range(count)]
    idle = [0] * max(0, form.min_tiles - len(owners))  # the first tile again, its result unused
    owners, first_keys = owners + idle, first_keys + idle

    owner_T = torch.tensor(owners, device=device)
    context_T1 = torch.tensor([contexts[row] for row in owners], device=device).unsqueeze(1)
    first_key_T1 = torch.tensor(first_keys, device=device).unsqueeze(1)
    column_TJ = first_key_T1 // tokens + torch.arange(width // tokens, device=device)
    column_TJ = torch.minimum(column_TJ, (context_T1 - 1) // tokens)
    block_TJ = batch.block_tables[owner_T.unsqueeze(1), column_TJ]
    key_TS = first_key_T1 + torch.arange(width, device=device)
    mask_TS = torch.zeros(key_TS.shape, device=device)
    mask_TS.masked_fill_(key_TS >= context_T1, -torch.inf)
    gather_rows = cache.rows_of_blocks(block_TJ).flatten()
    return DecodePlan(
        width=width,
        gather_rows=gather_rows,
        gathered=cache.block_rows.new_empty(gather_rows.shape[0], cache.block_rows.shape[1]),
        mask_T11S=mask_TS[:, None, None],
        owner_T=None if len(owners) == len(contexts) else owner_T,
        parts_B=_parts(counts, len(owners), device) if max(counts) > 1 else (),
    )


def _parts(counts: list[int], num_tiles: int, device: torch.device) -> tuple[Tensor, ...]:
    first, table = 0, []
    for count in counts:
        table.append([first + i if i < count else num_tiles for i in range(max(counts))])
        first += count
    return torch.tensor(table, device=device).unbind(1)
