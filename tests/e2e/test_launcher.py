"""Starting the real system with something wrong, or losing the launcher while it starts."""

import contextlib
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.demo import demo_weights
from tests.support.polling import eventually

COMMAND = [sys.executable, "-m", "deploy.cli", "up"]
DEADLINE_S = 60.0


@contextlib.contextmanager
def a_taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def a_cut_file(folder: Path) -> Path:
    file = folder / "cut.gguf"
    with demo_weights().open("rb") as whole:
        file.write_bytes(whole.read(5_000_000))
    return file


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/nowhere/model"], 1, "no model at /nowhere/model"),
        (["--set", "decode.group.rnks=2"], 2, "did you mean decode.group.ranks?"),
        (["--decode-ranks", "0"], 2, "--decode-ranks: "),
        (["--cluster-key-file", "/nowhere/key"], 1, "cannot read cluster key file /nowhere/key"),
        (["--host", "0.0.0.0"], 2, "set gateway.api_keys_file"),
    ],
    ids=["no weights", "unknown key", "value out of range", "no key", "open to the world"],
)
def test_a_plain_mistake_is_one_line_and_nothing_is_started(
    arguments: list[str], code: int, message: str
) -> None:
    ended = started(*arguments)
    assert ended.returncode == code
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


def test_a_taken_port_is_one_line() -> None:
    with a_taken_port() as port:
        ended = started("--port", str(port))
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1)
    assert f"127.0.0.1:{port}" in ended.stderr


def test_cut_weights_are_one_line(tmp_path: Path) -> None:
    ended = started(str(a_cut_file(tmp_path)), "--port", "0")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1)
    assert "is truncated" in ended.stderr


def test_a_role_that_cannot_start_ends_the_system_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    ended = started(str(tmp_path), "--port", "0")
    assert ended.returncode == 1
    reason = ended.stderr.splitlines()[-1]
    assert reason.startswith("headrace: ")
    assert str(tmp_path) in reason


def a_launcher() -> psutil.Popen:
    quiet = subprocess.DEVNULL
    return psutil.Popen([*COMMAND, "smollm2", "--port", "0"], stdout=quiet, stderr=quiet)


@pytest.mark.anyio
async def test_a_launcher_killed_while_it_starts_leaves_no_process() -> None:
    launcher = a_launcher()
    children: list[psutil.Process] = []

    def all_started() -> bool:
        children[:] = launcher.children(recursive=True)
        return len(children) == 4  # gateway, prefill worker, two ranks

    try:
        await eventually(all_started, "four processes", timeout_s=DEADLINE_S)
    finally:
        launcher.kill()
        launcher.wait()
    _, still_there = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert still_there == []
