"""Every transport there is, in the order in which ``auto`` prefers them."""

from collections.abc import Mapping

from kvtransfer.carrier import Carrier, Transport
from kvtransfer.nixl import NixlCarrier
from kvtransfer.shm import ShmCarrier
from kvtransfer.tcp import TcpCarrier

TRANSPORTS: tuple[Transport, ...] = ("shm", "nixl", "tcp")


def make_carriers() -> Mapping[Transport, Carrier]:
    """New carriers of one process; whoever made them closes them."""
    carriers: tuple[Carrier, ...] = (ShmCarrier(), NixlCarrier(), TcpCarrier())
    return {carrier.name: carrier for carrier in carriers}
