"""The experts of one rank applied to rows, each row by the expert in its slot.

``exact``: the bits of a row's result depend on that row and its expert alone, not on how many
other rows are with it, in what order, or on how many threads compute. Every product then sees
rows in multiples of ``TILE``, the least that makes GEMM libraries sum each row in one order; where
this machine's library needs more than that, products are made of tiles of exactly ``TILE`` rows.
Where rows came from, and what becomes of the results, is unknown here.

Shape suffixes: S local expert slots   B rows of x   K chosen experts   P places (rows that are
computed, padding included)   D model width   I expert width   M rows of a tile
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from engine.cpu import experts
from engine.exact import cancelling

TILE = 8
_WIDEST_PADDING = 256
_LONGEST_PRODUCT = 512
# What one product on its own costs beside its rows, in rows: measured with 512 x 512 weights on
# two Zen 4 cores, where a call's overhead is 20 to 40 us and a further row 1 us.
_CALL_IN_ROWS = 32
_LARGEST_COPIED_BYTES = 2**21


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Local slots of one layer. Gate rows come first, up rows second; an empty slot is zeros.

    Slots are written in place when an expert moves; they are never reallocated. ``in_tiles``: the
    bytes of each slot lie as ``engine.cpu.packed_weights.in_tiles`` puts them.
    """

    gate_up: Tensor  # (S, 2I, D)
    down: Tensor  # (S, D, I)
    in_tiles: bool = False

    @property
    def num_slots(self) -> int:
        return self.gate_up.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRows:
    """Results in places; ``place_BK[b, k]`` is where row b's k-th result is, if it is here."""

    y_PD: Tensor
    place_BK: Tensor  # (B, K) int64; meaningless where the slot was -1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiling:
    """Places: first ``rows`` for each of ``batched`` slots, then segments of one slot each."""

    rows: int
    batched: tuple[int, ...]
    segments: tuple[tuple[int, int, int], ...]  # slot, first place, rows
    num_places: int
    first_place: tuple[int, ...]  # of each slot among the batched places
    first_overflow: tuple[int, ...]  # of each slot among its segment


