"""Collectives of ranks on one host, through memory that they share.

``SharedRows`` is what ``engine.collectives.Backend`` asks for, in place of gloo. Operations are
begun and awaited by one thread; there is no other that moves them on. What fits the channels has
been sent when an operation has begun; the rest goes whenever this rank waits for anything. An
operation fails when a rank that it waits for leaves, dies, or is late, and then this life is over.
What the bytes are is unknown here.
"""

import time
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from engine.cpu import channels
from engine.one_host.segment import Segment
from engine.one_host.whereabouts import Mourner
from runtime.log import get_log

log = get_log(__name__)

SLICE_NS = 50_000_000  # of sleep, then deaths are looked for
LONG_S = 2.0  # a wait that is worth a line in the log
WATCH_NS = 1_000_000
_MOST_UNDER_WAY = 64

Places = Sequence[tuple[int, int]]  # address and bytes, by rank
NOTHING = (0, 0)


class _Operation:
    """Under way; ``words`` are what ``engine.cpu.channels`` knows of it."""

    def __init__(
        self,
        rows: "SharedRows",
        words: "array[int]",
        tensors: tuple[Tensor, ...],
        finish: Callable[[], object] | None,
    ) -> None:
        self.words = words
        self.address = words.buffer_info()[0]
        self._rows = rows
        self._tensors = tensors  # whose memory is read and written
        self._finish = finish

    @property
    def is_done(self) -> bool:
        return self.words[-1] == 0

    def wait(self) -> bool:
        """
        Raises:
            RuntimeError: a rank has left or is late; or this one has left.
        """
        self._rows.complete(self)
        if self._finish is not None:
            self._finish()
            self._finish = None
        self._tensors = ()
        return True


