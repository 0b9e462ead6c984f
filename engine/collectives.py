"""The ranks of one decode worker, seen from one of them.

``ExpertGroup`` is what MoE layers hold for life: it stays the same object when the processes
behind the other ranks change. What is computed is unknown here.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from protocol.errors import WorkerLost


class ExpertGroup:
    """One rank's seat among the ranks that share the experts.

    One rank alone needs no process group. More ranks exchange rows only between ``connect`` and
    ``disconnect``, and only in a step that ``begin_step`` has announced.
    """

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._process_group: dist.ProcessGroup | None = None
        self._tokens_of_rank: tuple[int, ...] = ()

    @classmethod
    def single(cls, device: torch.device) -> "ExpertGroup":
        return cls(rank=0, world_size=1, device=device)

    def connect(self, process_group: dist.ProcessGroup) -> None:
        self._process_group = process_group

    def disconnect(self) -> None:
        self._process_group = None
        self._tokens_of_rank = ()

    @property
    def process_group(self) -> dist.ProcessGroup:
        """
        Raises:
            WorkerLost: the ranks are not connected, or no longer.
        """
        if self._process_group is None:
            raise WorkerLost("the ranks of this decode worker are not connected", stage="decode")
        return self._process_group

    def begin_step(self, tokens_of_rank: Sequence[int]) -> None:
        """Say how many tokens each rank brings to every MoE layer of the step that now starts.

        All ranks must say the same: it decides the shape of every exchange.
        """
        assert len(tokens_of_rank) == self.world_size
        self._tokens_of_rank = tuple(tokens_of_rank)

    @property
    def tokens_of_rank(self) -> tuple[int, ...]:
        return self._tokens_of_rank
