"""Which transport a pair of workers uses, and why. Pure: what both ends can do comes in.

With ``auto`` the first of ``PREFERENCE`` that both ends can do wins, and the next ones are there
for when it turns out not to work. Anything else allows only that one, and says what is missing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kvtransfer.carrier import Transport, TransportChoice
from protocol.errors import TransferError
from protocol.kv import KVEndpoint

Place = Literal["same process", "same host", "same NVLink domain", "elsewhere"]
"""Where the decode rank is, seen from the prefill worker. The nearest that is true."""

PREFERENCE: tuple[Transport, ...] = ("cuda_ipc", "nccl", "shm", "tcp", "nixl")
"""GPU to GPU before host memory, and one host's own means before the network's. NIXL is last: it
is offered only where an operator has asked for it."""

NEAR: frozenset[Place] = frozenset({"same process", "same host"})
_MB = 1e6
_EXPECTED: dict[Transport, tuple[float, float]] = {
    "cuda_ipc": (20_000 * _MB, 0.0),  # PCIe; NVLink and one and the same GPU give far more
    "nccl": (10_000 * _MB, 10_000 * _MB),  # a 100 Gb/s fabric
    "shm": (4_000 * _MB, 0.0),
    "tcp": (1_000 * _MB, 1_000 * _MB),  # 10 Gb/s
    "nixl": (1_000 * _MB, 1_000 * _MB),
}
FAR_BELOW = 0.25
"""Of what is expected. Less than that, and something is wrong: a wrong interface, a full one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """The prefill end. ``gpu`` and ``domain`` are empty where its blocks are in host memory."""

    host_id: str
    process_id: str
    gpu: str = ""
    domain: str = ""


class Route(NamedTuple):
    transport: Transport
    address: str
    place: Place
    reason: str  # why this one, for logs and the status command


def routes(
    choice: TransportChoice,
    endpoint: KVEndpoint,
    here: Here,
    problem: Callable[[Transport], str | None],
) -> list[Route]:
    """What to try, best first. ``problem`` says why this process cannot do a transport; it is
    asked only about those that are allowed, offered and near enough.

    Raises:
        TransferError: there is none; the message says for each one why.
    """
    place = place_of(endpoint, here)
    found: list[Route] = []
    missing: dict[Transport, str] = {}
    for transport in PREFERENCE if choice == "auto" else (choice,):
        obstacle = _obstacle(transport, endpoint, here, place) or problem(transport)
        if obstacle is not None:
            missing[transport] = obstacle
            continue
        why = f"{place}, kv.transport is {choice}" if choice != "auto" else f"{place}, auto"
        for other in (name for name in missing if name in endpoint.addresses):
            why += f"; not {other}: {missing[other]}"
        found.append(Route(transport, endpoint.addresses[transport], place, why))
    if not found:
        offered = ", ".join(sorted(endpoint.addresses)) or "nothing"
        reasons = "; ".join(f"{transport}: {why}" for transport, why in missing.items())
        raise TransferError(
            f"no KV transport to the decode rank, which offers {offered}; this worker's "
            f"kv.transport is {choice}. {reasons}"
        )
    return found


def place_of(endpoint: KVEndpoint, here: Here) -> Place:
    if endpoint.host_id == here.host_id:
        same = bool(here.process_id) and endpoint.process_id == here.process_id
        return "same process" if same else "same host"
    if here.domain and endpoint.domain == here.domain:
        return "same NVLink domain"
    return "elsewhere"


def expected_bytes_per_s(transport: Transport, place: Place) -> float:
    """What a healthy path gives at least, on ordinary hardware."""
    near, far = _EXPECTED[transport]
    return near if place in NEAR else far


def is_far_below(bytes_per_s: float, transport: Transport, place: Place) -> bool:
    return bytes_per_s < FAR_BELOW * expected_bytes_per_s(transport, place)


def _obstacle(transport: Transport, endpoint: KVEndpoint, here: Here, place: Place) -> str | None:
    of_one_host, of_gpus = transport in {"shm", "cuda_ipc"}, transport in {"cuda_ipc", "nccl"}
    obstacles = (
        (transport not in endpoint.addresses, "the decode rank does not offer it"),
        (of_one_host and place not in NEAR, "needs one host"),
        (of_gpus and not here.gpu, "this worker's blocks are not on a GPU"),
        (of_gpus and not endpoint.gpu, "the decode rank's blocks are not on a GPU"),
        (transport == "cuda_ipc" and place == "same process", "needs two processes"),
        (
            transport == "nccl" and endpoint.gpu == here.gpu,
            "NCCL needs two GPUs, and both ends use the same one",
        ),
    )
    return next((reason for stands, reason in obstacles if stands), None)
