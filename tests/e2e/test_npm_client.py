"""The official client for JavaScript against a running system; skipped where there is no Node."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_faults import FLAGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PROGRAM = Path(__file__).parent / "npm"
INSTALL_S = 120.0
RUN_S = 120.0


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The client program beside the packages that it needs, at the versions of its lock file."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    folder = tmp_path / "npm"
    shutil.copytree(PROGRAM, folder)
    command = ["npm", "ci", "--no-audit", "--no-fund", "--prefer-offline"]
    installed = subprocess.run(
        command, cwd=folder, check=False, capture_output=True, text=True, timeout=INSTALL_S
    )
    if installed.returncode:
        pytest.skip(f"the registry of packages cannot be reached: {installed.stderr[-200:]}")
    return folder / "client.mjs"


def test_the_javascript_client_works_unchanged(start: Start, program: Path) -> None:
    system: LocalSystem = start("smollm2", *FLAGS)
    ended = subprocess.run(
        ["node", program, f"{system.url}/v1", "smollm2"],
        check=False,
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
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
