"""What is asked of Ray for a worker, and what is said when Ray is not there."""

import subprocess
import sys

import pytest

from deploy.on_ray.placement import NODE_LABEL, Gang, a_gang, offers

TRAY = {"CPU": 64.0, "GPU": 4.0}
COMMANDS = [["up", "--on", "ray", "--port", "0"], ["scale", "prefill=2"]]
NO_RAY = "import sys; sys.modules['ray'] = None; from deploy.cli import main; sys.exit(main({}))"


def a_decode_gang(ranks: int, *, label: str = "", device: str = "cuda") -> Gang:
    return a_gang("decode-0", ranks, device=device, cpus=8, nodes=[TRAY] * 18, domain_label=label)


def test_every_rank_has_a_bundle_with_its_cpus_and_its_gpu() -> None:
    gang = a_decode_gang(72)
    assert gang.bundles == [{"CPU": 8.0, "GPU": 1.0}] * 72


def test_a_rank_on_a_cpu_asks_for_no_gpu() -> None:
    assert a_decode_gang(2, device="cpu").bundles == [{"CPU": 8.0}] * 2


def test_ranks_that_fit_into_one_node_go_to_one_node() -> None:
    assert a_decode_gang(4).topology == {NODE_LABEL: "STRICT_PACK"}


def test_more_ranks_than_a_node_holds_are_packed_into_few() -> None:
    assert a_decode_gang(5).topology == {NODE_LABEL: "PACK"}


@pytest.mark.parametrize(("ranks", "nodes"), [(4, "STRICT_PACK"), (72, "PACK")])
def test_with_a_label_all_ranks_stay_in_one_domain(ranks: int, nodes: str) -> None:
    gang = a_decode_gang(ranks, label="ray.io/gpu-domain")
    assert gang.topology == {NODE_LABEL: nodes, "ray.io/gpu-domain": "STRICT_PACK"}


def test_what_is_missing_is_said_with_units_and_where() -> None:
    assert a_decode_gang(4).wanted == "4 × (8 CPU, 1 GPU) in one node"
    within = a_decode_gang(72, label="ray.io/gpu-domain").wanted
    assert within == "72 × (8 CPU, 1 GPU) in nodes of one ray.io/gpu-domain"
    assert offers([TRAY, {"CPU": 2.0}, {"memory": 1.0}]) == "64 CPU, 4 GPU; 2 CPU; nothing"


@pytest.mark.parametrize(
    "arguments", [["up", "--on", "ray", "--port", "0"], ["scale", "prefill=2"]]
)
def test_without_ray_the_command_says_what_to_install(arguments: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", NO_RAY.format(arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("headrace: Ray is not installed here: pip install")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", COMMANDS, ids=["up", "scale"])
def test_where_no_cluster_answers_the_command_says_how_to_get_one(arguments: list[str]) -> None:
    pytest.importorskip("ray")
    ended = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments, "--set", "ray.address=127.0.0.1:9"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("headrace: no Ray cluster answers at 127.0.0.1:9: start one")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("decode=2", "start another system with --decode-ranks"),
        ("prefill=0", "write prefill=N, where N is 1 or more"),
        ("prefill", "write prefill=N"),
    ],
)
def test_a_scale_that_cannot_be_is_refused_before_ray_is_asked(wanted: str, told: str) -> None:
    pytest.importorskip("ray")
    ended = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "scale", wanted],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert told in ended.stderr
