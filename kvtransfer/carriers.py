"""Every transport there is. Their order of preference is ``kvtransfer.choice``'s."""

from collections.abc import Mapping

from kvtransfer.carrier import Carrier, Transport
from kvtransfer.nixl import NixlCarrier
from kvtransfer.shm import ShmCarrier
from kvtransfer.tcp import TcpCarrier


def make_carriers() -> Mapping[Transport, Carrier]:
    """New carriers of one process; whoever made them closes them."""
    carriers: tuple[Carrier, ...] = (ShmCarrier(), NixlCarrier(), TcpCarrier())
    return {carrier.name: carrier for carrier in carriers}
