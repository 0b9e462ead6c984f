"""KV heads between ranks that split them differently: which rank sends which, and which bytes move.

A tensor-parallel prefill rank holds some heads of every layer; a decode rank may hold others, often
all. Inside one block of one layer lie keys and then values, and of each the heads one after another
(``engine.kvcache.storage``), so a range of heads is two strips. Latents (``mla``) have no heads:
every rank of a tensor-parallel group holds the same ones, and one rank sends them. Pure arithmetic.
"""

from typing import NamedTuple

from protocol.errors import LayoutMismatch
from protocol.kv import DTYPE_BYTES, KVLayout


class HeadRange(NamedTuple):
    """``num_heads`` heads from ``first`` on of the model's ``total``, on one rank."""

    first: int
    num_heads: int
    total: int


class Strip(NamedTuple):
    """``length`` bytes at an offset within one block of one layer, at either end."""

    source: int
    target: int
    length: int


def heads_of_rank(rank: int, num_ranks: int, total: int) -> HeadRange:
    """What rank ``rank`` of a tensor-parallel group holds. Beyond one head a rank, neighbours hold
    the same head.

    Raises:
        LayoutMismatch: neither number divides the other.
    """
    if num_ranks <= total and total % num_ranks == 0:
        count = total // num_ranks
        return HeadRange(rank * count, count, total)
    if num_ranks % total == 0:
        return HeadRange(rank * total // num_ranks, 1, total)
    raise LayoutMismatch(f"{total} KV heads cannot be split over {num_ranks} ranks")


def senders(num_ranks: int, wanted: HeadRange) -> list[tuple[int, HeadRange]]:
    """Which ranks of a prefill group send a decode rank which heads: each head comes once, from the
    first rank that holds it.

    Raises:
        LayoutMismatch: as ``heads_of_rank``.
    """
    found: list[tuple[int, HeadRange]] = []
    next_head = wanted.first
    for rank in range(num_ranks):
        held = heads_of_rank(rank, num_ranks, wanted.total)
        first = max(held.first, next_head)
        stop = min(held.first + held.num_heads, wanted.first + wanted.num_heads)
        if first < stop:
            found.append((rank, HeadRange(first, stop - first, wanted.total)))
            next_head = stop
    return found


def strips(
    source: KVLayout, source_heads: HeadRange, target: KVLayout, target_heads: HeadRange
) -> list[Strip]:
    """The bytes of the heads that both ends hold, in the target's order, neighbours merged.

    Raises:
        LayoutMismatch: the layouts differ in more than their number of heads.
    """
    _check(source, source_heads, target, target_heads)
    if source.kind == "mla":
        return [Strip(0, 0, source.layer_block_bytes)]
    first = max(source_heads.first, target_heads.first)
    stop = min(
        source_heads.first + source_heads.num_heads, target_heads.first + target_heads.num_heads
    )
    if first >= stop:
        return []
    of_head = source.block_tokens * source.key_width * DTYPE_BYTES[source.dtype]
    found: list[Strip] = []
    for kind in range(2):  # keys, values
        here = (kind * source_heads.num_heads + first - source_heads.first) * of_head
        there = (kind * target_heads.num_heads + first - target_heads.first) * of_head
        last = found[-1] if found else None
        size = (stop - first) * of_head
        if last is not None and (last.source + last.length, last.target + last.length) == (
            here,
            there,
        ):
            found[-1] = Strip(last.source, last.target, last.length + size)
        else:
            found.append(Strip(here, there, size))
    return found


def _check(
    source: KVLayout, source_heads: HeadRange, target: KVLayout, target_heads: HeadRange
) -> None:
    for name in ("kind", "dtype", "num_layers", "block_tokens", "key_width", "value_width"):
        here, there = getattr(source, name), getattr(target, name)
        if here != there:
            raise LayoutMismatch(f"KV layouts differ in {name}: {here} here, {there} there")
    if source_heads.total != target_heads.total:
        raise LayoutMismatch(
            f"the model has {source_heads.total} KV heads here, {target_heads.total} there"
        )
    if source.kind == "gqa":
        if source.key_width != source.value_width:
            raise LayoutMismatch("heads can be split only where keys are as wide as values")
        for layout, heads in ((source, source_heads), (target, target_heads)):
            if layout.kv_heads != heads.num_heads:
                raise LayoutMismatch(
                    f"a layout of {layout.kv_heads} KV heads does not hold {heads.num_heads}"
                )
