"""``headrace up --on ray`` on a real Ray cluster of several nodes, all of them on this machine."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.local_system import free_port
from runtime.keys import ClusterKey

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own
]
SOON_S = 120.0
COMMAND = [sys.executable, "-m", "deploy.cli"]
NODE = {"object_store_memory": 80 << 20}
LONG = {
    "model": "smollm2",
    "prompt": "Once upon a time",
    "max_tokens": 40,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {SOON_S} s: {what}"
        time.sleep(0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A system on Ray; whatever belongs to it has the path of its key in its command line."""

    url: str
    key: Path
    address: str
    launcher: subprocess.Popen[bytes]
    log: Path

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == httpx.codes.OK
        assert self.launcher.poll() is None, self.log.read_text()
        return False

    def linked(self, role: str) -> int:
        lines = httpx.get(f"{self.url}/metrics", timeout=5).text.splitlines()
        mine = [line for line in lines if line.startswith("headrace_worker_up{")]
        return sum(line.endswith(" 1.0") for line in mine if f'role="{role}"' in line)

    def processes(self, role: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            arguments = process.info["cmdline"] or []
            if role in arguments and any(str(self.key) in argument for argument in arguments):
                found.append(process)
        return found

    def scale(self, workers: int) -> None:
        subprocess.run(
            [*COMMAND, "scale", f"prefill={workers}", "--set", f"ray.address={self.address}"],
            check=True,
            timeout=SOON_S,
        )

    def stream(self, on_chunk: Callable[[int], None] = lambda _: None) -> str:
        """The text of a greedy answer; fails unless the stream ends as it should."""
        text: list[str] = []
        url = f"{self.url}/v1/completions"
        with httpx.stream("POST", url, json=LONG, timeout=SOON_S) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return "".join(text)
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    text += [choice["text"] for choice in event["choices"]]
                    on_chunk(len(text))
        raise AssertionError("the stream ended without [DONE]")


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """A head that takes no worker, and two nodes with two CPUs each in a domain of its own."""
    nodes = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **NODE}
    )
    for domain in ("a", "b"):
        nodes.add_node(num_cpus=2, labels={"domain": domain}, **NODE)
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def system(cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("ray")
    key, log, port = folder / "cluster.key", folder / "log", free_port()
    ClusterKey.generate().save(key)
    address = cluster.address  # type: ignore[attr-defined]
    command = [
        *(*COMMAND, "up", "smollm2", "--on", "ray", "--decode-ranks", "2", "--port", str(port)),
        *("--set", f"ray.address={address}", "--set", "ray.domain_label=domain"),
        *("--cluster-key-file", str(key), "--kv-cache", "128MiB", "--dtype", "float32"),
    ]
    with log.open("wb") as output:
        launcher = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    started = System(
        url=f"http://127.0.0.1:{port}", key=key, address=address, launcher=launcher, log=log
    )
    try:
        eventually(started.ready, "ready")
        yield started
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()


def test_a_decode_workers_ranks_are_one_placement_group_in_one_domain(system: System) -> None:
    assert system.stream()
    ray.init(address=system.address, log_to_driver=False)
    try:
        groups = {group["name"]: group for group in ray.util.placement_group_table().values()}
        domains = {node["NodeID"]: node["Labels"].get("domain") for node in ray.nodes()}
    finally:
        ray.shutdown()
    decode = groups["decode-0"]
    assert (decode["state"], len(decode["bundles"])) == ("CREATED", 2)
    assert len({domains[node] for node in decode["bundles_to_node_id"].values()}) == 1
    assert len(groups["prefill-0"]["bundles"]) == 1


@pytest.mark.parametrize(("role", "victim"), [("decode", "process"), ("prefill", "actor")])
def test_a_stream_outlives_what_is_killed_on_ray(system: System, role: str, victim: str) -> None:
    eventually(system.ready, "ready")
    undisturbed = system.stream()
    process = system.processes(role)[-1]
    killed = process if victim == "process" else process.parent()
    assert killed is not None

    def kill(count: int) -> None:
        if count == 3:
            killed.send_signal(signal.SIGKILL)

    assert system.stream(kill) == undisturbed
    eventually(lambda: system.linked("decode") == 2 and system.ready(), "two ranks, ready")
    assert system.stream() == undisturbed


def test_prefill_grows_and_shrinks_without_breaking_a_stream(system: System) -> None:
    eventually(system.ready, "ready")
    undisturbed = system.stream()
    system.scale(2)
    eventually(lambda: system.linked("prefill") == 2, "two prefill workers")
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(system.stream()))
    asking.start()
    system.scale(1)
    eventually(lambda: system.linked("prefill") == 1, "one prefill worker")
    asking.join(SOON_S)
    assert answers == [undisturbed]
    eventually(lambda: len(system.processes("prefill")) == 1, "the other one has ended")


def test_a_decode_worker_goes_to_another_node_when_its_own_is_lost(
    system: System, cluster: object
) -> None:
    eventually(system.ready, "ready")
    undisturbed = system.stream()
    pid = system.processes("decode")[0].ppid()
    raylet = psutil.Process(pid).ppid()
    lost = next(
        node
        for node in cluster.worker_nodes  # type: ignore[attr-defined]
        if node.all_processes["raylet"][0].process.pid == raylet
    )
    cluster.add_node(num_cpus=3, labels={"domain": "c"}, **NODE)  # type: ignore[attr-defined]
    cluster.remove_node(lost, allow_graceful=False)  # type: ignore[attr-defined]
    eventually(lambda: len(system.processes("decode")) == 0, "the ranks are gone with their node")
    eventually(lambda: system.linked("decode") == 2 and system.ready(), "two ranks, ready")
    assert system.stream() == undisturbed


def test_a_second_system_in_the_namespace_is_refused(system: System) -> None:
    ended = subprocess.run(
        [
            *(*COMMAND, "up", "smollm2", "--on", "ray", "--port", "0"),
            *("--set", f"ray.address={system.address}", "--cluster-key-file", str(system.key)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=SOON_S,
    )
    assert ended.returncode == 1
    assert "a system runs in the Ray namespace headrace already" in ended.stderr


def test_ctrl_c_drains_and_leaves_nothing(system: System) -> None:
    eventually(system.ready, "ready")
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(system.stream()))
    asking.start()
    eventually(lambda: system.linked("decode") == 2, "two ranks")
    system.launcher.send_signal(signal.SIGINT)
    assert system.launcher.wait(SOON_S) == 130, system.log.read_text()
    asking.join(SOON_S)
    assert len(answers) == 1
    eventually(
        lambda: not any(system.processes(role) for role in ("gateway", "prefill", "decode")),
        "no process",
    )
    ray.init(address=system.address, log_to_driver=False)
    try:
        states = {group["state"] for group in ray.util.placement_group_table().values()}
    finally:
        ray.shutdown()
    assert states <= {"REMOVED"}
