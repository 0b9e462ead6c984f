"""A whole system: ``headrace up``, and this node's ranks of ``headrace decode``.

Every role is a process of its own, even on two cores: what runs here is what runs on a rack. This
module turns a configuration into commands; a supervisor runs them on this machine, and
``deploy.on_ray`` on others.
"""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version

import anyio
import psutil

from decode.settings import DecodeSettings
from deploy.config import Configuration
from deploy.console import Console
from deploy.demo import DEMO_MODEL
from deploy.exits import DONE
from deploy.foreground import Api, serve
from deploy.preflight import HeldPorts, check_model
from deploy.processes import Command
from deploy.settings import LauncherSettings
from deploy.supervisor import Supervisor
from prefill.settings import PrefillSettings, rank_name
from protocol.errors import ConfigError
from runtime.keys import load_key
from server.settings import GatewaySettings

EVERY_ADDRESS = ("0.0.0.0", "::")
NO_RAY = "Ray is not installed here: pip install 'headrace[ray]', on every node of its cluster"


def up(configuration: Configuration) -> int:
    """Start, wait until ready, say how to use it, serve until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: a setting, the model, the key or the port is wrong; nothing was started.
    """
    with HeldPorts() as ports:
        return _up(configuration, ports)


def _up(configuration: Configuration, ports: HeldPorts) -> int:
    if not configuration.given("model.path"):
        configuration = configuration.replace({"model.path": DEMO_MODEL}, "default")
    configuration = configuration.default(
        {"process.log_level": "warning", "process.log_format": "text"}, "launcher"
    )
    gateway = configuration.settings("gateway", GatewaySettings)
    check_model(gateway.model.path)
    load_key(gateway.bus.cluster_key_file)
    port = ports.take(gateway.host, gateway.port)
    configuration = configuration.replace(
        {"gateway.port": port, "bus.scheduler": f"tcp://127.0.0.1:{ports.take()}"}, "launcher"
    )
    gateway = configuration.settings("gateway", GatewaySettings)
    launcher = configuration.settings("launcher", LauncherSettings)
    host = "127.0.0.1" if gateway.host in EVERY_ADDRESS else gateway.host
    api = Api(
        url=f"http://{host}:{port}",
        model=gateway.model.name,
        scheduler=gateway.bus.scheduler,
        start_timeout_s=launcher.start_timeout_s,
    )
    prefill = configuration.settings("prefill", PrefillSettings)
    if launcher.on == "ray":
        if prefill.group.ranks > 1:
            raise ConfigError(
                f"prefill.group.ranks is {prefill.group.ranks}: on Ray a prefill worker is one "
                "process; use 1, and more workers"
            )
        with _ray_installed():
            from deploy.on_ray.up import up_on_ray
        return up_on_ray(configuration, api, ports)
    decode = configuration.settings("decode", DecodeSettings)
    processes = prefill.workers * prefill.group.ranks + decode.group.ranks
    configuration = configuration.default({"process.threads": _threads(processes)}, "launcher")
    console = Console(sys.stderr)
    system = Supervisor(
        [
            gateways(configuration, gateway, ports),
            [
                *scheduler_alone(configuration, gateway),
                *_prefill_workers(configuration, prefill, ports),
                *decode_ranks(configuration, decode, ports),
            ],
        ],
        settings=launcher,
        drain_s=gateway.process.drain_s,
        observer=console,
    )
    return anyio.run(partial(serve, system, title(configuration), console, api=api))


def scale(configuration: Configuration, wanted: str) -> int:
    """Ask a system on Ray for another number of workers: ``wanted`` is such as prefill=3.

    Raises:
        ConfigError: no such system runs, or it cannot change like that.
    """
    with _ray_installed():
        from deploy.on_ray.up import scale_on_ray
    before = scale_on_ray(configuration, wanted)
    print(f"asked for {wanted}; it was {before}", file=sys.stderr)
    return DONE


@contextmanager
def _ray_installed() -> Generator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ConfigError(NO_RAY) from None


def title(configuration: Configuration) -> str:
    """What is started, in one line."""
    gateway = configuration.settings("gateway", GatewaySettings)
    prefill = configuration.settings("prefill", PrefillSettings)
    workers, each = prefill.workers, prefill.group.ranks
    ranks = configuration.settings("decode", DecodeSettings).group.ranks
    of_ranks = f" of {each} ranks" if each > 1 else ""
    return (
        f"headrace {version('headrace')} serves {gateway.model.name}: {workers} prefill "
        f"{_plural('worker', workers)}{of_ranks}, {ranks} decode {_plural('rank', ranks)}"
    )


