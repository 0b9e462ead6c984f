"""Runs of blocks copied from one pool to another, past the caches where blocks are whole lines."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvtransfer.interface import KVMemory
from kvtransfer.memory import buffer
from kvtransfer.plan import Chunk, Extent, Run
from kvtransfer.streaming import LINE_BYTES, row_copier


class RunCopier:
    """``places`` say where in each of the target's blocks of a layer the source's belongs."""

    def __init__(self, source: KVMemory, target: KVMemory, places: Sequence[Extent]) -> None:
        self._source, self._target = source, target
        self._places = places
        self._source_unit = source.layout.layer_block_bytes
        self._target_unit = target.layout.layer_block_bytes
        self._whole = len(places) == 1
        self._source_rows, self._target_rows = _rows(source), _rows(target)
        numbers = [source.address, target.address, self._source_unit, self._target_unit]
        numbers += [number for place in places for number in place]
        lines = all(number % LINE_BYTES == 0 for number in numbers)
        self._stream = row_copier() if lines else None

    def copy(self, chunk: Chunk, runs: Sequence[Run]) -> None:
        """The chunk's layers of these runs; layers and blocks are in range."""
        for run in runs:
            if not self._whole:
                self._copy_places(chunk, run)
            elif self._stream is None:
                self._copy_plainly(chunk, run, (0, 0, self._source_unit))
            else:
                self._stream(
                    self._at(self._target, chunk.first_layer, run.target),
                    self._at(self._source, chunk.first_layer, run.source),
                    run.length * self._source_unit,
                    self._target.num_blocks * self._target_unit,
                    self._source.num_blocks * self._source_unit,
                    chunk.num_layers,
                )

    def _copy_places(self, chunk: Chunk, run: Run) -> None:
        here = 0
        for there, length in self._places:
            if self._stream is None:
                self._copy_plainly(chunk, run, (here, there, length))
            else:
                for layer in range(chunk.first_layer, chunk.first_layer + chunk.num_layers):
                    self._stream(
                        self._at(self._target, layer, run.target) + there,
                        self._at(self._source, layer, run.source) + here,
                        length,
                        self._target_unit,
                        self._source_unit,
                        run.length,
                    )
            here += length

    def _copy_plainly(self, chunk: Chunk, run: Run, strip: tuple[int, int, int]) -> None:
        here, there, length = strip
        targets, sources = _layers(self._target, chunk), _layers(self._source, chunk)
        target, source = (slice(block, block + run.length) for block in (run.target, run.source))
        np.copyto(
            self._target_rows[targets, target, there : there + length],
            self._source_rows[sources, source, here : here + length],
        )

    @staticmethod
    def _at(memory: KVMemory, layer: int, block: int) -> int:
        block_number = (layer - memory.first_layer) * memory.num_blocks + block
        return memory.address + block_number * memory.layout.layer_block_bytes


def _layers(memory: KVMemory, chunk: Chunk) -> slice:
    """Where the chunk's layers are among those that this memory holds."""
    first = chunk.first_layer - memory.first_layer
    return slice(first, first + chunk.num_layers)


def _rows(memory: KVMemory) -> npt.NDArray[np.uint8]:
    """(layers, blocks, bytes of a block of a layer)."""
    layout = memory.layout
    shape = (layout.num_layers, memory.num_blocks, layout.layer_block_bytes)
    return np.frombuffer(buffer(memory), np.uint8).reshape(shape)
