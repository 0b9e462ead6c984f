"""The manifests are valid, closed, and agree with the settings they carry."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from decode.settings import DecodeSettings
from deploy.cli import parser
from deploy.options import configuration
from prefill.settings import PrefillSettings
from server.settings import GatewaySettings, SchedulerSettings

FOLDER = Path(__file__).parents[3] / "deploy/kubernetes"
VERSION = "1.32"
POD_IP = {
    "HEADRACE_PREFILL_BIND": "tcp://10.0.0.7:8300",
    "HEADRACE_DECODE_BIND": "tcp://10.0.0.7:8300",
}
# What the LeaderWorkerSet controller and the pod's labels fill in, for the second pod of a group.
GIVEN_TO_POD = {
    "$(GROUP)": "0",
    "$(NODE)": "1",
    "$(LWS_LEADER_ADDRESS)": "headrace-decode-0.headrace-decode.default",
}
SETTINGS: dict[str, Any] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
}


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


BASE = [
    document
    for name in yaml.safe_load((FOLDER / "base/kustomization.yaml").read_text())["resources"]
    for document in documents((FOLDER / "base" / name).read_text())
]
WORKLOADS = [document for document in BASE if document["kind"] in ("Deployment", "LeaderWorkerSet")]


def template_of(workload: dict[str, Any]) -> Any:
    if workload["kind"] == "Deployment":
        return workload["spec"]["template"]
    return workload["spec"]["leaderWorkerTemplate"]["workerTemplate"]


def container_of(workload: dict[str, Any]) -> Any:
    (container,) = template_of(workload)["spec"]["containers"]
    return container


def name_of(document: dict[str, Any]) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def validate(document: dict[str, Any]) -> None:
    """No schema of LeaderWorkerSet is at hand: its pods are checked, as what they become."""
    if document["kind"] != "LeaderWorkerSet":
        kubernetes_validate.validate(document, VERSION, strict=True)
        return
    assert document["spec"].keys() <= {
        "replicas",
        "startupPolicy",
        "rolloutStrategy",
        "leaderWorkerTemplate",
    }
    assert document["spec"]["leaderWorkerTemplate"].keys() == {
        "size",
        "restartPolicy",
        "workerTemplate",
    }
    pod = {"apiVersion": "v1", "kind": "Pod", **template_of(document)}
    kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.parametrize("document", BASE, ids=name_of)
def test_every_manifest_is_valid(document: dict[str, Any]) -> None:
    validate(document)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl builds the overlays")
@pytest.mark.parametrize("overlay", ["base", "gpu"])
def test_every_overlay_builds_into_valid_manifests(overlay: str) -> None:
    built = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / overlay)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = documents(built.stdout)
    for document in found:
        validate(document)
    maps = [document["metadata"]["name"] for document in found if document["kind"] == "ConfigMap"]
    for workload in found:
        if workload["kind"] in ("Deployment", "LeaderWorkerSet"):
            (source,) = container_of(workload)["envFrom"]
            assert [source["configMapRef"]["name"]] == maps
            labels = template_of(workload)["metadata"]["labels"]
            assert labels["app.kubernetes.io/part-of"] == "headrace"
            assert container_of(workload)["image"] == {"base": "headrace:cpu"}.get(
                overlay, "headrace:cuda"
            )


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_pods_have_no_rights_that_they_do_not_need(workload: dict[str, Any]) -> None:
    spec = template_of(workload)["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert container_of(workload)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_the_settings_of_a_pod_are_valid_and_its_drain_fits_its_end(
    workload: dict[str, Any],
) -> None:
    generated = yaml.safe_load((FOLDER / "base/kustomization.yaml").read_text())
    literals = dict(line.split("=", 1) for line in generated["configMapGenerator"][0]["literals"])
    arguments = container_of(workload)["args"]
    for placeholder, value in GIVEN_TO_POD.items():
        arguments = [argument.replace(placeholder, value) for argument in arguments]
    role = arguments[0]
    chosen = parser().parse_args(arguments)
    settings = configuration(chosen, role, POD_IP | literals).settings(role, SETTINGS[role])
    hook = container_of(workload).get("lifecycle", {}).get("preStop")
    pause_s = int(hook["exec"]["command"][1]) if hook else 0
    end_s = template_of(workload)["spec"]["terminationGracePeriodSeconds"]
    assert pause_s + settings.process.drain_s < end_s


def test_the_pods_of_a_decode_group_hold_all_its_ranks() -> None:
    (decode,) = (document for document in BASE if document["kind"] == "LeaderWorkerSet")
    arguments = container_of(decode)["args"]
    assert f"--set=decode.group.nodes={decode['spec']['leaderWorkerTemplate']['size']}" in arguments
    assert "--set=decode.group.node=$(NODE)" in arguments


def test_the_gateway_is_probed_for_life_and_for_service() -> None:
    (gateway,) = (
        document for document in WORKLOADS if document["metadata"]["name"] == "headrace-gateway"
    )
    container = container_of(gateway)
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"


@pytest.mark.parametrize("kind", ["NetworkPolicy", "PodDisruptionBudget"])
def test_policies_select_pods_that_exist(kind: str) -> None:
    labels = [
        template_of(workload)["metadata"]["labels"] | {"app.kubernetes.io/part-of": "headrace"}
        for workload in WORKLOADS
    ]
    for policy in (document for document in BASE if document["kind"] == kind):
        spec = policy["spec"]
        wanted = spec.get("podSelector", spec.get("selector"))["matchLabels"]
        assert any(wanted.items() <= of_pod.items() for of_pod in labels), policy["metadata"]


def test_every_kind_of_pod_is_behind_a_network_policy_of_its_own() -> None:
    policies = {
        document["metadata"]["name"] for document in BASE if document["kind"] == "NetworkPolicy"
    }
    assert {workload["metadata"]["name"] for workload in WORKLOADS} <= policies
