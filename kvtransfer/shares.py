"""Which heads and layers each rank of a prefill worker sends, and where they belong at the decode
rank.

A prefill rank holds some heads of some layers; a decode rank holds all. Inside one block of one
layer lie keys and then values, and of each the heads one after another
(``engine.kvcache.storage``), so a range of heads is two places. Latents (``mla``) have no heads:
ranks that share a layer hold the same ones, and one of them sends them. Layers are numbered as in
the model, whoever holds them. Pure arithmetic.
"""

from typing import NamedTuple

from msgspec import structs

from kvtransfer.plan import Extent
from protocol.errors import LayoutMismatch
from protocol.kv import KVLayout, heads_of_rank, layers_of_stage


class Share(NamedTuple):
    """What one sender brings of a grant: of every block part ``part`` of ``parts`` equal ones, in
    the layers of stage ``stage`` of ``stages``.
    """

    part: int = 0
    parts: int = 1
    stage: int = 0
    stages: int = 1

    @property
    def senders(self) -> int:
        """How many bring the others, this one included."""
        return self.parts * self.stages


WHOLE = Share()


def share_of_rank(
    rank: int, num_ranks: int, whole: KVLayout, *, num_stages: int = 1
) -> Share | None:
    """What rank ``rank`` of a prefill worker sends to a decode rank that holds ``whole``; None
    where another rank sends the same. Ranks of one stage are neighbours.

    Raises:
        LayoutMismatch: the heads or the layers cannot be split that way.
    """
    width = num_ranks // num_stages
    stage, seat = divmod(rank, width)
    layers_of_stage(stage, num_stages, whole.num_layers)
    if whole.kind == "mla":
        return Share(stage=stage, stages=num_stages) if seat == 0 else None
    held = heads_of_rank(seat, width, whole.kv_heads)
    if seat and heads_of_rank(seat - 1, width, whole.kv_heads) == held:
        return None
    return Share(held.start // len(held), whole.kv_heads // len(held), stage, num_stages)


def layers_of(share: Share, whole: KVLayout) -> range:
    """
    Raises:
        LayoutMismatch: there is no such share of that layout.
    """
    return layers_of_stage(share.stage, share.stages, whole.num_layers)


def layout_of(share: Share, whole: KVLayout) -> KVLayout:
    """The layout of a rank that holds this share and nothing else.

    Raises:
        LayoutMismatch: there is no such share of that layout.
    """
    num_layers = len(layers_of(share, whole))
    if whole.kind == "mla" and share.parts > 1:
        raise LayoutMismatch("latents are not split: one rank sends them all")
    if not 0 <= share.part < share.parts or whole.kv_heads % share.parts:
        raise LayoutMismatch(
            f"part {share.part} of {share.parts} is no share of {whole.kv_heads} KV heads"
        )
    return structs.replace(whole, kv_heads=whole.kv_heads // share.parts, num_layers=num_layers)


def places_of(share: Share, whole: KVLayout) -> list[Extent]:
    """Where in one block of one layer of ``whole`` the share's bytes belong, in their order.

    Raises:
        LayoutMismatch: as ``layout_of``.
    """
    held = layout_of(share, whole)
    if share.parts == 1:
        return [(0, whole.layer_block_bytes)]
    keys = held.kv_heads * held.head_block_bytes
    values = held.layer_block_bytes - keys
    return [
        (share.part * keys, keys),
        (share.parts * keys + share.part * values, values),
    ]
