"""A rank's seat for libraries that connect ranks by themselves: who it is, and a way to tell all.

Libraries ask for a communicator in mpi4py's form, and only to exchange a few addresses when they
start. Those travel as rows of the group, in msgpack.
"""

from typing import Protocol

import msgspec
import torch

from engine.experts.all_to_all import RowGroup

Told = int | bytes | bytearray | None


class SeatGroup(RowGroup, Protocol):
    """What is needed of ``engine.collectives.ExpertGroup``."""

    @property
    def device(self) -> torch.device: ...


class LibrarySeat:
    """Names are mpi4py's."""

    def __init__(self, group: SeatGroup) -> None:
        self._group = group

    def Get_rank(self) -> int:  # noqa: N802
        return self._group.rank

    def Get_size(self) -> int:  # noqa: N802
        return self._group.world_size

    def allgather(self, told: Told) -> list[int | bytearray | None]:
        """What each rank told, in rank order; bytes come as a bytearray.

        Raises:
            WorkerLost: a rank is gone.
        """
        frame = msgspec.msgpack.encode(told)
        size, device = self._group.world_size, self._group.device
        ones = [1] * size
        mine_N1 = torch.full((size, 1), len(frame), dtype=torch.int64, device=device)
        lengths = self._group.exchange_rows(mine_N1, ones, ones).wait().flatten().tolist()
        rows = torch.frombuffer(bytearray(frame), dtype=torch.uint8).to(device)
        sent = [len(frame)] * size
        arrived = self._group.exchange_rows(rows.repeat(size).unsqueeze(1), sent, lengths).wait()
        whole, first, found = bytes(arrived.flatten().cpu().numpy()), 0, []
        for length in lengths:
            value = msgspec.msgpack.decode(whole[first : first + length], type=int | bytes | None)
            found.append(bytearray(value) if isinstance(value, bytes) else value)
            first += length
        return found
