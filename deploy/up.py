"""A whole system on this machine: ``headrace up``, and this node's ranks of ``headrace decode``.

Every role is a process of its own, even on two cores: what runs here is what runs on a rack. The
plan turns a configuration into commands; the supervisor runs them; this module waits until a real
request can be served, and says so.
"""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import anyio
import httpx
import psutil

from decode.settings import DecodeSettings
from deploy.config import Configuration
from deploy.console import Console
from deploy.demo import DEMO_MODEL
from deploy.exits import DONE, FAILED, INTERRUPTED
from deploy.preflight import check_model, check_port, free_port
from deploy.processes import Command
from deploy.settings import LauncherSettings
from deploy.supervisor import Supervisor, SystemFailed
from prefill.settings import PrefillSettings
from runtime.keys import load_key
from server.settings import GatewaySettings

READY_POLL_S = 0.1
EVERY_ADDRESS = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run here. ``api`` is the gateway's URL and the model's name, if a gateway runs."""

    title: str
    stages: Sequence[Sequence[Command]]  # stopped one after the other
    settings: LauncherSettings
    drain_s: float
    api: tuple[str, str] | None = None


def up(configuration: Configuration) -> int:
    """Start, wait until ready, say how to use it, serve until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: a setting, the model, the key or the port is wrong; nothing was started.
    """
    if not configuration.given("model.path"):
        configuration = configuration.replace({"model.path": DEMO_MODEL}, "default")
    configuration = configuration.default(
        {"process.log_level": "warning", "process.log_format": "text"}, "launcher"
    )
    gateway = configuration.settings("gateway", GatewaySettings)
    check_model(gateway.model.path)
    load_key(gateway.bus.cluster_key_file)
    port = gateway.port or free_port()
    check_port(gateway.host, port)
    configuration = configuration.replace(
        {"gateway.port": port, "bus.scheduler": f"tcp://127.0.0.1:{free_port()}"}, "launcher"
    )
    return anyio.run(_serve, _plan(configuration, port), Console(sys.stderr))


def _plan(configuration: Configuration, port: int) -> Plan:
    gateway = configuration.settings("gateway", GatewaySettings)
    workers = configuration.settings("prefill", PrefillSettings).workers
    decode = configuration.settings("decode", DecodeSettings)
    ranks = decode.group.ranks
    sharing = configuration.default({"process.threads": _threads(workers + ranks)}, "launcher")
    host = "127.0.0.1" if gateway.host in EVERY_ADDRESS else gateway.host
    return Plan(
        title=f"headrace {version('headrace')} serves {gateway.model.name}: {workers} prefill "
        f"{_plural('worker', workers)}, {ranks} decode {_plural('rank', ranks)}",
        stages=[
            _gateways(sharing, gateway),
            [
                *_scheduler(sharing, gateway),
                *_prefill_workers(sharing, workers),
                *decode_ranks(sharing, decode),
            ],
        ],
        settings=configuration.settings("launcher", LauncherSettings),
        drain_s=gateway.process.drain_s,
        api=(f"http://{host}:{port}", gateway.model.name),
    )


def run_all_ranks(configuration: Configuration) -> int:
    """This node's ranks of one decode worker, for ``headrace decode`` without --rank."""
    decode = configuration.settings("decode", DecodeSettings)
    here, ranks = decode.group.ranks_of_node, decode.group.ranks
    configuration = configuration.default({"process.threads": _threads(len(here))}, "launcher")
    which = f"{ranks} ranks" if len(here) == ranks else f"ranks {here[0]} to {here[-1]} of {ranks}"
    plan = Plan(
        title=f"decode worker {decode.worker_id}: {which}",
        stages=[decode_ranks(configuration, decode)],
        settings=configuration.settings("launcher", LauncherSettings),
        drain_s=decode.process.drain_s,
    )
    return anyio.run(_serve, plan, Console(sys.stderr))


