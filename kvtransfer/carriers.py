"""Every transport there is. Their order of preference is ``kvtransfer.choice``'s."""

import importlib
from collections.abc import Mapping

from kvtransfer.carrier import Carrier, Transport
from kvtransfer.nixl import NixlCarrier
from kvtransfer.shm import ShmCarrier
from kvtransfer.tcp import TcpCarrier


def make_carriers(*, gpu: bool = False) -> Mapping[Transport, Carrier]:
    """New carriers of one process; whoever made them closes them. Those of a GPU, and torch with
    them, are loaded only for blocks on one.
    """
    carriers: tuple[Carrier, ...] = (ShmCarrier(), NixlCarrier(), TcpCarrier())
    if gpu:
        cuda_ipc = importlib.import_module("kvtransfer.cuda_ipc")
        nccl = importlib.import_module("kvtransfer.nccl")
        carriers += (cuda_ipc.CudaIpcCarrier(), nccl.NcclCarrier())
    return {carrier.name: carrier for carrier in carriers}
