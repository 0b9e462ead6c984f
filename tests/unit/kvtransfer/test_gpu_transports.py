"""What GPU transports promise without a GPU: clear refusals, and proof by the end of a process."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from kvtransfer import cuda
from kvtransfer.carrier import TransportChoice
from kvtransfer.carriers import make_carriers
from kvtransfer.cuda_ipc import process_of, wait_for_exit
from kvtransfer.interface import KVMemory
from kvtransfer.memory import allocate_shared
from kvtransfer.sink import make_sink
from kvtransfer.source import make_source
from protocol.errors import ConfigError
from tests.support.transfers import LAYOUT, WAIT_S, Events, a_worker


@pytest.mark.parametrize("transport", ["cuda_ipc", "nccl"])
def test_blocks_in_host_memory_refuse_a_gpu_transport_at_both_ends(
    transport: TransportChoice,
) -> None:
    memory = allocate_shared(LAYOUT, 4)
    with pytest.raises(ConfigError, match=f"kv.transport is {transport}: .*not on a GPU"):
        make_sink(memory, a_worker(), Events(), transport=transport)
    with pytest.raises(ConfigError, match=f"kv.transport is {transport}: .*not on a GPU"):
        make_source(memory, a_worker("prefill-0"), transport=transport)


@pytest.mark.parametrize("transport", ["cuda_ipc", "nccl"])
def test_a_missing_cupy_is_named_with_the_way_to_install_it(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    on_gpu = KVMemory(layout=LAYOUT, num_blocks=1, address=0, owner=None, device=0)
    problem = make_carriers(gpu=True)[transport].problem(on_gpu)  # type: ignore[index]
    assert problem is not None
    assert "cupy" in problem
    assert "pip install 'headrace[gpu]'" in problem
    with pytest.raises(ConfigError):
        cuda.library()


def test_only_the_end_of_the_process_is_proof_not_the_end_of_its_connection() -> None:
    path = f"\0headrace-test-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(1)
    listener.settimeout(WAIT_S)
    script = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        f"s.connect({path!r})\n"
        "s.close()\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    sock, _ = listener.accept()
    process = process_of(sock)
    assert sock.recv(1) == b""  # it has closed, and lives
    exited = threading.Event()

    def wait() -> None:
        wait_for_exit(process)
        exited.set()

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    assert child.poll() is None
    assert not exited.is_set()
    child.kill()
    assert exited.wait(WAIT_S)
    child.wait()
    assert child.stdin is not None
    child.stdin.close()
    sock.close()
    listener.close()
    os.close(process)
