"""Runs a system on two hosts, which are network namespaces, and knocks at its doors from a third.

    python3 tests/containers/two_hosts.py

The first host has gateway, scheduler, a prefill worker and decode rank 0, the second decode rank 1.
KV travels by TCP. From the third, which has no key, every listening port is tried; then again with
the fence that docs/security.md asks for. Needs root and Linux; takes a minute or two, and removes
the namespaces that it made. The exit code says whether all is as it should be.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import zmq

ROOT = Path(__file__).parents[2]
FIRST, SECOND, STRANGER = "10.77.0.1", "10.77.0.2", "10.77.0.3"
API, SCHEDULER, RENDEZVOUS, PREFILL, DECODE = 8000, 8100, 8200, 8300, 8400
DEADLINE_S = 180.0
KNOCK_S = 3.0
PROMPT = "Once upon a time"
ASKS = {"asks for a key", "refuses strangers"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    namespace: str
    address: str

    def command(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(
            self.command(*command), capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} in {self.namespace}: {done.stderr.strip()}")
        return done.stdout

    def python(self, knock: str, *arguments: str) -> str:
        """This script's ``knock``, seen from here."""
        return self.run(sys.executable, str(Path(__file__).resolve()), knock, *arguments).strip()


@contextlib.contextmanager
def network() -> Iterator[tuple[Host, Host, Host]]:
    """Two hosts and a stranger on one switch, apart from this machine's own network."""
    mark = f"hr{os.getpid()}"
    switch = f"{mark}-switch"
    hosts = [
        Host(namespace=f"{mark}-{number}", address=address)
        for number, address in enumerate((FIRST, SECOND, STRANGER))
    ]
    spaces = [switch, *(host.namespace for host in hosts)]
    try:
        for space in spaces:
            _ip("netns", "add", space)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for number, host in enumerate(hosts):
            port = f"p{number}"
            _ip("-n", host.namespace, "link", "add", "eth0", "type", "veth", "peer", port)
            _ip("-n", host.namespace, "link", "set", port, "netns", switch)
            _ip("-n", switch, "link", "set", port, "master", "switch")
            _ip("-n", switch, "link", "set", port, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
        yield hosts[0], hosts[1], hosts[2]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def system(first: Host, second: Host, folder: Path) -> Iterator[str]:
    """A system over both hosts; the API's key."""
    subprocess.run(
        [sys.executable, "-m", "deploy.cli", "key", str(folder / "cluster.key")],
        check=True,
        cwd=ROOT,
    )
    key = os.urandom(16).hex()
    (folder / "api-keys").write_text(f"{key}\n")
    common = [
        *("--cluster-key-file", str(folder / "cluster.key")),
        *("--scheduler", f"tcp://{FIRST}:{SCHEDULER}", "--log-level", "warning"),
        *("--drain", "5"),
    ]
    worker = ["smollm2", *common, "--transport", "tcp", "--dtype", "float32", "--threads", "1"]
    group = ["--kv-cache", "128MiB", "--rendezvous", f"{FIRST}:{RENDEZVOUS}", "--ranks", "2"]
    keys = ["--host", FIRST, "--api-keys-file", str(folder / "api-keys")]
    roles = [
        (first, ["gateway", "smollm2", *common, *keys]),
        (first, ["prefill", *worker, "--kv-cache", "128MiB", "--bind", _tcp(FIRST, PREFILL)]),
        (first, ["decode", *worker, *group, "--rank", "0", "--bind", _tcp(FIRST, DECODE)]),
        (second, ["decode", *worker, *group, "--rank", "1", "--bind", _tcp(SECOND, DECODE)]),
    ]
    with contextlib.ExitStack() as running:
        for host, role in roles:
            process = subprocess.Popen(
                host.command(sys.executable, "-m", "deploy.cli", *role),
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            running.callback(_end, process)
        yield key


def _tcp(host: str, port: int) -> str:
    return f"tcp://{host}:{port}"


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# What follows runs in a namespace, as `two_hosts.py KNOCK ARGUMENTS`, and prints what it has found.


def ask(url: str, path: str, key: str) -> None:
    """The status of a GET; of a completion its status and text."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with contextlib.suppress(httpx.HTTPError):
        if path == "/v1/completions":
            body = {"model": "smollm2", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
            answer = httpx.post(f"{url}{path}", json=body, headers=headers, timeout=60)
            print(answer.status_code, answer.json()["choices"][0]["text"])
        else:
            print(httpx.get(f"{url}{path}", headers=headers, timeout=10).status_code)


def knock_http(host: str, port: int) -> str | None:
    try:
        status = httpx.get(f"http://{host}:{port}/v1/models", timeout=KNOCK_S).status_code
    except httpx.HTTPError:
        return None
    return "asks for a key" if status == httpx.codes.UNAUTHORIZED else f"OPEN: HTTP {status}"


def knock_bus(host: str, port: int, *, curve: bool) -> str | None:
    """None unless ZeroMQ listens there."""
    context = zmq.Context()
    knocker = context.socket(zmq.DEALER)
    knocker.linger = 0
    if curve:  # a key pair of the stranger's own: it cannot know the server's
        knocker.curve_publickey, knocker.curve_secretkey = zmq.curve_keypair()
        knocker.curve_serverkey = zmq.curve_keypair()[0]
    events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    events |= zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    events |= zmq.EVENT_DISCONNECTED
    monitor = knocker.get_monitor_socket(events)
    knocker.connect(f"tcp://{host}:{port}")
    knocker.send(b"x")
    found = None
    if monitor.poll(int(KNOCK_S * 1000)):
        number = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
        opened = number == zmq.EVENT_HANDSHAKE_SUCCEEDED
        found = "OPEN: ZeroMQ without the key" if opened else "asks for a key"
    knocker.close()
    context.destroy(linger=0)
    return found


def knock_raw(host: str, port: int) -> str:
    """Whether a connection that proves nothing is answered or cut."""
    with socket.create_connection((host, port), KNOCK_S) as knocker:
        knocker.settimeout(KNOCK_S)
        try:
            knocker.sendall(os.urandom(64))
            return "OPEN: it answers" if knocker.recv(1) else "refuses strangers"
        except ConnectionResetError:
            return "refuses strangers"
        except TimeoutError:
            return "OPEN: it listens to strangers"


def knock_meeting(host: str, port: int) -> str | None:
    """Whether a rank takes a stranger's ticket; None where no rank greets."""
    from engine.meeting.tickets import Sealed, Ticket
    from protocol.errors import WorkerLost

    with socket.create_connection((host, port), KNOCK_S) as knocker:
        visit = Sealed(knocker, group=f"decode-0:{RENDEZVOUS}", key=b"a guess", host=False)
        try:
            visit.be_greeted()
        except WorkerLost:
            return None
        ticket = Ticket(rank=1, number=1, address="", last_epoch=0, last_members=(), terms={})
        try:
            visit.send(ticket)
            return f"OPEN: it answers a stranger's ticket: {visit.answer()}"
        except WorkerLost:
            return "refuses strangers"


def knock(host: str, port: int) -> None:
    """What a stranger finds at a port."""
    try:
        socket.create_connection((host, port), KNOCK_S).close()
    except OSError:
        print("unreachable")
        return
    if (found := knock_http(host, port)) is not None:
        print(found)
    elif _greets_like_zeromq(host, port):
        both = {knock_bus(host, port, curve=False), knock_bus(host, port, curve=True)}
        print(min((f for f in both if f is not None), default="refuses strangers"))
    else:
        print(knock_meeting(host, port) or knock_raw(host, port))


def _greets_like_zeromq(host: str, port: int) -> bool:
    with socket.create_connection((host, port), KNOCK_S) as knocker:
        knocker.settimeout(KNOCK_S)
        with contextlib.suppress(OSError):
            return knocker.recv(1) == b"\xff"
    return False


# From here on again on this machine.


def listening(host: Host) -> list[tuple[int, str]]:
    """Ports that other hosts can see, and whose they are."""
    found = []
    for line in host.run("ss", "-ltnpH").splitlines():
        address = line.split()[3].rpartition(":")
        if not address[0].startswith(("127.", "[::1]")):
            pid = line.partition("pid=")[2].partition(",")[0]
            found.append((int(address[2]), _role(int(pid))))
    return sorted(found)


def _role(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    role = words[words.index("deploy.cli") + 1]
    return f"{role} {words[words.index('--rank') + 1]}" if "--rank" in words else role


def until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {DEADLINE_S:g} s: {what}")
        time.sleep(0.5)


def check(first: Host, second: Host, stranger: Host, key: str) -> list[str]:
    """What is not as it should be."""
    url, faults = f"http://{FIRST}:{API}", []
    until("ready", lambda: stranger.python("ask", url, "/ready", "") == "200")
    text = stranger.python("ask", url, "/v1/completions", key)
    print(f"a completion from the third host, with the key: {text!r}")
    if not text.startswith("200 "):
        faults.append("no completion with the key")
    for path in ("/v1/models", "/metrics", "/status"):
        if (status := stranger.python("ask", url, path, "")) != "401":
            faults.append(f"{path} gives {status} without a key")
    keyless = knock_at_all(first, second, stranger, faults)
    print(f"{len(keyless)} ports of the ranks' collectives know no key; behind a fence they are:")
    for host, other in ((first, SECOND), (second, FIRST)):
        _fence(host, other)
    for host, port in keyless:
        found = stranger.python("knock", host.address, str(port))
        print(f"{host.address}:{port:<6} {found}")
        if found != "unreachable":
            faults.append(f"{host.address}:{port} is open behind the fence")
    again = stranger.python("ask", url, "/v1/completions", key)
    if again != text:
        faults.append(f"behind the fence the answer is {again!r}")
    return faults


def knock_at_all(
    first: Host, second: Host, stranger: Host, faults: list[str]
) -> list[tuple[Host, int]]:
    """The ports that ask for no key. Only the collectives of decode ranks may have such."""
    doors = [(host, port, role) for host in (first, second) for port, role in listening(host)]
    if len({role for _, _, role in doors}) != 4:
        faults.append(f"not every role listens: {doors}")
    keyless = []
    for host, port, role in doors:
        found = stranger.python("knock", host.address, str(port))
        print(f"{host.address}:{port:<6} {role:<9} {found}")
        if found not in ASKS:
            keyless.append((host, port))
            if not role.startswith("decode"):
                faults.append(f"{host.address}:{port} of {role}: {found}")
    return keyless


def _fence(host: Host, other: str) -> None:
    """The rules of docs/security.md."""
    for rule in (
        ("-i", "lo", "-j", "ACCEPT"),
        ("-s", other, "-j", "ACCEPT"),
        ("-p", "tcp", "--dport", str(API), "-j", "ACCEPT"),
        ("-j", "DROP"),
    ):
        host.run("iptables", "-A", "INPUT", *rule)


def main() -> int:
    """The exit code."""
    match sys.argv[1:]:
        case ["ask", *asked]:
            ask(*asked)
            return 0
        case ["knock", address, port]:
            knock(address, int(port))
            return 0
    argparse.ArgumentParser(description=__doc__).parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="headrace-") as folder,
        network() as (first, second, stranger),
        system(first, second, Path(folder)) as key,
    ):
        faults = check(first, second, stranger, key)
    print(json.dumps({"faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