class SharedRows:
    """One rank's end. ``abort`` makes the others' waits for this rank fail at once."""

    def __init__(
        self,
        segment: Segment,
        *,
        rank: int,
        seats: Sequence[int],
        mourner: Mourner,
        timeout_s: float,
    ) -> None:
        """People are told ``seats``, which are in the order of ranks."""
        assert channels.FUTEX is not None
        self._segment: Segment | None = segment
        self._memory = segment.address
        self._ring_bytes = segment.life.ring_bytes
        self._rank = rank
        self._seats = tuple(seats)
        self._size = segment.life.size
        self._mourner = mourner
        self._timeout_s = timeout_s
        self._futex = channels.FUTEX
        self._advance, self._leave = channels.advance(), channels.leave()
        self._under_way: list[_Operation] = []
        self._addresses = array("q", [0] * _MOST_UNDER_WAY)
        self._scratch = array("q", [0] * channels.SCRATCH_WORDS)
        self._addresses_at = self._addresses.buffer_info()[0]
        self._scratch_at = self._scratch.buffer_info()[0]

    def alltoall_base(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: dist.AllToAllOptions,
    ) -> _Operation:
        return self._begin(
            _parts(input, input_split_sizes, self._size),
            _parts(output, output_split_sizes, self._size),
            (input, output),
        )

    def _allgather_base(self, output: Tensor, input: Tensor, _: AllgatherOptions) -> _Operation:
        sent = [(input.data_ptr(), input.nbytes)] * self._size
        return self._begin(sent, _parts(output, [], self._size), (input, output))

    def _reduce_scatter_base(
        self, output: Tensor, input: Tensor, _: dist.ReduceScatterOptions
    ) -> _Operation:
        parts = output.new_empty(self._size, *output.shape)
        return self._begin(
            _parts(input, [], self._size),
            _parts(parts, [], self._size),
            (input, parts),
            finish=lambda: torch.sum(parts, dim=0, out=output),
        )

    def gather(
        self,
        output_tensors: list[list[Tensor]],
        input_tensors: list[Tensor],
        opts: dist.GatherOptions,
    ) -> _Operation:
        (mine,) = input_tensors
        sent = self._only(opts.rootRank, (mine.data_ptr(), mine.nbytes))
        outputs = output_tensors[0] if self._rank == opts.rootRank else []
        received = [(part.data_ptr(), part.nbytes) for part in outputs]
        return self._begin(sent, received or [NOTHING] * self._size, (mine, *outputs))

    def broadcast(self, tensors: list[Tensor], opts: dist.BroadcastOptions) -> _Operation:
        (told,) = tensors
        place = told.data_ptr(), told.nbytes
        nothing = [NOTHING] * self._size
        if self._rank != opts.rootRank:
            return self._begin(nothing, self._only(opts.rootRank, place), (told,))
        sent = [place] * self._size
        sent[self._rank] = NOTHING
        return self._begin(sent, nothing, (told,))

    def abort(self) -> None:
        """This life is over for this rank. Calling it twice is fine."""
        if self._segment is None:
            return
        self._leave(self._memory, self._size, self._rank, self._futex)
        self._under_way.clear()
        self._mourner.close()
        self._segment = None

    def complete(self, operation: _Operation) -> None:
        """Until ``operation`` is done, and all that were begun before it."""
        if operation.is_done:
            return
        self._check()
        awaited = self._under_way.index(operation)
        began: float | None = None
        told = False
        while True:
            outcome = self._move(awaited)
            if outcome == channels.DONE:
                break
            if outcome < 0:
                raise RuntimeError(f"rank {self._seats[-1 - outcome]} has left")
            for rank in self._mourner.ended():
                self._leave(self._memory, self._size, rank, self._futex)
            now = time.monotonic()
            began = began or now
            if now > began + self._timeout_s:
                late = ", ".join(map(str, self._late(awaited)))
                raise RuntimeError(f"nothing came from rank {late} for {self._timeout_s:g} s")
            if not told and now > began + LONG_S:
                told = True
                log.warning(
                    "other ranks keep this one waiting",
                    ranks=self._late(awaited),
                    lost_after_s=self._timeout_s,
                )
        self._forget_done()
        if told and began is not None:
            log.info("the ranks that were waited for have come", s=time.monotonic() - began)

    def _begin(
        self,
        sent: Places,
        received: Places,
        tensors: tuple[Tensor, ...],
        finish: Callable[[], object] | None = None,
    ) -> _Operation:
        self._check()
        assert sent[self._rank][1] == received[self._rank][1], "a rank sends itself what it expects"
        words = array("q", [place for place, _ in sent])
        words.extend([length for _, length in sent])
        words.extend([place for place, _ in received])
        words.extend([length for _, length in received])
        words.append(sum(words[self._size : 2 * self._size]) + sum(words[3 * self._size :]))
        operation = _Operation(self, words, tensors, finish)
        self._forget_done()
        if len(self._under_way) == _MOST_UNDER_WAY:
            self.complete(self._under_way[0])
        self._under_way.append(operation)
        self._move(-1)
        return operation

    def _move(self, awaited: int) -> int:
        for number, operation in enumerate(self._under_way):
            self._addresses[number] = operation.address
        self._advance(
            self._memory,
            self._ring_bytes,
            self._size,
            self._rank,
            self._addresses_at,
            len(self._under_way),
            awaited,
            WATCH_NS,
            SLICE_NS,
            self._scratch_at,
            self._futex,
        )
        return self._scratch[channels.OUTCOME_AT]

    def _forget_done(self) -> None:
        self._under_way = [operation for operation in self._under_way if not operation.is_done]

    def _late(self, awaited: int) -> list[int]:
        """Seats that the operations up to ``awaited`` wait for."""
        size = self._size
        return [
            seat
            for rank, seat in enumerate(self._seats)
            if any(
                operation.words[size + rank] or operation.words[3 * size + rank]
                for operation in self._under_way[: awaited + 1]
            )
        ]

    def _only(self, rank: int, place: tuple[int, int]) -> list[tuple[int, int]]:
        places = [NOTHING] * self._size
        places[rank] = place
        return places

    def _check(self) -> None:
        if self._segment is None:
            raise RuntimeError("this rank has left the others")


def _parts(rows: Tensor, sizes: Sequence[int], size: int) -> Places:
    """Of contiguous ``rows``, ``sizes`` of them for each rank; empty: equally many."""
    assert rows.is_contiguous()
    if not sizes:
        part = rows.nbytes // size
        assert part * size == rows.nbytes
        first = rows.data_ptr()
        return [(first + number * part, part) for number in range(size)]
    assert sum(sizes) == rows.shape[0]
    width = rows.stride(0) * rows.element_size() if rows.shape[0] else 0
    lengths = [width * count for count in sizes]
    starts = accumulate(lengths, initial=rows.data_ptr())
    return list(zip(starts, lengths, strict=False))