class GroupedExperts:
    """``down(silu(gate(x)) * up(x))`` for rows that are spread over the local slots."""

    def __init__(self, weights: ExpertWeights, *, exact: bool) -> None:
        self.weights = weights
        self._exact = exact
        self._gate_up = weights.gate_up.transpose(1, 2)
        self._down = weights.down.transpose(1, 2)

    def __call__(self, x_BD: Tensor, slot_BK: Tensor) -> ExpertRows:
        """Apply to row b the expert in each slot ``slot_BK[b, k]`` that is not -1.

        A slot may not occur twice in a row.
        """
        if x_BD.is_cuda and not self._exact:
            return self._without_host_sync(x_BD, slot_BK)
        weights = self.weights
        if weights.in_tiles or experts.serves(weights.gate_up, weights.down):
            y_PD, place_BK = experts.apply_experts(
                x_BD, slot_BK, weights.gate_up, weights.down, in_tiles=weights.in_tiles
            )
            return ExpertRows(y_PD=y_PD, place_BK=place_BK)
        num_slots = weights.num_slots
        slot_R = slot_BK.flatten()
        # Rows of slot -1 sort first and are cut off.
        counts_S = torch.bincount(slot_R + 1, minlength=num_slots + 1)
        skipped, *counts = counts_S.tolist()  # host sync
        only_tiles = self._exact and not self._padding_suffices()
        tiling = _tile(
            counts,
            round_to=TILE if self._exact else 1,
            widest=TILE if only_tiles else _WIDEST_PADDING,
            copies=self.weights.gate_up[0].nbytes <= _LARGEST_COPIED_BYTES,
        )
        order_R = torch.argsort(slot_R, stable=True)[skipped:]
        place_R = _places(slot_R.index_select(0, order_R), counts, tiling)
        row_P = slot_R.new_zeros(tiling.num_places)  # padding computes row 0 again, for nothing
        row_P[place_R] = order_R // slot_BK.shape[1]
        hidden_P2I = _multiply(x_BD.index_select(0, row_P), self._gate_up, tiling, only_tiles)
        y_PD = _multiply(self._activate(hidden_P2I), self._down, tiling, only_tiles)
        place_BK = torch.zeros_like(slot_R)
        place_BK[order_R] = place_R
        return ExpertRows(y_PD=y_PD, place_BK=place_BK.view_as(slot_BK))

    def _padding_suffices(self) -> bool:
        threads = torch.get_num_threads()
        return all(
            _padding_suffices(weights_S[0].shape, weights_S.dtype, weights_S.device, threads)
            for weights_S in (self._gate_up, self._down)
        )

    def _activate(self, hidden_P2I: Tensor) -> Tensor:
        gate_PI, up_PI = hidden_P2I.chunk(2, dim=-1)
        if self._exact and gate_PI.dtype == torch.float32:
            # silu itself rounds differently in the vector loop and in its scalar tail, and threads
            # move the tail; exp does not. bf16 hides the difference for all of its 65536 values.
            return gate_PI.div(torch.exp(-gate_PI).add_(1)).mul_(up_PI)
        return functional.silu(gate_PI).mul_(up_PI)

    def _without_host_sync(self, x_BD: Tensor, slot_BK: Tensor) -> ExpertRows:
        num_slots = self.weights.num_slots
        # Rows that are not here sort last, beyond the last group, and are not computed.
        slot_R = torch.where(slot_BK < 0, num_slots, slot_BK).flatten()
        sorted_R, order_R = torch.sort(slot_R, stable=True)
        slots_S = torch.arange(num_slots, device=x_BD.device)
        ends_S = torch.searchsorted(sorted_R, slots_S, right=True).to(torch.int32)
        x_PD = x_BD.index_select(0, order_R // slot_BK.shape[1])
        hidden = functional.grouped_mm(x_PD, self._gate_up, offs=ends_S)
        y_PD = functional.grouped_mm(self._activate(hidden), self._down, offs=ends_S)
        y_PD = y_PD.masked_fill(sorted_R.unsqueeze(1) == num_slots, 0)
        place_R = torch.empty_like(order_R)
        place_R[order_R] = torch.arange(order_R.shape[0], device=x_BD.device)
        return ExpertRows(y_PD=y_PD, place_BK=place_R.view_as(slot_BK))


def _tile(counts: Sequence[int], *, round_to: int, widest: int, copies: bool) -> _Tiling:
    """Pad every slot to the same rows for one batched product, or give a slot its own.

    Chooses the padding that costs least by a rough count of rows. Slots without rows are left
    out when most are empty, if weights are small enough to be copied together.
    """
    active = tuple(slot for slot, count in enumerate(counts) if count)
    sparse = 2 * len(active) < len(counts)
    batched = active if sparse else tuple(range(len(counts)))
    longest = max(counts, default=0)

    def cost(rows: int) -> int:
        own = [count - rows for count in counts if count > rows]
        return rows * len(batched) + sum(own) + _CALL_IN_ROWS * len(own)

    paddings = [0]
    if copies or not sparse:
        step = max(round_to, 1)
        while paddings[-1] < min(longest, widest):
            paddings.append(_round_up(min(max(2 * paddings[-1], step), longest), round_to))
    rows = min(paddings, key=cost)
    batched = batched if rows else ()
    first_place = [0] * len(counts)
    for index, slot in enumerate(batched):
        first_place[slot] = index * rows
    own = [slot for slot, count in enumerate(counts) if count > rows]
    lengths = [_round_up(counts[slot] - rows, round_to) for slot in own]
    starts = list(accumulate(lengths, initial=rows * len(batched)))
    first_overflow = [0] * len(counts)
    for slot, start in zip(own, starts, strict=False):
        first_overflow[slot] = start
    return _Tiling(
        rows=rows,
        batched=batched,
        segments=tuple(zip(own, starts, lengths, strict=False)),
        num_places=starts[-1],
        first_place=tuple(first_place),
        first_overflow=tuple(first_overflow),
    )


def _places(slot_R: Tensor, counts: Sequence[int], tiling: _Tiling) -> Tensor:
    """Where each row goes, for rows sorted by slot."""
    starts = list(accumulate(counts, initial=0))[:-1]
    device = slot_R.device
    row_R = torch.arange(slot_R.shape[0], device=device)
    shift_S = [place - start for place, start in zip(tiling.first_place, starts, strict=True)]
    place_R = row_R + torch.tensor(shift_S, device=device).index_select(0, slot_R)
    if tiling.segments:
        index_R = row_R - torch.tensor(starts, device=device).index_select(0, slot_R)
        overflow_R = torch.tensor(tiling.first_overflow, device=device).index_select(0, slot_R)
        place_R = torch.where(index_R < tiling.rows, place_R, overflow_R + index_R - tiling.rows)
    return place_R


def _multiply(x_P: Tensor, weights_S: Tensor, tiling: _Tiling, only_tiles: bool) -> Tensor:
    y_P = x_P.new_empty(x_P.shape[0], weights_S.shape[2])
    num_batched = tiling.rows * len(tiling.batched)
    if num_batched:
        _multiply_batch(
            x_P[:num_batched].view(len(tiling.batched), tiling.rows, -1),
            _select(weights_S, tiling.batched),
            y_P[:num_batched].view(len(tiling.batched), tiling.rows, -1),
        )
    for slot, first, rows in tiling.segments:
        for start in range(first, first + rows, _LONGEST_PRODUCT):
            end = min(start + _LONGEST_PRODUCT, first + rows)
            x_MD, y_MD = x_P[start:end], y_P[start:end]
            if only_tiles:
                tiles = x_MD.view(-1, TILE, x_MD.shape[1])
                weight = weights_S[slot].expand(len(tiles), -1, -1)
                _multiply_batch(tiles, weight, y_MD.view(len(tiles), TILE, -1))
            else:
                torch.mm(x_MD, weights_S[slot], out=y_MD)
    return y_P


def _multiply_batch(tiles: Tensor, weights: Tensor, out: Tensor) -> None:
    if len(tiles) == 1 and tiles.shape[1] == TILE:
        # Threads share a batch out by whole products, but a single product by its columns or its
        # sums, which changes bits: make it two.
        out.copy_(torch.bmm(tiles.expand(2, -1, -1), weights.expand(2, -1, -1))[:1])
    else:
        torch.bmm(tiles, weights, out=out)


def _select(weights_S: Tensor, slots: Sequence[int]) -> Tensor:
    if len(slots) == weights_S.shape[0]:
        return weights_S
    # Stacking views copies whole slots with memcpy; indexing is several times slower.
    return torch.stack([weights_S[slot].t() for slot in slots]).transpose(1, 2)


def _round_up(rows: int, to: int) -> int:
    return -(-rows // to) * to


@lru_cache(maxsize=64)
def _padding_suffices(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, threads: int
) -> bool:
    """Whether products of any multiple of ``TILE`` rows give the bits of single tiles here.

    Measured once per shape and number of ``threads``: libraries promise nothing. Inputs cancel,
    so that results are nothing but the rounding that another order of summation would change.
    """
    del threads  # the kernels ask for it themselves
    x, weight = cancelling((_LONGEST_PRODUCT, shape[0]), (shape[1], shape[0]))
    x = x.to(device, dtype)
    weight = weight.to(device, dtype).t()  # a transposed view, like those of the experts

    def batched(tile: int) -> Tensor:
        tiles = x.view(_LONGEST_PRODUCT // tile, tile, -1)
        return torch.bmm(tiles, weight.expand(len(tiles), -1, -1)).view(_LONGEST_PRODUCT, -1)

    wanted = batched(TILE)
    products = [batched(tile) for tile in (2 * TILE, 8 * TILE, _WIDEST_PADDING, _LONGEST_PRODUCT)]
    products += [torch.mm(x[: rows * TILE], weight) for rows in (1, 2, 3, 5, 11, 17, 33, 43, 64)]
    return all(torch.equal(product, wanted[: len(product)]) for product in products)
