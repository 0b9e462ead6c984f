"""Which way expert rows travel, what is refused with which words, and how many bytes it takes."""

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.experts.buffers import ExchangeShape, buffer_bytes, deepep_bytes
from engine.experts.exchange import (
    CAPABILITIES,
    TransportChoice,
    TransportName,
    choose,
)
from engine.experts.rows import columns_of, row_bytes
from engine.experts.workspaces import Workspaces
from protocol.errors import ConfigError

# DeepSeek-R1 on 72 GPUs, four slots each.
R1 = ExchangeShape(
    num_ranks=72,
    slots_per_rank=4,
    experts_per_token=8,
    hidden=7168,
    element_bytes=2,
    max_tokens_per_rank=128,
    numerics="fast",
    on_gpu=True,
)
LIBRARIES = ("deep_ep", "nccl.ep")
PAGE = Path(__file__).parents[3] / "docs" / "wide-ep.md"


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        (replace(R1, num_ranks=1), "local"),
        (replace(R1, on_gpu=False, numerics="exact"), "all_to_all"),
        (replace(R1, on_gpu=False), "all_to_all"),
        (replace(R1, numerics="exact"), "all_to_all"),
        (replace(R1, max_tokens_per_rank=None), "all_to_all"),
        (replace(R1, num_ranks=8), "all_gather"),
        (R1, "all_to_all"),
    ],
    ids=[
        "one rank",
        "cpu",
        "cpu, fast",
        "gpu, exact",
        "no limit of tokens",
        "no more ranks than experts of a token",
        "a rack",
    ],
)
def test_auto_follows_from_device_numerics_and_sizes(
    shape: ExchangeShape, wanted: TransportName
) -> None:
    assert choose("auto", shape, installed=LIBRARIES) == wanted
    assert choose("auto", shape, installed=()) == wanted


@pytest.mark.parametrize(
    ("choice", "shape", "installed", "rule"),
    [
        ("deepep", R1, (), "needs the library deep_ep.*install it from .*DeepEP"),
        ("nccl_ep", R1, (), "needs the library nccl.ep.*install headrace.nccl-ep."),
        ("deepep", replace(R1, hidden=6656), LIBRARIES, "widths 2048, .* the model's is 6656"),
        ("deepep", replace(R1, experts_per_token=10), LIBRARIES, "at most 9 experts"),
        ("deepep", replace(R1, max_tokens_per_rank=1025), LIBRARIES, "at most 1024.*max_batch"),
        (
            "deepep",
            replace(R1, max_tokens_per_rank=512),
            LIBRARIES,
            "1026 entries.*QP_DEPTH to 2048",
        ),
        (
            "deepep",
            replace(R1, max_tokens_per_rank=500, slots_per_rank=20),
            LIBRARIES,
            "GiB.*lower decode.max_batch",
        ),
        ("deepep", replace(R1, numerics="exact"), LIBRARIES, "numerics to fast"),
        ("deepep", replace(R1, on_gpu=False), LIBRARIES, "does not run on decode.device cpu"),
        ("deepep", replace(R1, element_bytes=4), LIBRARIES, "decode.model.dtype to bfloat16"),
        ("nccl_ep", replace(R1, payload="fp8"), LIBRARIES, "cannot carry .* choose one of bf16"),
        ("nccl_ep", replace(R1, hidden=2880), LIBRARIES, "multiples of 256 .* 2880"),
        ("padded", replace(R1, max_tokens_per_rank=None), (), "no limit"),
        ("all_to_all", replace(R1, numerics="exact", payload="fp8"), (), "set it to native"),
        (
            "all_to_all",
            replace(R1, numerics="exact", payload="bf16", element_bytes=4),
            (),
            "set it to native",
        ),
        ("padded", replace(R1, payload="fp8", hidden=7200), (), "scales 128 values .* 7200"),
    ],
)
def test_a_way_that_cannot_serve_is_refused_with_the_rule_and_the_fix(
    choice: TransportChoice, shape: ExchangeShape, installed: Collection[str], rule: str
) -> None:
    with pytest.raises(ConfigError, match=rf"decode.experts.transport {choice}: .*{rule}"):
        choose(choice, shape, installed=installed)


def test_every_broken_rule_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        choose("deepep", replace(R1, hidden=100, experts_per_token=12), installed=())
    assert all(word in str(refused.value) for word in ("deep_ep", "widths", "at most 9"))


