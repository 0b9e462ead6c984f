"""``headrace up --on ray`` and ``headrace scale``: configuration in, a system on Ray's nodes out.

The gateway with its scheduler runs here, under this process, so the API is where the command was
given. Workers run where Ray places them.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import anyio
from ray.util import get_node_ip_address

from decode.settings import DecodeSettings
from deploy.config import Configuration, WrongSetting
from deploy.console import Console
from deploy.foreground import Api, serve
from deploy.on_ray.cluster import (
    alive_nodes,
    ask_prefill,
    connected,
    make_wishes,
    node_addresses,
)
from deploy.on_ray.host import Place
from deploy.on_ray.placement import a_gang
from deploy.on_ray.system import RaySystem
from deploy.on_ray.worker import RayWorker
from deploy.preflight import HeldPorts
from deploy.settings import LauncherSettings, RaySettings
from deploy.supervisor import Supervisor
from deploy.up import gateways, scheduler_alone, title
from prefill.settings import PrefillSettings
from protocol.errors import ConfigError
from runtime.keys import is_loopback
from server.settings import GatewaySettings


def up_on_ray(configuration: Configuration, api: Api, ports: HeldPorts) -> int:
    """Serve until Ctrl-C or SIGTERM; the result is the exit code.

    Raises:
        ConfigError: no Ray cluster answers, it has a system already, or a setting is wrong.
    """
    settings = configuration.settings("ray", RaySettings)
    with connected(settings):
        host = get_node_ip_address()
        _require_key(configuration, [host, *node_addresses()])
        configuration = configuration.replace(
            {"bus.scheduler": f"tcp://{_in_url(host)}:{ports.take(host)}"}, "launcher"
        ).default({"process.threads": max(1, int(settings.cpus))}, "launcher")
        console = Console(sys.stderr)
        system = _system(configuration, settings, console, ports)
        what = f"{title(configuration)}, on a Ray cluster of {len(alive_nodes())} nodes"
        gateway = configuration.settings("gateway", GatewaySettings)
        api = replace(api, scheduler=gateway.bus.scheduler)
        return anyio.run(partial(serve, system, what, console, api=api))


def scale_on_ray(configuration: Configuration, wanted: str) -> int:
    """Ask a system on Ray for another number of prefill workers; the number before.

    Raises:
        ConfigError: ``wanted`` is not prefill=N, or no such system runs.
    """
    settings = configuration.settings("ray", RaySettings)
    workers = _prefill_in(wanted)
    with connected(settings):
        return ask_prefill(settings.namespace, workers)


def _prefill_in(wanted: str) -> int:
    role, _, number = wanted.partition("=")
    if role == "decode":
        raise WrongSetting(
            f"{wanted}: the ranks of a decode worker hold one model's experts together, so their "
            "number stays: start another system with --decode-ranks"
        )
    if role != "prefill" or not number.isdecimal() or not int(number):
        raise WrongSetting(f"{wanted}: write prefill=N, where N is 1 or more")
    return int(number)


def _require_key(configuration: Configuration, hosts: Sequence[str]) -> None:
    gateway = configuration.settings("gateway", GatewaySettings)
    outside = sorted({host for host in hosts if not is_loopback(host)})
    if outside and gateway.bus.cluster_key_file is None:
        raise ConfigError(
            f"the Ray nodes reach one another at {', '.join(outside)}: make a key with headrace "
            "key FILE, put it at the same path on every node, and name it with "
            "--cluster-key-file FILE"
        )


def _system(
    configuration: Configuration, settings: RaySettings, console: Console, ports: HeldPorts
) -> RaySystem:
    launcher = configuration.settings("launcher", LauncherSettings)
    gateway = configuration.settings("gateway", GatewaySettings)
    prefill = configuration.settings("prefill", PrefillSettings)
    decode = configuration.settings("decode", DecodeSettings)
    nodes = alive_nodes()
    a_worker = partial(RayWorker, settings=launcher, console=console)

    def a_prefill_worker(number: int) -> RayWorker:
        name = f"prefill-{number}"
        gang = a_gang(name, 1, device=prefill.device, cpus=settings.cpus, nodes=nodes)
        return a_worker(gang, partial(_prefill_arguments, configuration, name), names=[name])

    ranks = decode.group.ranks
    gang = a_gang(
        decode.worker_id,
        ranks,
        device=decode.device,
        cpus=settings.cpus,
        nodes=nodes,
        domain_label=settings.domain_label,
    )
    return RaySystem(
        Supervisor(
            [gateways(configuration, gateway, ports), scheduler_alone(configuration, gateway)],
            settings=launcher,
            drain_s=gateway.process.drain_s,
            observer=console,
        ),
        decode=a_worker(
            gang,
            partial(_decode_arguments, configuration),
            names=[f"{decode.worker_id}/{rank}" for rank in range(ranks)],
        ),
        a_prefill_worker=a_prefill_worker,
        wishes=make_wishes(settings.namespace, prefill.workers),
        prefill_workers=prefill.workers,
        drain_s=gateway.process.drain_s,
        console=console,
    )


def _prefill_arguments(
    configuration: Configuration, name: str, places: Sequence[Place]
) -> list[list[str]]:
    own = configuration.replace(
        {
            "prefill.worker_id": name,
            "prefill.bind": f"tcp://{_in_url(places[0].host)}:0",
            "prefill.device": _the_only(configuration.settings("prefill", PrefillSettings).device),
        },
        "launcher",
    )
    return [["prefill", *own.flags("prefill")]]


def _decode_arguments(configuration: Configuration, places: Sequence[Place]) -> list[list[str]]:
    meeting = f"{_in_url(places[0].host)}:{places[0].port}"
    device = _the_only(configuration.settings("decode", DecodeSettings).device)
    return [
        [
            "decode",
            *configuration.replace(
                {
                    "decode.group.rank": rank,
                    "decode.group.rendezvous": meeting,
                    "decode.bind": f"tcp://{_in_url(place.host)}:0",
                    "decode.device": device,
                },
                "launcher",
            ).flags("decode"),
        ]
        for rank, place in enumerate(places)
    ]


def _the_only(device: str) -> str:
    """Ray shows each actor its own GPU only."""
    return "cuda:0" if device.startswith("cuda") else device


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
