"""Ways for rows to travel, in a whole system: same tokens, costs in the status, and refusals."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from transformers import AutoModelForCausalLM

from benchmarks.local_system import running_system
from tests.e2e import test_membership
from tests.e2e.conftest import Start
from tests.e2e.test_greedy_tokens import a_prompt, completion, greedy, token_ids
from tests.e2e.test_membership import all_streams, whole_again

pytestmark = pytest.mark.timeout(300)
FLAGS = ("--dtype", "float32", "--kv-cache", "16MiB", "--decode-ranks", "3")
PADDED = (
    "--log-level",
    "info",
    "--set",
    "decode.experts.transport=padded",
    "--set",
    "decode.experts.two_batches=always",
    "--set",
    "decode.experts.rebalance_window=2",
)


def status_of_experts(url: str) -> dict[str, dict[str, object]]:
    """As soon as a rank has reported a step; workers report once a second."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        command = [sys.executable, "-m", "deploy.cli", "status", url, "--json", "--experts"]
        ended = subprocess.run(command, capture_output=True, timeout=60, check=True)
        ranks = msgspec.json.decode(ended.stdout)["experts"]["decode-0"]["ranks"]
        if len(ranks) == 3 and all(rank["layer_calls"] > 0 for rank in ranks.values()):
            return dict(ranks)
    raise TimeoutError("no rank reported its exchanges")


def test_tokens_are_those_of_transformers_and_every_ranks_costs_are_shown(
    start: Start, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = tiny_checkpoint("deepseek_v3")
    system = start(folder, *FLAGS, *PADDED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")

    for seed, length in enumerate((5, 40)):
        prompt = a_prompt(length, 300, seed)
        assert token_ids(completion(system.url, folder.name, prompt)) == greedy(model, prompt)

    for rank in status_of_experts(system.url).values():
        assert rank["transport"] == "padded"
        assert rank["buffer_bytes"] > 0  # type: ignore[operator]
        assert min(rank["sent_bytes"].values()) > 0  # type: ignore[attr-defined]
        assert rank["seconds"].keys() == {"dispatch", "compute", "combine", "rows", "skew"}  # type: ignore[attr-defined]
        assert rank["groups_formed"] == 1
        assert f"buffer_bytes={rank['buffer_bytes']:.0f}" in system.output()


def test_a_rank_killed_while_rows_travel_in_fixed_sizes_changes_no_token(
    start: Start, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """Its peers' buffers serve fewer ranks, and all of them when it is back."""
    folder = tiny_checkpoint("deepseek_v3")
    system = start(folder, *test_membership.FLAGS, *PADDED)

    def kill() -> None:
        system.processes("decode")[1].send_signal(signal.SIGKILL)

    undisturbed = all_streams(system, folder.name, 1, lambda: None)
    assert all_streams(system, folder.name, 20, kill) == undisturbed
    whole_again(system)
    assert all_streams(system, folder.name, 1, lambda: None) == undisturbed


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("transport=deepep", "it needs the library deep_ep"),
        ("transport=nccl_ep", "it needs the library nccl.ep"),
        ("payload=fp8", "set it to native, or decode.model.numerics to fast"),
    ],
)
def test_what_cannot_serve_is_refused_with_the_rule_and_the_fix(
    setting: str, rule: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    refused = ("--set", f"decode.experts.{setting}")
    with pytest.raises(RuntimeError) as failed:  # noqa: SIM117
        with running_system(str(tiny_checkpoint("deepseek_v3")), *FLAGS, *refused):
            pass
    assert rule in str(failed.value)
