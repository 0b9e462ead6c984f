"""One rank's computing of what is at its stage, pushing each group of layers while the next one
computes.

Every rank of a stage does the same, each with its own heads, and hands the rows to the next stage.
What becomes of the result, and how pushes come about, is unknown here.

Shape suffixes: R rows whose logits are wanted   N tokens   D hidden
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.model_runner import ModelRunner, SequenceStep, batch_from
from engine.pipeline import ALL_LAYERS, Relay
from prefill.flow import Flow
from prefill.lockstep import Part
from prefill.scheduler import Chunk

SendLayers = Callable[[Part, range], None]


def part_of(chunk: Chunk) -> Part:
    return Part(
        ref=chunk.ref,
        start=chunk.start,
        token_ids=chunk.token_ids,
        blocks=(*chunk.table.blocks[: chunk.first_block], *chunk.source_blocks),
        first_block=chunk.first_block,
        final=chunk.final,
        scored=chunk.scored,
    )


class Forward:
    """``relay`` None: this rank has all layers."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        layers_per_push: int,
        device: torch.device,
        relay: Relay | None = None,
    ) -> None:
        self._runner = runner
        self._layers_per_push = layers_per_push
        self._device = device
        self._relay = relay
        self._stage = ALL_LAYERS if relay is None else relay.stage
        self._flow: Flow[Sequence[Part]] = Flow(self._stage.count)
        self._arrived_ND: Tensor | None = None

    @property
    def busy(self) -> bool:
        """Some stage has still to compute what was given before."""
        return self._flow.busy

    def advance(self, parts: Sequence[Part], send: SendLayers) -> Tensor:
        """Give ``parts`` to the first stage, and compute what is at this rank's, which may be
        nothing. All ranks call it with the same parts.

        Returns (R, D) of the parts that have passed the last stage, for rank 0: those that were
        given as many calls ago as there are further stages. ``send`` is called for each part when
        a range of this stage's layers is final in the cache.

        Raises:
            WorkerLost: a rank that shares layers or has others failed; what is on its way is lost.
        """
        if self._relay is None:
            return self._hidden(parts, send)
        self._flow.enter(parts)
        mine = self._flow.at(self._stage.index)
        out = self._hidden(mine, send, self._arrived_ND) if mine else None
        before = () if self._stage.is_first else self._flow.at(self._stage.index - 1)
        left = self._flow.leave()
        if self._stage.is_first:
            return self._relay.pass_on(out, sum(part.num_rows for part in left or ()))
        arriving = sum(len(part.token_ids) for part in before or ())
        self._arrived_ND = self._relay.pass_on(out, arriving)
        return self._arrived_ND

    def forget(self) -> None:
        """What is on its way through the stages goes no further."""
        self._flow.take_all()

    def logits(self, x_RD: Tensor) -> Tensor:
        """(R, V) of rows that ``advance`` gave; for rank 0."""
        return self._runner.logits(x_RD)

    def _hidden(
        self, parts: Sequence[Part], send: SendLayers, arrived_ND: Tensor | None = None
    ) -> Tensor:
        storage = self._runner.storage
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
            block_tokens=storage.layout.block_tokens,
            device=self._device,
        )
        pushed = storage.first_layer
        end = pushed + storage.layout.num_layers

        def after_layer(layer: int) -> None:
            nonlocal pushed
            done = layer + 1
            if done - pushed < self._layers_per_push and done < end:
                return
            layers, pushed = range(pushed, done), done
            for part in parts:
                send(part, layers)

        return self._runner.run_hidden(batch, after_layer, arrived_ND)
