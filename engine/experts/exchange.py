"""How expert rows travel: the ways there are, what each can do, and which one serves.

All ranks decide alike, before they meet, from settings and the model's sizes alone; a way that
cannot serve is refused with the rule that it breaks and what to change. Pure: no torch, and
whether an optional library is installed is told. How a way works inside is unknown here.

Sources of the libraries' rules: DeepEP's low-latency kernels (deepseek-ai/DeepEP, csrc/config.hpp
and csrc/kernels/internode_ll.cu), NCCL EP (NVIDIA/nccl-extensions 0.1.0, nccl_ep/README.md and
device/ll_ep.cuh).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from engine.experts.buffers import ExchangeShape, Payload, deepep_bytes
from protocol.errors import ConfigError

TransportName = Literal["local", "all_to_all", "padded", "all_gather", "deepep", "nccl_ep"]
TransportChoice = Literal["auto", "all_to_all", "padded", "all_gather", "deepep", "nccl_ep"]

_DEEPEP_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
_DEEPEP_MOST_TOKENS = 1024  # the tag of a message has no room for more
_DEEPEP_MOST_CHOSEN = 9
_DEEPEP_MOST_BYTES = 32 * 2**30  # of RDMA memory that can be registered together
_INSTALLED_FROM = {
    "deep_ep": "it from github.com/deepseek-ai/DeepEP",
    "nccl.ep": "headrace[nccl-ep]",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportCapabilities:
    """What a way to exchange rows can do. A limit of None is none."""

    on_cpu: bool
    on_gpu: bool
    graph_safe: bool  # fixed shapes, nothing waits on the host: a CUDA graph may capture it
    split_phase: bool  # something else may be computed while rows are on their way
    max_in_flight: int  # exchanges begun and not collected
    exact: bool  # every result can return by itself, so that the sum has one order
    payloads: frozenset[str]
    library: str | None  # what must be importable
    max_tokens_per_rank: int | None = None
    max_experts_per_token: int | None = None
    hidden_widths: tuple[int, ...] | None = None
    hidden_multiple: int = 1


_ANY = frozenset({"native", "bf16", "fp8"})
CAPABILITIES: Mapping[TransportName, TransportCapabilities] = MappingProxyType(
    {
        "local": TransportCapabilities(
            on_cpu=True,
            on_gpu=True,
            graph_safe=False,
            split_phase=False,
            max_in_flight=1,
            exact=True,
            payloads=frozenset({"native"}),
            library=None,
        ),
        "all_to_all": TransportCapabilities(
            on_cpu=True,
            on_gpu=True,
            graph_safe=False,
            split_phase=True,
            max_in_flight=2,
            exact=True,
            payloads=_ANY,
            library=None,
        ),
        "padded": TransportCapabilities(
            on_cpu=True,
            on_gpu=True,
            graph_safe=True,
            split_phase=True,
            max_in_flight=2,
            exact=True,
            payloads=_ANY,
            library=None,
        ),
        "all_gather": TransportCapabilities(
            on_cpu=True,
            on_gpu=True,
            graph_safe=True,
            split_phase=True,
            max_in_flight=2,
            exact=True,
            payloads=_ANY,
            library=None,
        ),
        "deepep": TransportCapabilities(
            on_cpu=False,
            on_gpu=True,
            graph_safe=True,
            split_phase=True,
            max_in_flight=2,  # it has two buffers
            exact=False,
            payloads=frozenset({"native", "bf16", "fp8"}),
            library="deep_ep",
            max_tokens_per_rank=_DEEPEP_MOST_TOKENS,
            max_experts_per_token=_DEEPEP_MOST_CHOSEN,
            hidden_widths=_DEEPEP_HIDDEN,
        ),
        "nccl_ep": TransportCapabilities(
            on_cpu=False,
            on_gpu=True,
            graph_safe=True,
            split_phase=True,
            max_in_flight=2,
            exact=False,
            payloads=frozenset({"native", "bf16"}),
            library="nccl.ep",
            hidden_multiple=256,
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeChoice:
    """What was set: the same on every rank. ``max_tokens_per_rank`` None: any number may come."""

    transport: TransportChoice = "auto"
    payload: Payload = "native"
    max_tokens_per_rank: int | None = None
    queue_pair_depth: int = 1024


ANY_EXCHANGE = ExchangeChoice()


def choose(
    choice: TransportChoice, shape: ExchangeShape, *, installed: Collection[str]
) -> TransportName:
    """The way that serves ``shape``; ``installed`` are the optional libraries that can be imported.

    ``auto`` takes no optional library. One rank exchanges nothing. On a CPU, and wherever results
    must be exact, rows are exchanged with exact splits. On a GPU with fast numerics they are
    gathered where a token goes to nearly all ranks anyway, so that no rank waits to learn sizes;
    else exact splits again, for steps run without a graph, and padding has a price and no gain.

    Raises:
        ConfigError: the chosen way cannot serve; every rule that it breaks is named.
    """
    if shape.num_ranks == 1:
        return "local"
    name = _automatic(shape) if choice == "auto" else choice
    broken = broken_rules(name, shape, installed=installed)
    if broken:
        raise ConfigError(f"decode.experts.transport {name}: " + "; ".join(broken))
    return name


def _automatic(shape: ExchangeShape) -> TransportName:
    bounded = shape.max_tokens_per_rank is not None
    if not shape.on_gpu or shape.numerics == "exact" or not bounded:
        return "all_to_all"
    return "all_gather" if shape.num_ranks <= shape.experts_per_token else "all_to_all"


def broken_rules(
    name: TransportName, shape: ExchangeShape, *, installed: Collection[str]
) -> list[str]:
    """What keeps ``name`` from serving ``shape``: each rule, with what to change."""
    can = CAPABILITIES[name]
    rules = [
        *_device_rules(can, shape),
        *_payload_rules(can, shape),
        *_size_rules(can, shape),
    ]
    if can.library is not None and can.library not in installed:
        rules.append(
            f"it needs the library {can.library}, which cannot be imported: install "
            f"{_INSTALLED_FROM[can.library]} on every rank, or choose another transport"
        )
    if name == "deepep" and not rules:
        rules += _deepep_buffer_rules(shape)
    return rules


def _device_rules(can: TransportCapabilities, shape: ExchangeShape) -> list[str]:
    device, able = ("cuda", can.on_gpu) if shape.on_gpu else ("cpu", can.on_cpu)
    rules = []
    if not able:
        rules.append(f"it does not run on decode.device {device}: choose all_to_all or padded")
    if shape.numerics == "exact" and not can.exact:
        rules.append(
            "it adds results up on the way, so they are not exact: set decode.model.numerics to "
            "fast, or choose all_to_all or padded"
        )
    return rules


def _payload_rules(can: TransportCapabilities, shape: ExchangeShape) -> list[str]:
    rules = []
    if shape.payload not in can.payloads:
        listed = ", ".join(sorted(can.payloads))
        rules.append(
            f"it cannot carry decode.experts.payload {shape.payload}: choose one of {listed}"
        )
    if shape.numerics == "exact" and shape.payload_rounds:
        rules.append(
            f"decode.experts.payload {shape.payload} rounds what travels, so results are not "
            "those of one rank: set it to native, or decode.model.numerics to fast"
        )
    if shape.payload == "fp8" and shape.hidden % shape.SCALED_TOGETHER:
        rules.append(
            f"decode.experts.payload fp8 scales {shape.SCALED_TOGETHER} values together and the "
            f"model's width is {shape.hidden}: set it to native or bf16"
        )
    return rules


def _size_rules(can: TransportCapabilities, shape: ExchangeShape) -> list[str]:
    rules = []
    most, tokens = can.max_tokens_per_rank, shape.max_tokens_per_rank
    if can.graph_safe and tokens is None:
        rules.append("its buffers are of fixed size and the tokens of a rank have no limit here")
    if most is not None and tokens is not None and tokens > most:
        rules.append(
            f"it carries at most {most} tokens of a rank in a step and decode.max_batch is "
            f"{tokens}: lower decode.max_batch"
        )
    chosen = can.max_experts_per_token
    if chosen is not None and shape.experts_per_token > chosen:
        rules.append(
            f"a token may choose at most {chosen} experts and the model's choose "
            f"{shape.experts_per_token}: choose another transport"
        )
    if can.hidden_widths is not None and shape.hidden not in can.hidden_widths:
        listed = ", ".join(map(str, can.hidden_widths))
        rules.append(
            f"it is compiled for widths {listed} and the model's is {shape.hidden}: choose another "
            "transport"
        )
    if shape.hidden % can.hidden_multiple:
        rules.append(
            f"it carries widths that are multiples of {can.hidden_multiple} and the model's is "
            f"{shape.hidden}: choose another transport"
        )
    if (can.on_cpu, can.on_gpu) == (False, True) and shape.element_bytes != 2:  # noqa: PLR2004
        rules.append("it carries bfloat16 rows only: set decode.model.dtype to bfloat16")
    return rules


def _deepep_buffer_rules(shape: ExchangeShape) -> list[str]:
    assert shape.max_tokens_per_rank is not None
    rules = []
    # Two messages a token and two to end with must be under way without waiting for room.
    depth = 2 * (shape.max_tokens_per_rank + 1)
    if depth > shape.queue_pair_depth:
        rules.append(
            f"{shape.max_tokens_per_rank} tokens of a rank need NVSHMEM queue pairs of {depth} "
            f"entries and decode.experts.queue_pair_depth is {shape.queue_pair_depth}: set it and "
            f"NVSHMEM_QP_DEPTH to {1 << (depth - 1).bit_length()} on every rank, or lower "
            "decode.max_batch"
        )
    needed = deepep_bytes(shape)
    if needed < _DEEPEP_MOST_BYTES:
        return rules
    return [
        *rules,
        f"its buffers would take {needed / 2**30:.1f} GiB for {shape.num_slots} expert slots and "
        f"{shape.max_tokens_per_rank} tokens a rank, and fewer than 32 GiB can be registered: "
        "lower decode.max_batch or decode.experts.redundant",
    ]
