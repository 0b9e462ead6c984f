"""The exchange of expert rows that a rank's layers share, made from what was chosen.

Optional libraries are imported here, when they were chosen, and nowhere else. What the ways are and
when each may serve is ``engine.experts.exchange``'s business.
"""

from dataclasses import dataclass
from importlib.util import find_spec

from engine.collectives import ExpertGroup
from engine.experts.all_to_all import AllToAllTransport
from engine.experts.buffers import ExchangeShape, Payload, buffer_bytes
from engine.experts.exchange import CAPABILITIES, TransportChoice, TransportName, choose
from engine.experts.fixed_size import FixedSizeTransport
from engine.experts.meter import ExchangeMeter
from engine.experts.transport import ExpertTransport, LocalTransport, OwnSlotsTransport
from engine.experts.workspaces import Workspaces
from runtime.log import get_log

log = get_log(__name__)

_BY_THEMSELVES = ("local", "deepep", "nccl_ep")  # need no help with what travels


@dataclass(frozen=True, slots=True, kw_only=True)
class RowExchange:
    name: TransportName
    transport: ExpertTransport
    payload: Payload
    meter: ExchangeMeter

    @property
    def allows_two_batches(self) -> bool:
        """Whether one batch may compute while another's rows travel."""
        can = CAPABILITIES[self.name]
        return can.split_phase and can.max_in_flight >= 2  # noqa: PLR2004


def make_exchange(choice: TransportChoice, group: ExpertGroup, shape: ExchangeShape) -> RowExchange:
    """Buffers of fixed size are allocated; one line in the log says what serves and how large.

    Raises:
        ConfigError: what was chosen cannot serve; nothing was allocated.
    """
    name = choose(choice, shape, installed=installed_libraries())
    in_flight = CAPABILITIES[name].max_in_flight
    needed = buffer_bytes(name, shape, in_flight=in_flight)
    transport: ExpertTransport
    if name == "local":
        transport = LocalTransport()
    elif name in ("padded", "all_gather"):
        workspaces = Workspaces(name, shape, in_flight=in_flight, device=group.device)
        transport = FixedSizeTransport(name, group, shape, workspaces)
    elif name == "deepep":
        from engine.experts.deepep import deepep_transport

        transport = deepep_transport(group, shape)
    elif name == "nccl_ep":
        from engine.experts.nccl_ep import nccl_ep_transport

        transport = nccl_ep_transport(group, shape)
    else:
        transport = AllToAllTransport(group, slots_per_rank=shape.slots_per_rank)
    if name != "local":
        _tell(name, shape, needed)
    return RowExchange(
        name=name,
        transport=transport,
        payload="native" if name in _BY_THEMSELVES else shape.payload,
        meter=ExchangeMeter(group.device, transport=name, buffer_bytes=needed),
    )


def _tell(name: TransportName, shape: ExchangeShape, buffer_bytes: int) -> None:
    log.info(
        "exchange of expert rows",
        transport=name,
        payload=shape.payload,
        ranks=shape.num_ranks,
        slots_per_rank=shape.slots_per_rank,
        max_tokens_per_rank=shape.max_tokens_per_rank,
        buffer_bytes=buffer_bytes,
    )


def exact_splits(group: ExpertGroup, *, slots_per_rank: int) -> RowExchange:
    """Rows as they are, over an all-to-all with exact splits; for a rank alone, not at all."""
    alone = group.num_seats == 1
    return RowExchange(
        name="local" if alone else "all_to_all",
        transport=(
            LocalTransport() if alone else AllToAllTransport(group, slots_per_rank=slots_per_rank)
        ),
        payload="native",
        meter=ExchangeMeter(group.device),
    )


def own_slots(group: ExpertGroup, *, slots_per_rank: int) -> RowExchange:
    """No exchange: all ranks of ``group`` have the same tokens."""
    return RowExchange(
        name="local",
        transport=OwnSlotsTransport(rank=group.seat, slots_per_rank=slots_per_rank),
        payload="native",
        meter=ExchangeMeter(group.device),
    )


def installed_libraries() -> frozenset[str]:
    """Those of the optional libraries that could be imported."""
    wanted = {can.library for can in CAPABILITIES.values() if can.library is not None}
    return frozenset(name for name in wanted if _is_there(name))


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it is part of
        return False
