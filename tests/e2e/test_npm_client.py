"""The official clients for JavaScript against a running system; skipped where there is no Node."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_faults import FLAGS, attempts_in_flight, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PROGRAM = Path(__file__).parent / "npm"
INSTALL_S = 120.0
RUN_S = 120.0


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clients' programs beside the packages they need, at the versions of their lock file."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("clients") / "npm"
    shutil.copytree(PROGRAM, folder)
    command = ["npm", "ci", "--no-audit", "--no-fund", "--prefer-offline"]
    installed = subprocess.run(
        command, cwd=folder, check=False, capture_output=True, text=True, timeout=INSTALL_S
    )
    if installed.returncode:
        pytest.skip(f"the registry of packages cannot be reached: {installed.stderr[-200:]}")
    return folder


def what_it_found(program: Path, *arguments: str) -> dict[str, Any]:
    ended = subprocess.run(
        ["node", program, *arguments], check=False, capture_output=True, text=True, timeout=RUN_S
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_the_javascript_client_works_unchanged(start: Start, programs: Path) -> None:
    system: LocalSystem = start("smollm2", *FLAGS)
    found = what_it_found(programs / "client.mjs", f"{system.url}/v1", "smollm2")
    assert found["text"]
    assert found["streamed"] == found["finalContent"] == found["text"]
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert [call["name"] for call in found["calls"]] == ["weather"]
    assert set(json.loads(found["calls"][0]["arguments"])) == {"city"}
    assert found["parsed"]["name"] in ("Bo", "Al")
    assert found["response"]
    assert found["final"]
    assert found["events"][0] == "response.created"
    assert found["events"][-1] in ("response.completed", "response.incomplete")
    assert found["error"] == {"name": "BadRequestError", "status": 400, "param": "temperature"}
    assert found["unknown"] == "NotFoundError"


def test_anthropics_javascript_client_works_unchanged(start: Start, programs: Path) -> None:
    system: LocalSystem = start("smollm2", *FLAGS)
    found = what_it_found(programs / "messages.mjs", system.url, "smollm2")
    assert found["text"] == found["streamed"] == found["finalText"] != ""
    assert found["usage"]["output_tokens"] > 0
    assert found["requestId"]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert found["kinds"] == ["message_start", *block, "message_delta", "message_stop"]
    whole, streamed = found["calls"]
    assert whole == streamed
    assert (whole["name"], set(whole["input"])) == ("weather", {"city"})
    assert found["snapshot"] == whole["input"]
    assert found["pieces"] > 1
    assert found["stopReason"] == "tool_use"
    assert found["after"] == ["text"]
    assert found["counted"] == found["paidFor"] > 0
    assert found["models"] == [{"id": "smollm2", "type": "model"}]
    assert all(error["id"] for error in found["errors"].values())
    assert {
        case: (error["name"], error["status"], error["type"])
        for case, error in found["errors"].items()
    } == {
        "model": ("NotFoundError", 404, "not_found_error"),
        "temperature": ("BadRequestError", 400, "invalid_request_error"),
        "schema": ("BadRequestError", 400, "invalid_request_error"),
        "large": ("ContentTooLargeError", 413, "request_too_large"),
        "late": ("GatewayTimeoutError", 504, "timeout_error"),
    }
    assert found["aborted"] == "APIUserAbortError"
    eventually(lambda: attempts_in_flight(system) == 0, "what was left ends", within_s=10)
