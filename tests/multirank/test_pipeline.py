"""Prefill ranks in stages: each has some layers, and together they give the reference's logits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.backends import RowsChoice
from engine.kvcache.storage import KVStorage
from engine.loading import DtypeChoice, load
from engine.model_runner import ModelRunner
from engine.rendezvous import Rendezvous
from prefill.forward import Forward
from prefill.lockstep import Part
from prefill.place import Place
from prefill.settings import PrefillGroupSettings
from protocol.ids import AttemptRef, BlockId, RequestId
from tests.multirank.test_tensor_parallel import (
    ATOL,
    BLOCK_TOKENS,
    CHUNK,
    CPU,
    LENGTHS,
    RTOL,
    reference,
    sequences,
)
from tests.support.ranks import TIMEOUT_S, Parent, free_address, start_rank

__all__ = ["reference"]
pytestmark = pytest.mark.multirank
FIRST_BLOCK = 4  # of each sequence so many blocks after the one before


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    ranks: int
    stages: int
    rows: RowsChoice = "auto"
    dtype: DtypeChoice = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Of one rank: its layers and heads, what it said is final, and rank 0's logits by sequence."""

    layers: range
    kv_heads: int
    sent: list[tuple[int, range]]
    logits: list[Tensor]


def parts() -> Iterator[list[Part]]:
    """What enters at each tick: chunks of all sequences that still have some; then nothing."""
    texts = sequences()
    for start in range(0, max(LENGTHS), CHUNK):
        entering = [which for which, text in enumerate(texts) if start < len(text)]
        yield [part_of(texts, which, start) for which in entering]


def part_of(texts: list[list[int]], which: int, start: int) -> Part:
    ids = tuple(texts[which][start : start + CHUNK])
    blocks = -(-(start + len(ids)) // BLOCK_TOKENS)
    return Part(
        ref=AttemptRef(RequestId(str(which)), 1),
        start=start,
        token_ids=ids,
        blocks=tuple(BlockId(FIRST_BLOCK * which + block) for block in range(blocks)),
        first_block=start // BLOCK_TOKENS,
        final=start + len(ids) == len(texts[which]),
        scored=which != 1,  # the last token's alone
    )


def run_stage(rank: int, address: str, width: Width, folder: Path, parent: Parent) -> None:
    group = PrefillGroupSettings(rank=rank, ranks=width.ranks, stages=width.stages)
    place = Place.of(group, CPU)
    loaded = load(
        folder,
        device=CPU,
        dtype=width.dtype,
        numerics="exact",
        group=place.sharing,
        tensor_parallel=True,
        stage=place.stage,
        block_tokens=BLOCK_TOKENS,
    )
    storage = KVStorage(loaded.held, 16, device=CPU, first_layer=loaded.layers.start)
    forward = Forward(
        ModelRunner(loaded.model, storage),
        layers_per_push=1,
        device=CPU,
        relay=place.relay(hidden=loaded.config.hidden_width, dtype=loaded.dtype),
    )
    rendezvous = Rendezvous(
        place.ranks,
        address,
        collective_timeout_s=TIMEOUT_S,
        rows=width.rows,
        circle=place.circle,
    )
    life = rendezvous.form(deadline_s=TIMEOUT_S)
    sent: list[tuple[int, range]] = []
    found: list[list[Tensor]] = [[] for _ in LENGTHS]
    entered = [*parts(), *([[]] * (width.stages - 1))]
    for tick, entering in enumerate(entered):
        x_RD = forward.advance(
            entering, lambda part, layers: sent.append((int(part.ref.request_id), layers))
        )
        if rank == 0 and tick >= width.stages - 1:
            left = entered[tick - width.stages + 1]
            rows = forward.logits(x_RD).split([part.num_rows for part in left])
            for part, rows_RV in zip(left, rows, strict=True):
                found[int(part.ref.request_id)].append(rows_RV)
    assert not forward.busy
    life.exchange([0])
    logits = [torch.cat(rows) for rows in found] if rank == 0 else []
    parent.send(
        Found(layers=loaded.layers, kv_heads=loaded.held.kv_heads, sent=sent, logits=logits)
    )
    parent.receive()


def run_stages(width: Width, folder: Path) -> list[Found]:
    address = free_address()
    ranks = [start_rank(run_stage, rank, address, width, folder) for rank in range(width.ranks)]
    try:
        return [rank.receive() for rank in ranks]
    finally:
        for rank in ranks:
            rank.stop()


CASES = [
    ("llama", Width(ranks=2, stages=2)),
    ("deepseek_v3", Width(ranks=4, stages=2)),
    *(
        pytest.param(kind, width, marks=pytest.mark.slow)
        for kind, width in (
            ("deepseek_v3", Width(ranks=3, stages=3)),
            ("qwen3_moe", Width(ranks=4, stages=2)),
            ("mixtral", Width(ranks=2, stages=2)),
            ("llama", Width(ranks=4, stages=2)),
        )
    ),
]


@pytest.mark.parametrize(("kind", "width"), CASES)
def test_stages_give_the_reference_logits_of_every_chunk(
    kind: str,
    width: Width,
    tiny_checkpoint: Callable[[str], Path],
    reference: Callable[[str], list[Tensor]],
) -> None:
    found = run_stages(width, tiny_checkpoint(kind))
    for got_NV, wanted_NV in zip(found[0].logits, reference(kind), strict=True):
        torch.testing.assert_close(got_NV, wanted_NV, rtol=RTOL, atol=ATOL)
    of_stage = [found[first] for first in range(0, width.ranks, width.ranks // width.stages)]
    layers = [layer for each in of_stage for layer in each.layers]
    assert layers == list(range(len(layers))), "each stage goes on where the one before it ends"
    chunks = [-(-length // CHUNK) for length in LENGTHS]
    for each in found:
        for which, count in enumerate(chunks):
            told = [layers.start for sequence, layers in each.sent if sequence == which]
            assert told == [*each.layers] * count, "each layer of each chunk is final once"


@pytest.mark.parametrize(
    ("rows", "dtype"), [("shared_memory", "float32"), ("gloo", "bfloat16")], ids=str
)
def test_stages_of_one_rank_give_the_same_bits_as_one_rank_with_all_layers(
    rows: RowsChoice, dtype: DtypeChoice, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    (alone,) = run_stages(Width(ranks=1, stages=1, dtype=dtype), folder)
    first, _ = run_stages(Width(ranks=2, stages=2, rows=rows, dtype=dtype), folder)
    for got, wanted in zip(first.logits, alone.logits, strict=True):
        assert torch.equal(got, wanted)