@pytest.mark.parametrize("choice", ["deepep", "nccl_ep"])
def test_a_rack_may_use_the_libraries(choice: TransportChoice) -> None:
    assert choose(choice, R1, installed=LIBRARIES) == choice


def test_a_payload_that_does_not_round_is_exact() -> None:
    shape = replace(R1, numerics="exact", payload="bf16")
    assert choose("padded", shape, installed=()) == "padded"


@pytest.mark.parametrize("name", ["padded", "all_gather"])
@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("payload", ["native", "bf16", "fp8"])
def test_what_is_computed_is_what_is_allocated(name: str, numerics: str, payload: str) -> None:
    shape = ExchangeShape(
        num_ranks=9,
        slots_per_rank=3,
        experts_per_token=5,
        hidden=384,
        element_bytes=4,
        max_tokens_per_rank=11,
        numerics=numerics,  # type: ignore[arg-type]
        payload=payload,  # type: ignore[arg-type]
    )
    workspaces = Workspaces(name, shape, in_flight=2, device=torch.device("cpu"))
    assert workspaces.nbytes == buffer_bytes(name, shape, in_flight=2)


def test_a_computed_row_is_a_packed_row() -> None:
    values = torch.zeros(1, 384, dtype=torch.float8_e4m3fn)
    parts = (values, torch.zeros(1, 3), torch.zeros(1, 5), torch.zeros(1, 5, dtype=torch.int32))
    shape = replace(R1, hidden=384, experts_per_token=5, payload="fp8")
    assert row_bytes(columns_of(parts)) == shape.dispatch_row_bytes


def test_a_rank_alone_needs_no_buffers() -> None:
    assert buffer_bytes("local", replace(R1, num_ranks=1)) == 0


def test_replicas_and_empty_slots_count_in_deepeps_memory() -> None:
    more = replace(R1, slots_per_rank=5)
    assert deepep_bytes(more) > 1.2 * deepep_bytes(R1)
    # Two buffers, each to send and to receive a combine message for every slot and token.
    message = 2 * 7168 + 56 * 4
    assert 0 < deepep_bytes(R1) - 2 * 2 * 288 * 128 * message < 10_000_000


def test_only_what_sums_on_the_way_is_not_exact() -> None:
    assert {name for name, can in CAPABILITIES.items() if not can.exact} == {"deepep", "nccl_ep"}


def test_the_documented_bytes_are_those_that_are_computed() -> None:
    ways = [("fast", "native"), ("fast", "fp8"), ("exact", "native")]
    rows = re.findall(r"^\| `(\w+)`[^|]*\|((?: [^|]*GB \|| - \|){3})$", PAGE.read_text(), re.M)
    assert {name for name, _ in rows} == CAPABILITIES.keys() - {"local"}
    for name, cells in rows:
        for (numerics, payload), told in zip(ways, cells.split("|"), strict=False):
            if told.strip() == "-":
                continue
            shape = replace(R1, numerics=numerics, payload=payload)  # type: ignore[arg-type]
            assert told.strip() == f"{buffer_bytes(name, shape) / 1e9:.2f} GB"


def test_the_documented_abilities_are_those_of_the_records() -> None:
    row = r"^\| `(\w+)` \|[^|]*\|[^|]*\| (\w+)[^|]*\| (\w+)[^|]*\| ([^|]*) \|$"
    rows = re.findall(row, PAGE.read_text(), re.M)
    told = {name: (exact == "yes", graph == "yes", places) for name, exact, graph, places in rows}
    assert told == {
        name: (can.exact, can.graph_safe, "CPU, GPU" if can.on_cpu else "GPU")
        for name, can in CAPABILITIES.items()
        if name != "local"
    }


def test_a_third_exchange_at_once_is_refused_and_a_new_life_starts_afresh() -> None:
    shape = replace(R1, hidden=8, max_tokens_per_rank=1, num_ranks=2)
    workspaces = Workspaces("padded", shape, in_flight=2, device=torch.device("cpu"))
    first, second = workspaces.take(1), workspaces.take(1)
    with pytest.raises(AssertionError, match="more than 2 exchanges"):
        workspaces.take(1)
    workspaces.give_back(second)
    assert workspaces.take(1) is second
    assert workspaces.take(2) is first
