"""One rank's computing of a step, pushing each group of layers while the next one computes.

Every rank of a prefill worker does the same, each with its own heads. What becomes of the result,
and how pushes come about, is unknown here.

Shape suffixes: R rows whose logits are wanted   D hidden
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.model_runner import ModelRunner, SequenceStep, batch_from
from prefill.lockstep import Part
from prefill.scheduler import Chunk

SendLayers = Callable[[Part, range], None]


def part_of(chunk: Chunk, *, scored: bool) -> Part:
    return Part(
        ref=chunk.ref,
        start=chunk.start,
        token_ids=chunk.token_ids,
        blocks=(*chunk.table.blocks[: chunk.first_block], *chunk.source_blocks),
        first_block=chunk.first_block,
        final=chunk.final,
        scored=scored,
    )


class Forward:
    def __init__(self, runner: ModelRunner, *, layers_per_push: int, device: torch.device) -> None:
        self._runner = runner
        self._layers_per_push = layers_per_push
        self._device = device

    def hidden(self, parts: Sequence[Part], send: SendLayers) -> Tensor:
        """(R, D) of the rows that ``parts`` ask for, in their order. ``send`` is called for each
        part when a range of layers is final in the cache.

        Raises:
            WorkerLost: a rank that shares the layers failed; the step is lost.
        """
        layout = self._runner.storage.layout
        batch = batch_from(
            [
                SequenceStep(
                    token_ids=part.token_ids,
                    start=part.start,
                    block_table=part.blocks,
                    wants_logits=part.final,
                    wants_every_row=part.scored,
                )
                for part in parts
            ],
            block_tokens=layout.block_tokens,
            device=self._device,
        )
        pushed = 0

        def after_layer(layer: int) -> None:
            nonlocal pushed
            done = layer + 1
            if done - pushed < self._layers_per_push and done < layout.num_layers:
                return
            layers, pushed = range(pushed, done), done
            for part in parts:
                send(part, layers)

        return self._runner.run_hidden(batch, after_layer)

    def logits(self, x_RD: Tensor) -> Tensor:
        """(R, V) of rows that ``hidden`` gave."""
        return self._runner.logits(x_RD)
