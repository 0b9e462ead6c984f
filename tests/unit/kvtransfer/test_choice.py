"""The transport of a pair follows from what both ends can do and where they are."""

import pytest

from kvtransfer.carrier import Transport, TransportChoice
from kvtransfer.choice import (
    Here,
    Route,
    expected_bytes_per_s,
    is_far_below,
    place_of,
    routes,
)
from protocol.errors import TransferError
from protocol.kv import KVEndpoint

HOST = Here(host_id="h", process_id="1")
GPU = Here(host_id="h", process_id="1", gpu="GPU-a", domain="rack/1")
EVERYTHING: tuple[Transport, ...] = ("shm", "tcp", "cuda_ipc", "nccl", "nixl")


def an_endpoint(
    *offers: Transport,
    host_id: str = "h",
    process_id: str = "2",
    gpu: str = "",
    domain: str = "",
) -> KVEndpoint:
    return KVEndpoint(
        host_id=host_id,
        num_blocks=8,
        addresses={name: f"at {name}" for name in offers},
        process_id=process_id,
        gpu=gpu,
        domain=domain,
    )


def chosen(
    choice: TransportChoice, endpoint: KVEndpoint, here: Here = HOST, **problems: str
) -> list[Route]:
    return routes(choice, endpoint, here, problems.get)


def names(found: list[Route]) -> list[Transport]:
    return [route.transport for route in found]


def test_one_host_shares_memory_and_falls_back_to_tcp() -> None:
    found = chosen("auto", an_endpoint("tcp", "shm"))
    assert names(found) == ["shm", "tcp"]
    assert found[0].address == "at shm"
    assert found[0].place == "same host"


def test_another_host_is_reached_by_tcp_and_the_reason_says_why_not_by_shm() -> None:
    (route,) = chosen("auto", an_endpoint("tcp", "shm", host_id="other"))
    assert (route.transport, route.place) == ("tcp", "elsewhere")
    assert "not shm: needs one host" in route.reason


def test_gpus_of_one_host_copy_directly_and_host_memory_is_the_last_resort() -> None:
    endpoint = an_endpoint(*EVERYTHING, gpu="GPU-b")
    assert names(chosen("auto", endpoint, GPU)) == ["cuda_ipc", "nccl", "shm", "tcp", "nixl"]


def test_one_gpu_shared_by_both_ends_is_not_for_nccl() -> None:
    found = chosen("auto", an_endpoint(*EVERYTHING, gpu="GPU-a"), GPU)
    assert names(found)[0] == "cuda_ipc"
    assert "nccl" not in names(found)


def test_gpus_of_two_hosts_use_nccl() -> None:
    endpoint = an_endpoint(*EVERYTHING, host_id="other", gpu="GPU-b", domain="rack/1")
    found = chosen("auto", endpoint, GPU)
    assert names(found) == ["nccl", "tcp", "nixl"]
    assert found[0].place == "same NVLink domain"


def test_a_gpu_and_a_host_meet_in_host_memory() -> None:
    assert names(chosen("auto", an_endpoint("shm", "tcp"), GPU)) == ["shm", "tcp"]
    assert names(chosen("auto", an_endpoint("shm", "tcp", "nccl", gpu="GPU-b"), HOST)) == [
        "shm",
        "tcp",
    ]


def test_a_library_that_is_missing_here_takes_its_transport_out() -> None:
    found = chosen("auto", an_endpoint(*EVERYTHING, gpu="GPU-b"), GPU, cuda_ipc="no cupy")
    assert names(found)[0] == "nccl"
    assert "cuda_ipc: no cupy" in found[0].reason


@pytest.mark.parametrize(
    ("choice", "endpoint", "problem"),
    [
        ("shm", an_endpoint("tcp"), "does not offer it"),
        ("shm", an_endpoint("shm", host_id="other"), "needs one host"),
        ("nccl", an_endpoint("nccl", gpu="GPU-b"), "this worker's blocks are not on a GPU"),
        ("nixl", an_endpoint("shm", "tcp"), "does not offer it"),
        ("auto", an_endpoint(), "offers nothing"),
    ],
)
def test_a_choice_that_cannot_work_is_refused_with_the_reason(
    choice: TransportChoice, endpoint: KVEndpoint, problem: str
) -> None:
    with pytest.raises(TransferError, match=problem):
        chosen(choice, endpoint)


def test_only_what_could_be_used_is_asked_for_problems() -> None:
    asked: list[Transport] = []
    routes("auto", an_endpoint("tcp"), HOST, asked.append)
    assert asked == ["tcp"]


def test_a_process_may_send_to_itself() -> None:
    assert place_of(an_endpoint("shm", process_id="1"), HOST) == "same process"
    assert place_of(an_endpoint("shm", process_id=""), Here(host_id="h", process_id="")) == (
        "same host"
    )


def test_a_link_is_slow_far_below_what_its_path_gives() -> None:
    healthy = expected_bytes_per_s("tcp", "elsewhere")
    assert not is_far_below(healthy / 2, "tcp", "elsewhere")
    assert is_far_below(healthy / 10, "tcp", "elsewhere")
