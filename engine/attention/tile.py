"""The arithmetic of decode attention: one query per sequence, over tiles of cached keys.

Every tile is one fixed computation, so its result does not depend on the tiles beside it. A tile
may be computed narrower than it is when the keys that are left out are masked, and this only where
it has been shown, in this process and for this shape, to give the same bits.
"""

# Shape suffixes: T tiles   G KV heads   R query heads of a KV head   X = T * G   S keys of a tile
# D row width

from dataclasses import dataclass
from functools import cache as cached

import torch
from torch import Tensor
from torch.nn import functional

from engine.exact import cancelling
from engine.kvcache.storage import LayerCache

# A wide tile wastes work on short contexts, many narrow ones must be joined. Above 128 keys the
# float32 kernels change the order of their sums with the width, so 128 can still be narrowed.
TILE_KEYS = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
WIDTH_STEP = 64
PROBE_TILES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TileForm:
    """How contexts are cut for one model on one machine."""

    keys: int  # of a whole tile, a multiple of the block's tokens
    widths: tuple[int, ...]  # that give the bits of a whole tile, ascending, ending in ``keys``
    min_tiles: int  # a product of fewer gives other bits

    def width_for(self, longest_context: int) -> int:
        return next((width for width in self.widths if width >= longest_context), self.keys)


def tile_form(cache: LayerCache, query_heads: int) -> TileForm:
    rows = cache.token_rows
    keys = max(1, TILE_KEYS[rows.dtype] // cache.block_tokens) * cache.block_tokens
    narrower = range(WIDTH_STEP, keys, WIDTH_STEP) if WIDTH_STEP % cache.block_tokens == 0 else ()
    shape = (cache.heads, query_heads // cache.heads, cache.width)
    return _form(keys, tuple(narrower), shape, rows.dtype, rows.device, torch.get_num_threads())


def attend(
    q_XRD: Tensor, keys_XSD: Tensor, values_XSD: Tensor, mask_T11S: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax-weighted values of every tile (X, R, D), and its scores (T, G, R, S) float32."""
    num_tiles, width = mask_T11S.shape[0], mask_T11S.shape[-1]
    scores_XRS = torch.bmm(q_XRD, keys_XSD.transpose(1, 2))
    scores_TGRS = scores_XRS.view(num_tiles, -1, q_XRD.shape[1], width)
    scores_TGRS = torch.add(mask_T11S, scores_TGRS, alpha=scale)
    weights_XRS = scores_TGRS.softmax(-1).to(q_XRD.dtype).view(scores_XRS.shape)
    return torch.bmm(weights_XRS, values_XSD), scores_TGRS


@cached
def _form(
    keys: int,
    narrower: tuple[int, ...],
    shape_GRD: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    _num_threads: int,
) -> TileForm:
    def same(num_tiles: int, width: int) -> bool:
        rows = _probe_rows(width - 2, shape_GRD, dtype, device)
        whole = _probe(PROBE_TILES, keys, *rows)
        part = _probe(num_tiles, width, *rows)
        return all(
            torch.equal(got, want[:num_tiles]) for got, want in zip(part, whole, strict=True)
        )

    widths = (*(width for width in narrower if same(PROBE_TILES, width)), keys)
    differing = [
        count for count in range(1, PROBE_TILES) if not all(same(count, width) for width in widths)
    ]
    return TileForm(keys=keys, widths=widths, min_tiles=1 + max(differing, default=0))


def _probe_rows(
    context: int, shape_GRD: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose results any change in the order of a sum would change."""
    heads, query_heads, row_width = shape_GRD
    lanes = PROBE_TILES * heads
    q_XRD, keys_XSD = cancelling((lanes, query_heads, row_width), (lanes, context, row_width))
    _, values_XDS = cancelling((lanes, 1, context), (lanes, row_width, context))
    rows = (q_XRD, keys_XSD, values_XDS.transpose(1, 2))
    q_XRD, keys_XSD, values_XSD = (part.to(device=device, dtype=dtype) for part in rows)
    return q_XRD, keys_XSD, values_XSD


def _probe(
    num_tiles: int, width: int, q_XRD: Tensor, keys_XSD: Tensor, values_XSD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the first tiles of the probe give: output, scores and a softmax, each (T, ...)."""
    context = keys_XSD.shape[1]
    used = num_tiles * (q_XRD.shape[0] // PROBE_TILES)
    mask_S = torch.zeros(width, device=q_XRD.device)
    mask_S[context:] = -torch.inf
    out_XRD, scores_TGRS = attend(
        q_XRD[:used],
        functional.pad(keys_XSD[:used], (0, 0, 0, width - context)),
        functional.pad(values_XSD[:used], (0, 0, 0, width - context)),
        mask_S.expand(num_tiles, 1, 1, width),
        scale=1.0,
    )
    # The scores above are next to equal, so they show nothing of how a softmax adds.
    spread_TGRS = torch.randn(
        PROBE_TILES, 1, 1, context, generator=torch.Generator().manual_seed(1)
    )
    spread_TGRS = functional.pad(spread_TGRS, (0, width - context), value=-torch.inf)
    spread_TGRS = spread_TGRS.to(q_XRD.device).softmax(-1)[:num_tiles, ..., :context]
    return out_XRD.view(num_tiles, -1), scores_TGRS[..., :context], spread_TGRS