def run_all_ranks(configuration: Configuration) -> int:
    """This node's ranks of one decode worker, for ``headrace decode`` without --rank."""
    decode = configuration.settings("decode", DecodeSettings)
    here, ranks = decode.group.ranks_of_node, decode.group.ranks
    configuration = configuration.default({"process.threads": _threads(len(here))}, "launcher")
    which = f"{ranks} ranks" if len(here) == ranks else f"ranks {here[0]} to {here[-1]} of {ranks}"
    console = Console(sys.stderr)
    with HeldPorts() as ports:
        system = Supervisor(
            [decode_ranks(configuration, decode, ports)],
            settings=configuration.settings("launcher", LauncherSettings),
            drain_s=decode.process.drain_s,
            observer=console,
        )
        what = f"decode worker {decode.worker_id}: {which}"
        return anyio.run(partial(serve, system, what, console, api=None))


def run_prefill_ranks(configuration: Configuration) -> int:
    """All ranks of one prefill worker, for ``headrace prefill`` without --rank."""
    prefill = configuration.settings("prefill", PrefillSettings)
    ranks = prefill.group.ranks
    configuration = configuration.default({"process.threads": _threads(ranks)}, "launcher")
    console = Console(sys.stderr)
    with HeldPorts() as ports:
        system = Supervisor(
            [prefill_ranks(configuration, prefill, prefill.worker_id, ports)],
            settings=configuration.settings("launcher", LauncherSettings),
            drain_s=prefill.process.drain_s,
            observer=console,
        )
        what = f"prefill worker {prefill.worker_id}: {ranks} ranks"
        return anyio.run(partial(serve, system, what, console, api=None))


def command(role: str, configuration: Configuration, name: str = "") -> Command:
    """A role's process on this machine, with all that the configuration says of it."""
    # -P: the folder that the user stands in must not shadow our packages
    argv = (sys.executable, "-P", "-m", "deploy.cli", role, *configuration.flags(role))
    return Command(name=name or role, argv=argv)


def gateways(
    configuration: Configuration, gateway: GatewaySettings, ports: HeldPorts
) -> list[Command]:
    """One with the scheduler inside; or several that share its port, each with another besides."""
    if gateway.processes == 1:
        return [command("gateway", configuration)]
    first = gateway.process_port
    return [
        command(
            "gateway",
            configuration.replace(
                {
                    "gateway.embed_scheduler": False,
                    "gateway.process_port": first + number if first else ports.take(),
                },
                "launcher",
            ),
            f"gateway-{number}",
        )
        for number in range(gateway.processes)
    ]


def scheduler_alone(configuration: Configuration, gateway: GatewaySettings) -> list[Command]:
    """The scheduler's own process, where none of several gateways can hold it."""
    return [command("scheduler", configuration)] if gateway.processes > 1 else []


def _prefill_workers(
    configuration: Configuration, prefill: PrefillSettings, ports: HeldPorts
) -> list[Command]:
    names = [f"prefill-{number}" for number in range(prefill.workers)]
    return [rank for name in names for rank in prefill_ranks(configuration, prefill, name, ports)]


def prefill_ranks(
    configuration: Configuration, prefill: PrefillSettings, name: str, ports: HeldPorts
) -> list[Command]:
    """One command a rank of the worker ``name``. Rank 0 leads, and is called like the worker."""
    configuration = configuration.replace({"prefill.worker_id": name}, "launcher")
    if prefill.group.ranks == 1:
        return [command("prefill", configuration, name)]
    if prefill.workers > 1 or not configuration.given("prefill.group.rendezvous"):
        place = f"127.0.0.1:{ports.take()}"
        configuration = configuration.replace({"prefill.group.rendezvous": place}, "launcher")
    return [
        command(
            "prefill",
            configuration.replace(
                {
                    "prefill.group.rank": rank,
                    "prefill.device": _own_device(prefill.device, rank),
                },
                "launcher",
            ),
            rank_name(name, rank),
        )
        for rank in range(prefill.group.ranks)
    ]


def decode_ranks(
    configuration: Configuration, decode: DecodeSettings, ports: HeldPorts
) -> list[Command]:
    """One command a rank. They meet at one place for life: a new rank finds the others there."""
    if decode.group.nodes == 1 and not configuration.given("decode.group.rendezvous"):
        first, *further = (f"127.0.0.1:{ports.take()}" for _ in range(decode.group.ranks))
        places = ",".join(f"{rank}={place}" for rank, place in enumerate(further, start=1))
        configuration = configuration.replace(
            {"decode.group.rendezvous": first, "decode.group.places": places}, "launcher"
        )
    return [
        command(
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