async def _serve(plan: Plan, console: Console) -> int:
    supervisor = Supervisor(
        plan.stages, settings=plan.settings, drain_s=plan.drain_s, observer=console
    )
    console.say(plan.title)
    stop = anyio.Event()
    received: list[signal.Signals] = []

    async def watch_signals() -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for number in signals:
                received.append(number)
                if len(received) > 1:
                    supervisor.kill()
                else:
                    console.say("draining; press Ctrl-C again to stop at once")
                stop.set()

    failures: list[str] = []
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch_signals)
            if plan.api is None:
                supervisor.system_is_ready()
            else:
                url, model = plan.api
                tasks.start_soon(_announce, supervisor, plan.settings, console, url, model)
            await supervisor.run(stop)
            tasks.cancel_scope.cancel()
    except* SystemFailed as group:
        failures += [str(error) for error in group.exceptions]
    if failures:
        console.say(f"headrace: {failures[0]}")
        return FAILED
    console.say("stopped")
    return INTERRUPTED if received and received[0] == signal.SIGINT else DONE


async def _announce(
    supervisor: Supervisor, settings: LauncherSettings, console: Console, url: str, model: str
) -> None:
    """Wait until a canary request has passed through the whole system, then say how to use it."""
    answer = "no answer"
    with anyio.move_on_after(settings.start_timeout_s):
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
            while True:
                try:
                    response = await client.get(f"{url}/ready")
                    answer = response.text[:200]
                    if response.status_code == httpx.codes.OK:
                        break
                except httpx.HTTPError:
                    answer = "no answer"
                await anyio.sleep(READY_POLL_S)
        supervisor.system_is_ready()
        console.say(_welcome(url, model))
        return
    raise SystemFailed(f"not ready after {settings.start_timeout_s:g} s: /ready says: {answer}")


def _welcome(url: str, model: str) -> str:
    question = {"model": model, "messages": [{"role": "user", "content": "What is a headrace?"}]}
    streamed = json.dumps({**question, "stream": True})
    short = json.dumps({**question, "max_tokens": 64})
    return f"""
ready at {url}

  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{streamed}'

  python3 -c 'import json, urllib.request as u; print(json.load(u.urlopen(u.Request(
    "{url}/v1/chat/completions", json.dumps({short}).encode(),
    {{"content-type": "application/json"}})))["choices"][0]["message"]["content"])'

Any OpenAI client works with base_url="{url}/v1". Ctrl-C drains and stops.
"""


def _command(role: str, configuration: Configuration, name: str = "") -> Command:
    # -P: the folder that the user stands in must not shadow our packages
    argv = (sys.executable, "-P", "-m", "deploy.cli", role, *configuration.flags(role))
    return Command(name=name or role, argv=argv)


def _gateways(configuration: Configuration, gateway: GatewaySettings) -> list[Command]:
    """One with the scheduler inside; or several that share its port, each with another besides."""
    if gateway.processes == 1:
        return [_command("gateway", configuration)]
    first = gateway.process_port
    return [
        _command(
            "gateway",
            configuration.replace(
                {
                    "gateway.embed_scheduler": False,
                    "gateway.process_port": first + number if first else free_port(),
                },
                "launcher",
            ),
            f"gateway-{number}",
        )
        for number in range(gateway.processes)
    ]


def _scheduler(configuration: Configuration, gateway: GatewaySettings) -> list[Command]:
    return [_command("scheduler", configuration)] if gateway.processes > 1 else []


def _prefill_workers(configuration: Configuration, workers: int) -> list[Command]:
    names = [f"prefill-{number}" for number in range(workers)]
    return [
        _command("prefill", configuration.replace({"prefill.worker_id": name}, "launcher"), name)
        for name in names
    ]


def decode_ranks(configuration: Configuration, decode: DecodeSettings) -> list[Command]:
    """One command a rank. They meet at one place for life: a new rank finds the others there."""
    if decode.group.nodes == 1 and not configuration.given("decode.group.rendezvous"):
        configuration = configuration.replace(
            {"decode.group.rendezvous": f"127.0.0.1:{free_port()}"}, "launcher"
        )
    return [
        _command(
            "decode",
            configuration.replace(
                {
                    "decode.group.rank": rank,
                    "decode.bind": _own_port(decode.bind, number),
                    "decode.device": _own_device(decode.device, number),
                },
                "launcher",
            ),
            f"{decode.worker_id}/{rank}",
        )
        for number, rank in enumerate(decode.group.ranks_of_node)
    ]


def _own_port(address: str, number: int) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + number}" if int(port) else address


def _own_device(device: str, number: int) -> str:
    return f"cuda:{number}" if device == "cuda" else device


def _threads(processes: int) -> int:
    """A fair share of the cores that this process may use."""
    return max(1, len(psutil.Process().cpu_affinity() or [0]) // processes)


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
