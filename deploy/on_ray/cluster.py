"""The Ray cluster that a system runs in: reached, looked at, and asked to change the system.

``headrace scale`` leaves its wish with a named actor, and ``headrace up`` reads it there.
"""

import socket
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.on_ray.placement import Resources
from deploy.settings import RaySettings
from protocol.errors import ConfigError

WISHES = "wishes"
CONNECT_S = 5.0


class Wishes:
    """The actor between the two commands. It holds what was asked for last."""

    def __init__(self, prefill: int) -> None:
        self._prefill = prefill

    def prefill(self) -> int:
        return self._prefill

    def ask_prefill(self, workers: int) -> int:
        """The number before."""
        before, self._prefill = self._prefill, workers
        return before


@contextmanager
def connected(settings: RaySettings) -> Generator[None]:
    """This process as a driver of the cluster. What it has made there ends with it.

    Raises:
        ConfigError: no cluster answers, or it runs another Python or Ray.
    """
    _require_somebody_there(settings.address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(
                address=settings.address,
                namespace=settings.namespace,
                logging_level="warning",
            )
    except ConnectionError:
        raise ConfigError(_nobody(settings.address)) from None
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"Ray: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _require_somebody_there(address: str) -> None:
    """Ray itself would try for minutes, and say so."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():  # auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError:
        raise ConfigError(_nobody(address)) from None


def _nobody(address: str) -> str:
    where = "here" if address == "auto" else f"at {address}"
    return (
        f"no Ray cluster answers {where}: start one with `ray start --head`, or name one with "
        "--set ray.address=HOST:6379"
    )


def alive_nodes() -> list[Resources]:
    """What each node has in all, busy or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def node_addresses() -> list[str]:
    return [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]


def make_wishes(namespace: str, prefill: int) -> Any:
    """The actor's handle; it lives on this node.

    Raises:
        ConfigError: a system has one in this namespace already.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    try:
        return (
            ray.remote(Wishes)
            .options(name=WISHES, num_cpus=0, scheduling_strategy=here)
            .remote(prefill)
        )
    except ValueError:
        raise ConfigError(
            f"a system runs in the Ray namespace {namespace} already: stop it, or choose another "
            "with --set ray.namespace=NAME"
        ) from None


def ask_prefill(namespace: str, workers: int) -> int:
    """Ask the system in this namespace for so many prefill workers; the number before.

    Raises:
        ConfigError: no system runs there.
    """
    try:
        before: int = ray.get(ray.get_actor(WISHES).ask_prefill.remote(workers))
    except (ValueError, RayActorError):
        raise ConfigError(
            f"no system runs in the Ray namespace {namespace}: start one with headrace up --on "
            "ray, or name another with --set ray.namespace=NAME"
        ) from None
    return before
