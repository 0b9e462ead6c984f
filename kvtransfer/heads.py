"""Which heads each rank of a prefill worker sends, and where they belong at the decode rank.

A tensor-parallel prefill rank holds some heads of every layer; a decode rank holds all. Inside one
block of one layer lie keys and then values, and of each the heads one after another
(``engine.kvcache.storage``), so a range of heads is two places. Latents (``mla``) have no heads:
every rank of a tensor-parallel group holds the same ones, and one rank sends them. Pure arithmetic.
"""

from typing import NamedTuple

from msgspec import structs

from kvtransfer.plan import Extent
from protocol.errors import LayoutMismatch
from protocol.kv import KVLayout, heads_of_rank


class Share(NamedTuple):
    """What one sender brings of every block of a grant: part ``part`` of ``parts`` equal ones."""

    part: int = 0
    parts: int = 1


WHOLE = Share()


def share_of_rank(rank: int, num_ranks: int, whole: KVLayout) -> Share | None:
    """What rank ``rank`` of a tensor-parallel prefill group sends to a decode rank that holds all
    heads, those of ``whole``; None where another rank sends the same.

    Raises:
        LayoutMismatch: the heads cannot be split that way.
    """
    if whole.kind == "mla":
        return WHOLE if rank == 0 else None
    held = heads_of_rank(rank, num_ranks, whole.kv_heads)
    if rank and heads_of_rank(rank - 1, num_ranks, whole.kv_heads) == held:
        return None
    return Share(held.start // len(held), whole.kv_heads // len(held))


def layout_of(share: Share, whole: KVLayout) -> KVLayout:
    """The layout of a rank that holds this share and nothing else.

    Raises:
        LayoutMismatch: there is no such share of that layout.
    """
    if share == WHOLE:
        return whole
    if whole.kind == "mla":
        raise LayoutMismatch("latents are not split: one rank sends them all")
    if not 0 <= share.part < share.parts or whole.kv_heads % share.parts:
        raise LayoutMismatch(
            f"part {share.part} of {share.parts} is no share of {whole.kv_heads} KV heads"
        )
    return structs.replace(whole, kv_heads=whole.kv_heads // share.parts)


def whole_of(share: Share, held: KVLayout) -> KVLayout:
    """The layout of a rank that holds all shares, of which ``held`` is one."""
    return structs.replace(held, kv_heads=held.kv_heads * share.parts)


def places_of(share: Share, whole: KVLayout) -> list[Extent]:
    """Where in one block of one layer of ``whole`` the share's bytes belong, in their order.

    Raises:
        LayoutMismatch: as ``layout_of``.
    """
    held = layout_of(share, whole)
    if share == WHOLE:
        return [(0, whole.layer_block_bytes)]
    keys = held.kv_heads * held.head_block_bytes
    values = held.layer_block_bytes - keys
    return [
        (share.part * keys, keys),
        (share.parts * keys + share.part * values, values),
    ]
