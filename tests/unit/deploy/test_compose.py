"""What deploy/compose.yaml promises, read from the file; tests/containers runs it."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from decode.settings import DecodeSettings
from deploy.cli import parser
from deploy.options import configuration
from prefill.settings import PrefillSettings
from server.settings import GatewaySettings, SchedulerSettings

ROOT = Path(__file__).parents[3]
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
ONCE = {"keys", "bench"}  # do their work and end
SETTINGS: dict[str, Any] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
}
ROLES = {name for name, service in SERVICES.items() if service.get("command", [""])[0] in SETTINGS}
# What the entrypoint adds; it is a shell script, and knows the container's address.
ENTRYPOINT = {
    "HEADRACE_PREFILL_BIND": "tcp://10.0.0.7:8300",
    "HEADRACE_DECODE_BIND": "tcp://10.0.0.7:8300",
}


def filled_in(text: str) -> str:
    """Compose's own defaults in the place of variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def settings_of(name: str) -> Any:
    service = SERVICES[name]
    given = {key: filled_in(value) for key, value in service["environment"].items()}
    given = {key: value for key, value in given.items() if key.startswith("HEADRACE_")}
    role, *arguments = service["command"]
    found = configuration(parser().parse_args([role, *arguments]), role, ENTRYPOINT | given)
    return found.settings(role, SETTINGS[role])


def volumes_of(name: str) -> set[str]:
    return {volume.split(":")[0] for volume in SERVICES[name].get("volumes", [])}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_can_write_nothing_and_has_no_capability(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "cap_add" not in service


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - ONCE))
def test_what_stays_up_says_whether_it_is_well_and_is_started_again(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_only_the_gateway_and_grafana_are_published_and_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "gateway": ["${PUBLISH:-127.0.0.1}:8000:8000"],
        "grafana": ["${PUBLISH:-127.0.0.1}:3000:3000"],
    }
    assert not any(service.get("network_mode") == "host" for service in SERVICES.values())


@pytest.mark.parametrize("name", sorted(ROLES - {"gateway"}))
def test_workers_and_the_scheduler_reach_nothing_but_one_another(name: str) -> None:
    assert SERVICES[name]["networks"] == ["cluster"]
    assert COMPOSE["networks"]["cluster"] == {"internal": True}


def test_each_key_is_seen_by_those_that_use_it() -> None:
    keys = {"cluster-key", "gateway-keys", "metrics-key", "grafana-password", "operator-key"}
    seen = {name: volumes_of(name) & keys for name in SERVICES if volumes_of(name) & keys}
    assert seen == {
        "keys": keys,
        "gateway": {"cluster-key", "gateway-keys"},
        "prometheus": {"metrics-key"},
        "grafana": {"grafana-password"},
        "bench": {"operator-key"},
        **{name: {"cluster-key"} for name in ROLES - {"gateway"}},
    }


@pytest.mark.parametrize("name", sorted(ROLES))
def test_the_settings_of_a_role_are_valid(name: str) -> None:
    settings = settings_of(name)
    assert str(settings.bus.cluster_key_file).startswith("/keys/cluster/")


def test_two_containers_hold_the_eight_ranks_of_one_decode_worker() -> None:
    nodes = [settings_of(name) for name in ("decode-0", "decode-1")]
    assert [rank for node in nodes for rank in node.group.ranks_of_node] == list(range(8))
    assert len({(node.worker_id, node.group.rendezvous) for node in nodes}) == 1
    assert nodes[0].group.rendezvous.partition(":")[0] == "decode-0"  # where rank 0 is
    for name, node in zip(("decode-0", "decode-1"), nodes, strict=True):
        first = int(node.bind.rpartition(":")[2])
        ports = [str(first + number) for number in range(len(node.group.ranks_of_node))]
        assert SERVICES[name]["healthcheck"]["test"][-len(ports) :] == ports


def test_there_are_two_prefill_workers_on_cpu() -> None:
    assert SERVICES["prefill"]["scale"] == 2
    assert "HEADRACE_PREFILL_WORKER_ID" not in SERVICES["prefill"]["environment"]  # its host's name


def test_cpu_or_gpu_workers_run_and_never_both() -> None:
    default = (ROOT / "deploy/.env").read_text().splitlines()[-1]
    assert default == "COMPOSE_PROFILES=cpu"
    workers = ROLES - {"gateway", "scheduler"}
    profiles = {name: SERVICES[name]["profiles"] for name in workers}
    assert all(profile in (["cpu"], ["gpu"]) for profile in profiles.values())
    assert {name for name, profile in profiles.items() if profile == ["gpu"]} == {
        "prefill-gpu",
        "decode-gpu",
    }
    assert all("profiles" not in SERVICES[name] for name in SERVICES.keys() - workers - {"bench"})


def test_images_are_pinned() -> None:
    base = re.findall(r"^ARG BASE=(\S+)", DOCKERFILE, re.M)
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)
    assert bases == ["${BASE}"] * 2
    foreign = [service["image"] for service in SERVICES.values() if "build" not in service]
    assert foreign
    for image in (*base, *foreign):
        assert re.search(r":v?\d+\.\d+\.\d+", image), image


def test_the_image_runs_as_nobody_special_and_holds_every_package() -> None:
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.M) == ["10001:10001"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(re.findall(r"^COPY (\w+) \1$", DOCKERFILE, re.M)) == sorted(packages)


def test_prometheus_asks_a_service_at_the_port_it_has() -> None:
    document = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yaml").read_text())
    (job,) = document["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"gateway:{settings_of('gateway').port}"]}]
    common = set(SERVICES["prometheus"]["networks"]) & set(SERVICES["gateway"]["networks"])
    assert common == {"monitoring"}
